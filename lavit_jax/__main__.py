"""`python -m lavit_jax` is `lavit`."""

from lavit_jax.cli import main

if __name__ == '__main__':
  raise SystemExit(main())
