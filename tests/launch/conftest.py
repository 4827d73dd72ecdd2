"""A checkout in which the scripts of launch/ run without what they start."""

import shutil

import pytest
from launch_scripts import ROOT, write_script

LAVIT = """#!/usr/bin/env bash
trap 'echo saved; exit 143' TERM
echo "$@"
[ -z "${STATUS:-}" ] || exit "$STATUS"
for _ in {1..200}; do sleep 0.1; done
"""
PYTHON = """#!/usr/bin/env bash
[[ $* = *' pip install '* && -n "${SLOW:-}" ]] || exit 0
sleep 300 &
echo its child waits
wait
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
highest=0
for STATUS in $TASKS; do
  export STATUS
  "$@" || { status=$?; ((status < highest)) || highest=$status; }
done
exit "$highest"
"""


@pytest.fixture
def checkout(tmp_path):
  """The scripts, a .venv whose lavit only prints its arguments, and a machine with $GPUS GPUs."""
  shutil.copytree(ROOT / 'launch', tmp_path / 'launch')
  shutil.copy(ROOT / 'setup.cfg', tmp_path)
  (tmp_path / '.venv' / 'bin').mkdir(parents=True)
  echo = '#!/bin/sh\necho "$@"\n'
  commands = dict(
    gcloud=echo,
    xpk=echo,
    scontrol=echo,
    sudo=echo,
    srun=SRUN,
    **{'nvidia-smi': '#!/bin/sh\nseq ${GPUS:-0}\n'},
  )
  for name, text in dict(python=PYTHON, pip='', lavit=LAVIT, **commands).items():
    write_script(tmp_path / '.venv' / 'bin' / name, text)
  return tmp_path
