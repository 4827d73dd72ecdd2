#!/usr/bin/env bash
# orbax-checkpoint 0.12.8, with jax 0.10.2, Python 3.11.
#
# Expected: a tree is restored with the containers that it was saved with; and a target of another
#   type than what was saved is an error, or is told of.
# Behaviour: without a target a tuple comes back as a list and a NamedTuple as a dict, so jax.tree.map over
#   the tree and its restored self fails. With a target of bfloat16, float32 is rounded without a word.
# Output seen:
#   saved    Moments(mean=1.0, count=(2.0, 3.0))
#   restored {'count': [2.0, 3.0], 'mean': 1.0}
#   0.1 in float32, into a bfloat16 target: 0.10009765625
#
# Exits with another status than 0 when this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q orbax-checkpoint==0.12.8 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$work/venv/bin/python" - "$work" <<'EOF'
import pathlib
import sys
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

warnings.simplefilter('error', UserWarning)
folder = pathlib.Path(sys.argv[1])


class Moments(NamedTuple):
  mean: jax.Array
  count: tuple


def floats(tree):
  return jax.tree.map(float, tree)


with ocp.StandardCheckpointer() as checkpointer:
  saved = Moments(jnp.float32(1), (jnp.float32(2), jnp.float32(3)))
  checkpointer.save(folder / 'moments', saved)
  checkpointer.wait_until_finished()
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of shardings that are read from the file
    restored = checkpointer.restore(folder / 'moments')
  print('saved   ', floats(saved))
  print('restored', floats(restored))
  assert floats(restored) == {'mean': 1.0, 'count': [2.0, 3.0]} and type(restored['count']) is list
  checkpointer.save(folder / 'tenth', {'x': jnp.full(3, 0.1, jnp.float32)})
  checkpointer.wait_until_finished()
  target = {'x': jax.ShapeDtypeStruct((3,), jnp.bfloat16, sharding=place)}
  x = checkpointer.restore(folder / 'tenth', target)['x']
  print('0.1 in float32, into a bfloat16 target:', float(x[0]))
  assert x.dtype == jnp.bfloat16 and float(x[0]) == 0.10009765625
EOF
