#!/usr/bin/env bash
# Installs what the tests need in .venv and runs them; further arguments go to pytest (e.g. -m slow, -k vit).
#
# The default tests compile much and run little, so XLA compiles them without optimising, each program in one piece (both
# cores are busy with tests); with -m, as users do.
# Two processes take whole files, since the fixtures of a file are what takes time, in the order of tests/conftest.py;
# with -k one process starts sooner.
set -euo pipefail
source "$(dirname "$0")/install.sh" '[test,torch,app,serve,evaluate]'
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
case " $* " in
  *" -m "*) ;;
  *)
    set -- -m 'not slow' "$@"
    quick='--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
    quick+=' --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE --xla_cpu_parallel_codegen_split_count=1'
    export XLA_FLAGS="$quick ${XLA_FLAGS:-}"
    ;;
esac
case " $* " in *" -k "*) ;; *) set -- --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@" ;; esac
exec .venv/bin/python -m pytest "$@"
