#!/usr/bin/env bash
# What every machine of a job runs: installs lavit_jax in .venv and trains. The other scripts start it where it is needed.
# --workdir must be a folder that all machines share (Filestore, Lustre, NFS, a mounted bucket). Started again, the run goes on.
# Ctrl-C, SIGTERM and a lost terminal end the installation, or let the training save, and it ends with 143. Statuses are those of
# lavit_jax/errors.py: what ends with 128 or more may be started again. A file by the name of the status appears in the folder STATUSES,
# if that is set.
# usage: [EXTRAS='[tpu,gcs]'] bash launch/train.sh --config configs/lm.py:lavit_7b --workdir DIR [--config.KEY=VALUE ...]
set -euo pipefail
trap 'exit 143' INT TERM HUP
[ -z "${STATUSES:-}" ] || trap ': >"$STATUSES/$?"' EXIT
source "$(dirname "$0")/install.sh" "${EXTRAS:-}"

trap 'kill -TERM "${!:-}" 2>/dev/null || [ -n "${child:-}" ] || exit 143' INT TERM HUP # 143: it has not been started yet
(trap '' INT HUP && exec .venv/bin/lavit train "$@") & # both reach it as SIGTERM
child=$!
while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal ends the waiting, not the child
status=0
wait "$child" || status=$?
if [ "$status" = 134 ]; then # how JAX ends a process when another one is gone
  echo "lavit: error: another process of this job ended or fell silent; see what the others say, and start all of them again: the run goes on" >&2
fi
exit "$status"
