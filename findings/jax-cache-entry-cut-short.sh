#!/usr/bin/env bash
# jax 0.10.2, with numpy 2.4.6, Python 3.11.
#
# Expected: an entry of the persistent compilation cache that cannot be read is compiled again and written
#   again, so that one write that was cut short (a killed process, a full disk) costs one compilation.
# Behaviour: the entry stays as it is. Each later start warns that it cannot be read and compiles the
#   program, for a file of this name exists and is not written over.
# Output seen:
#   first start: 1 written, 0 read, 0 warnings
#   second start: 0 written, 1 read, 0 warnings
#   cut short, start 1: 0 written, 0 read, 1 warnings
#   cut short, start 2: 0 written, 0 read, 1 warnings
#   cut short, start 3: 0 written, 0 read, 1 warnings
#
# Exits with another status than 0 when this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$work/start.py" <<'EOF'
"""Compiles one program with a cache; prints how many entries were written and read, and the warnings."""

import pathlib
import sys
import warnings

import jax
import jax.monitoring
import jax.numpy as jnp

folder = pathlib.Path(sys.argv[1])
jax.config.update('jax_compilation_cache_dir', str(folder))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
before = {path: path.stat().st_mtime_ns for path in folder.glob('*-cache')}
hits = []
jax.monitoring.register_event_listener(
  lambda name, **_: hits.append(name) if name == '/jax/compilation_cache/cache_hits' else None
)
x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
with warnings.catch_warnings(record=True) as caught:
  warnings.simplefilter('always')
  jax.jit(lambda x: jnp.sin(x @ x)).lower(x).compile()
written = [path for path in folder.glob('*-cache') if before.get(path) != path.stat().st_mtime_ns]
about_cache = [str(item.message) for item in caught if 'compilation cache' in str(item.message)]
print(f'{len(written)} written, {len(hits)} read, {len(about_cache)} warnings')
EOF
start() { JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/start.py" "$work/cache"; }
expect() {
  local seen
  seen=$(start)
  echo "$1: $seen"
  [ "$seen" = "$2" ]
}
mkdir "$work/cache"
expect 'first start' '1 written, 0 read, 0 warnings'
expect 'second start' '0 written, 1 read, 0 warnings'
entry=$(echo "$work"/cache/*-cache)
truncate -s -9 "$entry"
for i in 1 2 3; do
  expect "cut short, start $i" '0 written, 0 read, 1 warnings'
done
