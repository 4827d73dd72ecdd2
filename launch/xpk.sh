#!/usr/bin/env bash
# Trains on one or more TPU slices of a GKE cluster, by xpk (pip install xpk). This folder goes along in the image, as far as .dockerignore
# lets it; a volume that all hosts share is attached to the cluster (xpk storage attach) at /mnt/shared. The hosts and slices are told of each
# other. What is preempted (143), or has lost a host (134, 200) or a store (200), is started again and goes on; an error of ours (1, 2) is not.
# usage: CLUSTER=mine ZONE=us-east5-a TPU=v5p-256 [SLICES=2] bash launch/xpk.sh NAME --config configs/lm.py:lavit_7b --workdir /mnt/shared/runs/lm ...
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1
shift
printf -v arguments ' %q' "$@"
# exec: SIGTERM goes to the command, and a shell around it would not pass it on. 30 seconds, as is usual, are little to save in.
exec xpk workload create --workload "$name" --cluster "$CLUSTER" --zone "$ZONE" --tpu-type "$TPU" --num-slices "${SLICES:-1}" \
  --base-docker-image "${IMAGE:-python:3.11}" --script-dir . --max-restarts "${RESTARTS:-100}" --termination-grace-period-seconds 300 \
  --command "exec env EXTRAS='[tpu,gcs]' bash launch/train.sh$arguments"
