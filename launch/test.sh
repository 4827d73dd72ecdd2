#!/usr/bin/env bash
# Installs what the tests need in .venv and runs them; further arguments go to pytest (e.g. -m slow, -k vit).
# Two processes, each with whole files, since the fixtures of a file are what takes time.
set -euo pipefail
source "$(dirname "$0")/install.sh" '[test,torch,app]'
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
JAX_COMPILATION_CACHE_DIR=$(mktemp -d) # of this run: what one file has compiled, another need not
trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR"' EXIT
export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5
case " $* " in *" -m "*) ;; *) set -- -m 'not slow' "$@" ;; esac
.venv/bin/python -m pytest --numprocesses=2 --dist=loadfile "$@"
