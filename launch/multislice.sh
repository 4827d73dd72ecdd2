#!/usr/bin/env bash
# Trains on several TPU slices without Kubernetes, over the data-center network: a queued resource with one node for each slice, such as
#   gcloud compute tpus queued-resources create NAME --zone ZONE --node-count 2 --node-prefix NAME --accelerator-type v5p-256 \
#     --runtime-version v2-alpha-tpuv5
# Its nodes NAME-0, NAME-1, ... find each other. Only the axis `data` crosses slices: --config.mesh.data must be a multiple of the number
# of slices, or -1. Ctrl-C, the same command again, NAME alone, and NAME stop have the same effects as with tpu_pod.sh.
# usage: ZONE=us-east5-a SLICES=2 bash launch/multislice.sh NAME [stop | --config configs/lm.py:lavit_7b --workdir /mnt/shared/runs/lm ...]
set -euo pipefail
name=$1
shift
set -m # each slice's gcloud has a process group of its own, which is ended as a whole
children=()
trap 'for child in "${children[@]}"; do kill -TERM -- "-$child" 2>/dev/null || true; done; exit 130' INT TERM HUP
for ((slice = 0; slice < SLICES; slice++)); do
  bash "$(dirname "$0")/tpu_pod.sh" "$name-$slice" "$@" </dev/null & # runs launch/train.sh on all workers of the slice
  children+=($!)
done
status=0
for child in "${children[@]}"; do
  result=0
  wait "$child" || result=$?
  if ((result && (!status || result < status))); then status=$result; fi # the lowest: a status below 128 is the cause of the others
done
exit "$status"
