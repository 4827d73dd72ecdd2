#!/usr/bin/env bash
# Trains on the GPUs of this machine: by one process that has all of them, or with PROCESSES=N by N that share them out.
# Ctrl-C, and a lost terminal, let it save and end; to go on without a terminal, start it in tmux or by nohup setsid.
# Where CUDA_VISIBLE_DEVICES is set, all are those that it names. EXTRAS= PROCESSES=2 JAX_PLATFORMS=cpu tries it out without GPUs.
# usage: [PROCESSES=8] bash launch/gpus.sh --config configs/lm.py:small --workdir runs/lm [--config.KEY=VALUE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
export EXTRAS="${EXTRAS-[cuda,gcs]}"
processes=${PROCESSES:-1}
if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then
  echo "lavit: error: PROCESSES=$processes is no number of processes; give 1 or more" >&2
  exit 2
fi
if [ "$processes" = 1 ]; then
  exec bash launch/train.sh "$@"
fi
source launch/install.sh "$EXTRAS" # once, before they all look

gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
IFS=', ' read -ra visible <<<"${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((gpus - 1)))}"
[ "${visible[*]}" != -1 ] || visible=() # which is how none is said
gpus=${#visible[@]}
if ((gpus % processes)); then
  echo "lavit: error: $gpus GPUs cannot be shared out to PROCESSES=$processes alike; choose a number that divides them" >&2
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
  while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a signal ends the waiting, not the child
  result=0
  wait "$child" || result=$?
  if ((result && (!status || result < status))); then status=$result; fi # the lowest: what is below 128 was the reason of the others
done
exit "$status"
