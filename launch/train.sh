#!/usr/bin/env bash
# What every machine of a job runs: installs lavit_jax in .venv and trains. The other scripts start it where it is needed.
# --workdir must be a folder that all machines share (Filestore, Lustre, NFS, a mounted bucket). Started again, the run goes on.
# usage: [EXTRAS='[tpu]'] bash launch/train.sh --config configs/lm.py:lavit_7b --workdir DIR [--config.KEY=VALUE ...]
set -euo pipefail
source "$(dirname "$0")/install.sh" "${EXTRAS:-}"

.venv/bin/lavit train "$@" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null || true' INT TERM # it saves, and ends with 143
status=0
while kill -0 "$child" 2>/dev/null; do wait "$child" && status=0 || status=$?; done # a signal ends the waiting, not the child
if [ "$status" = 134 ]; then # how JAX ends a process when another one is gone
  echo "lavit: error: another process of this job ended or fell silent; see what the others say, and start all of them again: the run goes on" >&2
fi
exit "$status"
