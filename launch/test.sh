#!/usr/bin/env bash
# Installs the requirements of the tests in .venv and runs the tests; further arguments go to pytest (e.g. -m slow, -k vit).
# There are two processes, and each runs whole files, because the fixtures of a file take most of the time.
set -euo pipefail
source "$(dirname "$0")/install.sh" '[test,torch,app]'
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
case " $* " in *" -m "*) ;; *) set -- -m 'not slow' "$@" ;; esac
exec .venv/bin/python -m pytest --numprocesses=2 --dist=loadfile "$@"
