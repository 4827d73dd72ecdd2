#!/usr/bin/env bash
# Trains on the GPUs of this machine: in one process with all GPUs, or with PROCESSES=N in N processes that each get an equal share.
# After Ctrl-C or a lost terminal, the run saves and ends; for a run without a terminal, use tmux or nohup setsid.
# CUDA_VISIBLE_DEVICES limits the GPUs. EXTRAS= PROCESSES=2 JAX_PLATFORMS=cpu tests the script without GPUs.
# usage: [PROCESSES=8] bash launch/gpus.sh --config configs/lm.py:small --workdir runs/lm [--config.KEY=VALUE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
export EXTRAS="${EXTRAS-[cuda,gcs]}"
processes=${PROCESSES:-1}
if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then
  echo "lavit: error: PROCESSES=$processes is not a number of processes; give 1 or more" >&2
  exit 2
fi
if [ "$processes" = 1 ]; then
  exec bash launch/train.sh "$@"
fi
source launch/install.sh "$EXTRAS" # once, before the processes start

gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
IFS=', ' read -ra visible <<<"${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((gpus - 1)))}"
[ "${visible[*]}" != -1 ] || visible=() # -1 means no GPUs
gpus=${#visible[@]}
if ((gpus % processes)); then
  echo "lavit: error: $gpus GPUs cannot be divided equally among PROCESSES=$processes; choose a number that divides them" >&2
  exit 2
fi
children=()
trap 'kill -TERM "${children[@]}" 2>/dev/null || true' INT TERM HUP
for ((i = 0; i < processes; i++)); do
  if ((gpus)); then
    CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${visible[*]:i*gpus/processes:gpus/processes}")
    export CUDA_VISIBLE_DEVICES
  fi
  bash launch/train.sh --coordinator "127.0.0.1:${PORT:-9876}" --processes "$processes" --process "$i" "$@" &
  children+=($!)
done
status=0
for child in "${children[@]}"; do
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal ends the wait, not the child
  result=0
  wait "$child" || result=$?
  if ((result && (!status || result < status))); then status=$result; fi # the lowest: a status below 128 is the cause of the others
done
exit "$status"
