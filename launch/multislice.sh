#!/usr/bin/env bash
# Trains on several TPU slices joined by the data-centre network, without Kubernetes: one queued resource with a node a slice, such as
#   gcloud compute tpus queued-resources create NAME --zone ZONE --node-count 2 --node-prefix NAME --accelerator-type v5p-256 \
#     --runtime-version v2-alpha-tpuv5
# Its nodes are NAME-0, NAME-1, ... and have been told of each other. Only `data` runs across slices: --config.mesh.data must be a
# multiple of their number, or -1. Ctrl-C, the same command again, NAME alone, and NAME stop do what they do in tpu_pod.sh.
# usage: ZONE=us-east5-a SLICES=2 bash launch/multislice.sh NAME [stop | --config configs/lm.py:lavit_7b --workdir /mnt/shared/runs/lm ...]
set -euo pipefail
name=$1
shift
set -m # each slice's gcloud is a group of its own, which is ended with all that it started
children=()
trap 'for child in "${children[@]}"; do kill -TERM -- "-$child" 2>/dev/null || true; done; exit 130' INT TERM HUP
for ((slice = 0; slice < SLICES; slice++)); do
  bash "$(dirname "$0")/tpu_pod.sh" "$name-$slice" "$@" </dev/null & # which runs launch/train.sh on all workers of that slice
  children+=($!)
done
status=0
for child in "${children[@]}"; do
  result=0
  wait "$child" || result=$?
  if ((result && (!status || result < status))); then status=$result; fi # the lowest: what is below 128 was the reason of the others
done
exit "$status"
