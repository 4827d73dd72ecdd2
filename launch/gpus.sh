#!/usr/bin/env bash
# Trains on the GPUs of this machine: by one process that has all of them, or with PROCESSES=N by N that share them out.
# EXTRAS= PROCESSES=2 JAX_PLATFORMS=cpu tries it out without GPUs.
# usage: [PROCESSES=8] bash launch/gpus.sh --config configs/lm.py:small --workdir runs/lm [--config.KEY=VALUE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
export EXTRAS="${EXTRAS-[cuda]}"
processes=${PROCESSES:-1}
if [ "$processes" = 1 ]; then
  exec bash launch/train.sh "$@"
fi
bash launch/install.sh "$EXTRAS" # once, before they all look

gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
children=()
trap 'kill -TERM "${children[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < processes; i++)); do
  if ((gpus)); then
    CUDA_VISIBLE_DEVICES=$(seq -s, $((i * gpus / processes)) $(((i + 1) * gpus / processes - 1)))
    export CUDA_VISIBLE_DEVICES
  fi
  bash launch/train.sh --coordinator "127.0.0.1:${PORT:-9876}" --processes "$processes" --process "$i" "$@" &
  children+=($!)
done
status=0
for child in "${children[@]}"; do
  result=0
  while kill -0 "$child" 2>/dev/null; do wait "$child" && result=0 || result=$?; done # a signal ends the waiting, not the child
  [ "$result" = 0 ] || status=$result
done
exit "$status"
