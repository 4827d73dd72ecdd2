#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU VM pod. Needs gcloud and a pod, such as
#   gcloud compute tpus tpu-vm create NAME --zone ZONE --accelerator-type v5p-256 --version v2-alpha-tpuv5
# The workers fetch the commit that is checked out here from `origin`, or from REPOSITORY: push it first. An ssh address (git@...) needs a
# key on each worker; REPOSITORY=https://... does not. The run does not depend on this terminal: Ctrl-C ends only the output, and the same
# command, or NAME alone, shows it again. NAME stop makes the run save and end.
# usage: ZONE=us-east5-a bash launch/tpu_pod.sh NAME [stop | --config configs/lm.py:lavit_7b --workdir /mnt/shared/runs/lm ...]
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1
shift
commit=$(git rev-parse HEAD)
repository=${REPOSITORY:-$(git remote get-url origin 2>/dev/null)} || [[ ${1:-stop} = stop ]] || {
  echo 'lavit: error: git has no remote named origin; push the commit to a repository that the workers can read, and set REPOSITORY to its address' >&2
  exit 2
}
printf -v repository %q "$repository"
arguments=''
[ $# = 0 ] || printf -v arguments ' %q' "$@"
git diff --quiet HEAD || echo 'lavit: the workers do not get uncommitted changes' >&2

# During a run, its files are not changed. TPU VMs come with Python 3.10.
prepare="
  if [ ! -e launch/detached.sh ] || ! bash launch/detached.sh running; then
    git fetch --quiet $repository '+refs/heads/*:refs/remotes/origin/*'
    git checkout --quiet --detach $commit || { echo 'lavit: error: push the commit first' >&2; exit 2; }
    python3.11 -c 'import ensurepip' 2>/dev/null ||
      { sudo apt-get -qq update && sudo apt-get -qq -o DPkg::Lock::Timeout=300 install python3.11-venv; } >&2
  fi"
case "${1:-}" in '' | stop) prepare='' ;; esac
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$ZONE" --worker=all --command "
  set -e
  [ -d lavit_jax ] || git clone --quiet $repository lavit_jax
  cd lavit_jax
  $prepare
  EXTRAS='[tpu,gcs]' bash launch/detached.sh$arguments"
