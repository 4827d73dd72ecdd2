#!/usr/bin/env bash
# One run of at most 8 minutes on a machine with one H100 or H200: parity, attention, train steps, and inference beside PyTorch, in one JSON,
# OUT/device.json (OUT: runs/device). It needs JAX with CUDA and PyTorch; nothing is installed there. Packages that the machine lacks are
# carried as wheels in WHEELS: on a machine with a network, `bash benchmarks/device.sh --wheels DIR` downloads those that an image with JAX,
# Flax and transformers usually lacks.
# usage: [OUT=DIR] [WHEELS=DIR] [PYTHON=python3] bash benchmarks/device.sh [--tiny] [--only CASE,...] [--seconds 480]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
missing=(ml_collections portpicker grain array_record tensorboardX)  # as in the constraints

if [ "${1:-}" = --wheels ]; then
  versions=()
  for name in "${missing[@]}"; do versions+=("$(grep "^$name==" launch/constraints.txt)"); done
  exec "$python" -m pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 \
    --platform manylinux_2_28_x86_64 --platform any --dest "$2" "${versions[@]}"
fi

if [ -n "${WHEELS:-}" ]; then
  packages=$(mktemp -d)
  trap 'rm -rf "$packages"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --target "$packages" "$WHEELS"/*.whl
  # Behind the packages of the machine.
  export LAVIT_WHEELS=$packages
fi
export PYTHONPATH=$PWD:${PYTHONPATH:-} PYTHONUNBUFFERED=1
"$python" benchmarks/device.py --out "${OUT:-runs/device}" "$@"
