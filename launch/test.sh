#!/usr/bin/env bash
# Installs what the tests need in .venv and runs them; further arguments go to pytest (e.g. -m slow, -k vit).
# Two processes, each with whole files, since the fixtures of a file are what takes time.
set -euo pipefail
source "$(dirname "$0")/install.sh" '[test,torch,app]'
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
case " $* " in *" -m "*) ;; *) set -- -m 'not slow' "$@" ;; esac
exec .venv/bin/python -m pytest --numprocesses=2 --dist=loadfile "$@"
