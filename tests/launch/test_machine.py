"""The scripts for one machine pass on arguments, signals and statuses."""

import os
import shutil
import signal
import sys
import time

import pytest
from launch_scripts import start_script, wait_for, write_script

MAKER = """#!/usr/bin/env bash
[ "$*" = '-m venv --clear .venv' ] || exec {python} "$@"
cp {copy} .venv/bin/python && touch .venv/bin/pip
"""


def test_arguments_are_passed_on_and_the_status_is_returned(checkout):
  run = start_script(checkout, 'train.sh', '--config', 'a b', STATUS='2')
  assert 'train --config a b' in run.communicate()[0]
  assert run.returncode == 2
  run = start_script(checkout, 'train.sh', STATUS='134')
  assert 'lavit: error: another process of this job ended or fell silent' in run.communicate()[0]
  assert run.returncode == 134


one_or_two = pytest.mark.parametrize(
  'script, env', [('train.sh', {}), ('gpus.sh', dict(PROCESSES='2', EXTRAS=''))]
)
ends = pytest.mark.parametrize(
  'end',
  [
    lambda run: run.send_signal(signal.SIGTERM),
    lambda run: os.killpg(run.pid, signal.SIGHUP),
    lambda run: os.killpg(run.pid, signal.SIGINT),
  ],
  ids=['SIGTERM', 'a lost terminal', 'Ctrl-C'],
)


@one_or_two
@ends
def test_signals_are_passed_on_and_the_script_waits(checkout, script, env, end):
  run = start_script(checkout, script, **env)
  for _ in range(int(env.get('PROCESSES', 1))):
    wait_for(run, 'train')
  time.sleep(0.5)  # until the shells have set their traps
  end(run)
  out, _ = run.communicate(timeout=30)
  assert out.count('saved') == int(env.get('PROCESSES', 1))
  assert run.returncode == 143


@one_or_two
@ends
def test_signals_end_an_installation_and_its_children(checkout, tmp_path, script, env, end):
  (tmp_path / 'statuses').mkdir()
  run = start_script(checkout, script, SLOW='yes', STATUSES=str(tmp_path / 'statuses'), **env)
  wait_for(run, 'its child waits')
  end(run)
  out, _ = run.communicate(timeout=10)  # the output is closed: no child is left
  assert 'train' not in out
  assert run.returncode == 143
  assert os.listdir(tmp_path / 'statuses') == (['143'] if script == 'train.sh' else [])


@pytest.mark.parametrize('broken', ['python', 'pip'])
def test_a_venv_without_pip_is_replaced(checkout, tmp_path, broken):
  """The venv has no pip at all, or only its script, the last file of a venv, is missing."""
  copy = shutil.copy(checkout / '.venv' / 'bin' / 'python', tmp_path / 'copy')
  if broken == 'pip':
    (checkout / '.venv' / 'bin' / 'pip').unlink()
  else:
    script = '#!/bin/sh\necho No module named pip >&2\nexit 1\n'
    write_script(checkout / '.venv' / 'bin' / 'python', script)
  script = f'#!/bin/sh\n[ "$2" != venv ] || exit 1\nexec {sys.executable} "$@"\n'
  maker = write_script(tmp_path / 'maker', script)
  run = start_script(checkout, 'train.sh', STATUS='0', PYTHON=str(maker))
  version = '%d.%d' % sys.version_info[:2]
  out, _ = run.communicate()
  assert f'apt install python{version}-venv' in out
  assert 'train' not in out
  assert run.returncode == 2
  write_script(maker, MAKER.format(python=sys.executable, copy=copy))
  run = start_script(checkout, 'train.sh', STATUS='0', PYTHON=str(maker))
  assert 'train' in run.communicate()[0].split()
  assert run.returncode == 0
  assert (checkout / '.venv' / 'bin' / 'pip').exists()


@pytest.mark.parametrize(
  'visible, shares',
  [
    (None, ['0,1', '2,3']),
    ('4,5', ['4', '5']),
    ('GPU-1a, GPU-2b,GPU-3c,GPU-4d', ['GPU-1a,GPU-2b', 'GPU-3c,GPU-4d']),
    ('', ['', '']),
    ('-1', ['-1', '-1']),
  ],
)
def test_processes_share_the_visible_gpus(checkout, visible, shares):
  write_script(
    checkout / '.venv' / 'bin' / 'lavit',
    '#!/bin/sh\necho "${7:-} has ${CUDA_VISIBLE_DEVICES-all}."\n',
  )
  env = {} if visible is None else dict(CUDA_VISIBLE_DEVICES=visible)
  run = start_script(checkout, 'gpus.sh', PROCESSES='2', GPUS='4', EXTRAS='', **env)
  out, _ = run.communicate()
  assert run.returncode == 0
  for i, share in enumerate(shares):
    assert f'{i} has {share}.' in out


@pytest.mark.parametrize('processes', ['0', 'two', '-1', '1.5'])
def test_invalid_numbers_of_processes(checkout, processes):
  run = start_script(checkout, 'gpus.sh', PROCESSES=processes)
  assert run.communicate()[0].startswith('lavit: error: PROCESSES=')
  assert run.returncode == 2


def test_gpus_that_do_not_divide(checkout):
  run = start_script(checkout, 'gpus.sh', PROCESSES='2', GPUS='8', CUDA_VISIBLE_DEVICES='1,2,3')
  assert '3 GPUs cannot be divided equally among PROCESSES=2' in run.communicate()[0]
  assert run.returncode == 2


def test_processes_of_one_machine_are_numbered(checkout):
  run = start_script(
    checkout, 'gpus.sh', '--workdir', 'w', STATUS='0', PROCESSES='2', EXTRAS='', PORT='77'
  )
  out, _ = run.communicate()
  assert run.returncode == 0
  for i in (0, 1):
    assert f'train --coordinator 127.0.0.1:77 --processes 2 --process {i} --workdir w' in out
