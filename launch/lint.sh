#!/usr/bin/env bash
# Checks the format and the imports of all Python files, in the environment of the tests; further arguments go to `ruff check`.
set -euo pipefail
source "$(dirname "$0")/install.sh" '[test,torch,app]'
.venv/bin/ruff format --check .
exec .venv/bin/ruff check . --select E9,F,I "$@"
