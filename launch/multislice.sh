#!/usr/bin/env bash
# Trains on several TPU slices joined by the data-centre network, without Kubernetes: one queued resource with a node a slice, such as
#   gcloud compute tpus queued-resources create NAME --zone ZONE --node-count 2 --node-prefix NAME --accelerator-type v5p-128 \
#     --runtime-version v2-alpha-tpuv5
# Its nodes are NAME-0, NAME-1, ... and have been told of each other. Only `data` runs across slices: --config.mesh.data must be a
# multiple of their number, or -1.
# usage: ZONE=us-east5-a SLICES=2 bash launch/multislice.sh NAME --config configs/lm.py:lavit_7b --workdir /mnt/shared/runs/lm [--config.KEY=VALUE ...]
set -euo pipefail
name=$1
shift
children=()
for ((slice = 0; slice < SLICES; slice++)); do
  bash "$(dirname "$0")/tpu_pod.sh" "$name-$slice" "$@" & # which runs launch/train.sh on all workers of that slice
  children+=($!)
done
status=0
for child in "${children[@]}"; do wait "$child" || status=$?; done
exit "$status"
