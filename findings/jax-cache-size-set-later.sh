#!/usr/bin/env bash
# jax 0.10.2, with numpy 2.4.6 and filelock 4.2.11, Python 3.11.
#
# Expected: a persistent compilation cache that was filled without a limit goes on under
#   jax_compilation_cache_max_size: old entries are read, new ones are written, and the oldest make way.
# Behaviour: nothing is written to it any more. With a limit each entry has a second file with the time of
#   its last use; entries from before have none, and each write fails with a warning, because the search for
#   the oldest entry reads all of these files.
# Output seen:
#   without a limit: 1 entries
#   with a limit, another program: 1 entries, warning: FileNotFoundError
#   with a limit, empty folder: 1 entries
#
# Exits with another status than 0 when this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6 filelock==4.2.11
cat >"$work/start.py" <<'EOF'
"""Compiles x @ x for one size, with a cache of at most so many bytes; -1: without a limit."""

import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp

folder = pathlib.Path(sys.argv[1])
size = int(sys.argv[2])
jax.config.update('jax_compilation_cache_dir', str(folder))
jax.config.update('jax_compilation_cache_max_size', int(sys.argv[3]))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
with warnings.catch_warnings(record=True) as caught:
  warnings.simplefilter('always')
  jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((size, size), jnp.float32)).compile()
result = f'{len(list(folder.glob("*-cache")))} entries'
messages = [str(item.message) for item in caught if 'compilation cache' in str(item.message)]
if messages:
  names = [name for name in ('FileNotFoundError',) if name in messages[0]]
  result += f', warning: {names[0] if names else messages[0]}'
print(result)
EOF
start() { JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/start.py" "$@"; }
expect() {
  local name=$1 wanted=$2 seen
  shift 2
  seen=$(start "$@")
  echo "$name: $seen"
  [ "$seen" = "$wanted" ]
}
mkdir "$work/cache" "$work/empty"
limit=$((1 << 30))
expect 'without a limit' '1 entries' "$work/cache" 8 -1
expect 'with a limit, another program' '1 entries, warning: FileNotFoundError' "$work/cache" 16 $limit
expect 'with a limit, empty folder' '1 entries' "$work/empty" 16 $limit
