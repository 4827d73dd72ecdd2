#!/usr/bin/env bash
# Checks format, lint rules and types of the Python files, in the environment of the tests.
# Further arguments go to `ruff check`.
set -euo pipefail
source "$(dirname "$0")/install.sh" '[test,torch,app,serve,evaluate]'
.venv/bin/ruff format --check .
.venv/bin/ruff check . "$@"
.venv/bin/basedpyright
