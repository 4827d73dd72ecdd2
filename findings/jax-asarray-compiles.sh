#!/usr/bin/env bash
# jax 0.10.2, with numpy 2.4.6, Python 3.11.
#
# Expected: jnp.asarray(x) of a NumPy array places it on the device, as jnp.array(x) and jax.device_put(x)
#   do, at no more cost than these: the name says that it copies less, not that it computes.
# Behaviour: jnp.asarray compiles a program for each new shape and dtype; the other two compile none. A
#   program or a set of tests that makes many small arrays of different shapes this way waits for XLA.
# Output seen:
#   asarray: 3 programs for 3 shapes
#   array: 0 programs for 3 shapes
#   device_put: 0 programs for 3 shapes
#
# Exits with another status than 0 when this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'EOF'
import jax
import jax.numpy as jnp
import numpy as np

compilations = 0


def count(event, duration, **metadata):
  global compilations
  compilations += event == '/jax/core/compile/backend_compile_duration'


jax.monitoring.register_event_duration_secs_listener(count)
seen = []
for place in (jnp.asarray, jnp.array, jax.device_put):
  compilations = 0
  for size in (3, 4, 5):
    place(np.ones(size, np.float32)).block_until_ready()
  print(f'{place.__name__}: {compilations} programs for 3 shapes')
  seen.append(compilations)
assert seen == [3, 0, 0], seen
EOF
