#!/usr/bin/env bash
# Installs lavit_jax in .venv and trains. Every machine of a job runs this; the other scripts start it there.
# --workdir must be a folder that all machines share (Filestore, Lustre, NFS), or gs://BUCKET/PATH. The same command resumes the run.
# After Ctrl-C, SIGTERM or a lost terminal, an installation ends, and a training run saves and ends; the status is 143. Statuses are those
# of lavit_jax/errors.py: a run with status 128 or more can be started again. If STATUSES is set, a file named like the status is written
# to that folder.
# usage: [EXTRAS='[tpu,gcs]'] bash launch/train.sh --config configs/lm.py:lavit_7b --workdir DIR [--config.KEY=VALUE ...]
set -euo pipefail
trap 'exit 143' INT TERM HUP
[ -z "${STATUSES:-}" ] || trap ': >"$STATUSES/$?"' EXIT
source "$(dirname "$0")/install.sh" "${EXTRAS:-}"

trap 'kill -TERM "${!:-}" 2>/dev/null || [ -n "${child:-}" ] || exit 143' INT TERM HUP # the training has not started yet
(trap '' INT HUP && exec .venv/bin/lavit train "$@") & # INT and HUP reach it as SIGTERM
child=$!
while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal ends the wait, not the child
status=0
wait "$child" || status=$?
if [ "$status" = 134 ]; then # JAX aborts a process when another one is gone
  echo "lavit: error: another process of this job ended or fell silent; see the logs of the others, and start all of them again: the run resumes" >&2
fi
exit "$status"
