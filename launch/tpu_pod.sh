#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU VM pod, which find each other by themselves. Needs gcloud and a pod, such as
#   gcloud compute tpus tpu-vm create NAME --zone ZONE --accelerator-type v5p-128 --version v2-alpha-tpuv5
# The workers fetch this branch as it was pushed. Ctrl-C here leaves them running; start it again and the old run saves first.
# usage: ZONE=us-east5-a bash launch/tpu_pod.sh NAME --config configs/lm.py:lavit_7b --workdir /mnt/shared/runs/lm [--config.KEY=VALUE ...]
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1
shift
branch=$(git rev-parse --abbrev-ref HEAD)
repository=${REPOSITORY:-$(git remote get-url origin)}
printf -v arguments ' %q' "$@"

# [l]avit: else the shell that looks for it would find itself.
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$ZONE" --worker=all --command "
  set -e
  if pkill -TERM -f '[l]avit train'; then while pgrep -f '[l]avit train' >/dev/null; do sleep 1; done; fi
  [ -d lavit_jax ] || git clone --quiet $repository lavit_jax
  cd lavit_jax
  git fetch --quiet origin $branch && git checkout --quiet FETCH_HEAD
  EXTRAS='[tpu]' bash launch/train.sh$arguments"
