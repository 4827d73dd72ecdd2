#!/usr/bin/env bash
# jax 0.10.2, with numpy 2.4.6, Python 3.11.
#
# Expected: the keys that split() makes of a key, and those that fold_in() makes of it, are different
#   keys, so that one key may be split for the weights of a model and folded with the step for its noise.
# Behaviour: split(key, n)[i] is fold_in(key, i) for every i. (With jax_threefry_partitionable off, as it
#   was before it became the default, the two have nothing in common.)
# Output seen:
#   partitionable: 8 of 8 keys are the same
#   not partitionable: 0 of 8 keys are the same
#
# Exits with another status than 0 when this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'EOF'
import jax


def same():
  key = jax.random.key(3)
  parts, steps = jax.random.split(key, 8), [jax.random.fold_in(key, i) for i in range(8)]
  data = jax.random.key_data
  return sum(bool((data(part) == data(step)).all()) for part, step in zip(parts, steps))


now = same()
print(f'partitionable: {now} of 8 keys are the same')
jax.config.update('jax_threefry_partitionable', False)
before = same()
print(f'not partitionable: {before} of 8 keys are the same')
assert (now, before) == (8, 0)
EOF
