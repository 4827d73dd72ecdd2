#!/usr/bin/env bash
# Builds the site of docs/ into .site, with warnings as errors; the argument `serve` serves it at http://127.0.0.1:8000.
set -euo pipefail
source "$(dirname "$0")/install.sh" '[docs]'
export NO_MKDOCS_2_WARNING=1
if [ $# -eq 0 ]; then set -- build --quiet --strict; fi
exec .venv/bin/mkdocs "$@"
