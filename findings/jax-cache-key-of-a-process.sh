#!/usr/bin/env bash
# jax 0.10.2, with numpy 2.4.6, Python 3.11.
#
# Expected: a job of two processes on CPUs that starts again reads all its programs from the compilation
#   cache, in both processes, as on GPUs: the key of a program does not say which process compiles it, since
#   process 0 alone writes.
# Behaviour: on CPUs the key holds the topology as this process sees it. Process 1 looks for keys that nobody
#   writes, and compiles everything again in each start.
# Output seen:
#   process 0: 2 of 2 programs were in the cache
#   process 1: 0 of 2 programs were in the cache
#
# Exits with another status than 0 when this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat > "$work/process.py" <<'EOF'
import collections
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

port, process, folder = sys.argv[1:]
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.split('/')[-1]]))
jax.config.update('jax_compilation_cache_dir', folder)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
jax.distributed.initialize(f'127.0.0.1:{port}', 2, int(process))
for size in (3, 4):
  multihost_utils.process_allgather(np.ones(size, np.float32))
print(events['cache_hits'], events['compile_requests_use_cache'])
EOF
cat > "$work/job.py" <<'EOF'
import socket
import subprocess
import sys

work = sys.argv[1]
for start in range(2):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = str(free.getsockname()[1])
  command = [sys.executable, f'{work}/process.py', port]
  job = [
    subprocess.Popen([*command, str(i), f'{work}/cache'], stdout=subprocess.PIPE, text=True)
    for i in range(2)
  ]
  counts = [process.communicate()[0].split()[-2:] for process in job]
for i, (hits, requests) in enumerate(counts):
  print(f'process {i}: {hits} of {requests} programs were in the cache')
assert counts[0][0] == counts[0][1] and counts[1][0] == '0', counts
EOF
JAX_PLATFORMS=cpu "$work/venv/bin/python" "$work/job.py" "$work"
