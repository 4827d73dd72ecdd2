#!/usr/bin/env bash
# Trains on one or more TPU slices of a GKE cluster with xpk (pip install xpk). The image contains the files of this folder that
# .dockerignore allows; attach a volume that all hosts share to the cluster (xpk storage attach) at /mnt/shared. A run that was preempted
# (143), or lost a host (134, 200) or a store (200), is started again and resumes; a run with an error (1, 2) is not.
# usage: CLUSTER=mine ZONE=us-east5-a TPU=v5p-256 [SLICES=2] bash launch/xpk.sh NAME --config configs/lm.py:lavit_7b --workdir /mnt/shared/runs/lm ...
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1
shift
printf -v arguments ' %q' "$@"
# exec, because a shell in between would not pass SIGTERM on. The usual 30 seconds are not enough to save a checkpoint.
exec xpk workload create --workload "$name" --cluster "$CLUSTER" --zone "$ZONE" --tpu-type "$TPU" --num-slices "${SLICES:-1}" \
  --base-docker-image "${IMAGE:-python:3.11}" --script-dir . --max-restarts "${RESTARTS:-100}" --termination-grace-period-seconds 300 \
  --command "exec env EXTRAS='[tpu,gcs]' bash launch/train.sh$arguments"
