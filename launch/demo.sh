#!/usr/bin/env bash
# Installs lavit_jax in .venv and runs the demo of the tiny checkpoint; further arguments go to `lavit demo`.
set -euo pipefail
source "$(dirname "$0")/install.sh" ''
exec .venv/bin/lavit demo "$@"
