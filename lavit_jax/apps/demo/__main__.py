"""Writes the inputs of the demo: `python -m lavit_jax.apps.demo --make --source DATA`."""

import argparse

from lavit_jax.apps.demo.inputs import make_inputs


def main() -> None:
  """Reads the arguments and writes the inputs."""
  parser = argparse.ArgumentParser(
    prog='python -m lavit_jax.apps.demo',
    description='Write the inputs of the demo from held-out examples.',
  )
  parser.add_argument('--make', action='store_true', required=True)
  parser.add_argument(
    '--source', default='embedded', help="'embedded' or the data_dir of the emoji data set"
  )
  parser.add_argument('--out', default='lavit_jax/assets/demo')
  parser.add_argument('--seed', type=int, default=7)
  arguments = parser.parse_args()
  print(make_inputs(arguments.source, arguments.out, arguments.seed))


if __name__ == '__main__':
  main()
