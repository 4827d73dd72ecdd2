"""The scripts of launch/: they parse, shellcheck has nothing to say, and what they start gets its arguments and its signals."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted([*(ROOT / 'launch').glob('*.sh'), *(ROOT / 'launch').glob('*.sbatch'), ROOT / '.ci' / 'run'])
SHELLCHECK = shutil.which('shellcheck', path=os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ['PATH']]))
LAVIT = """#!/usr/bin/env bash
echo "$@"
trap 'echo saved; exit 143' TERM
[ -z "${STATUS:-}" ] || exit "$STATUS"
for _ in {1..200}; do sleep 0.1; done
"""


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_it_parses(script):
  subprocess.run(['bash', '-n', script], check=True)


@pytest.mark.skipif(SHELLCHECK is None, reason="no shellcheck; it comes with pip install -e '.[test]'")
@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
  told = subprocess.run([SHELLCHECK, script.relative_to(ROOT)], cwd=ROOT, capture_output=True, text=True)
  assert told.returncode == 0, told.stdout


def test_those_that_train_share_one_entry():
  ours = {path.name for path in SCRIPTS} - {'demo.sh', 'test.sh', 'install.sh', 'run', 'train.sh'}
  assert ours == {'gpus.sh', 'multislice.sh', 'slurm.sbatch', 'tpu_pod.sh', 'xpk.sh'}
  for name in ours:
    text = (ROOT / 'launch' / name).read_text()
    assert 'launch/train.sh' in text and '# usage: ' in text and len(text.splitlines()) < 45, name


@pytest.fixture
def checkout(tmp_path):
  """The scripts beside a .venv whose lavit only says what it was given."""
  shutil.copytree(ROOT / 'launch', tmp_path / 'launch')
  shutil.copy(ROOT / 'setup.cfg', tmp_path)
  (tmp_path / '.venv' / 'bin').mkdir(parents=True)
  for name, text in dict(python='#!/bin/sh\n', lavit=LAVIT, gcloud='#!/bin/sh\necho "$@"\n', xpk='#!/bin/sh\necho "$@"\n').items():
    (tmp_path / '.venv' / 'bin' / name).write_text(text)
    (tmp_path / '.venv' / 'bin' / name).chmod(0o755)
  return tmp_path


def begin(checkout, script, *arguments, **env):
  env = {**os.environ, 'PYTHON': sys.executable, 'PATH': f'{checkout}/.venv/bin:{os.environ["PATH"]}', **env}
  return subprocess.Popen(['bash', checkout / 'launch' / script, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_arguments_arrive_whole_and_the_status_comes_back(checkout):
  run = begin(checkout, 'train.sh', '--config', 'a b', STATUS='2')
  assert 'train --config a b' in run.communicate()[0] and run.returncode == 2
  run = begin(checkout, 'train.sh', STATUS='134')
  assert 'lavit: error: another process of this job ended or fell silent' in run.communicate()[0] and run.returncode == 134


@pytest.mark.parametrize('script, env', [('train.sh', {}), ('gpus.sh', dict(PROCESSES='2', EXTRAS=''))])
def test_sigterm_goes_through_and_is_waited_for(checkout, script, env):
  run = begin(checkout, script, **env)
  time.sleep(3)
  run.send_signal(signal.SIGTERM)
  out, _ = run.communicate(timeout=30)
  assert out.count('saved') == int(env.get('PROCESSES', 1)) and run.returncode == 143


def test_processes_of_one_machine_are_numbered(checkout):
  run = begin(checkout, 'gpus.sh', '--workdir', 'w', STATUS='0', PROCESSES='2', EXTRAS='', PORT='77')
  out, _ = run.communicate()
  assert run.returncode == 0
  for i in (0, 1):
    assert f'train --coordinator 127.0.0.1:77 --processes 2 --process {i} --workdir w' in out


def test_what_a_cluster_is_told(checkout):
  run = begin(checkout, 'xpk.sh', 'mine', '--config', 'a b', CLUSTER='c', ZONE='z', TPU='v5p-128')
  assert "--num-slices 1" in (out := run.communicate()[0]) and r"--command EXTRAS='[tpu]' bash launch/train.sh --config a\ b" in out
  git = ['git', '-C', str(checkout), '-c', 'user.name=x', '-c', 'user.email=x']
  for command in (['init', '--quiet'], ['commit', '--quiet', '--allow-empty', '--message', 'x']):
    subprocess.run([*git, *command], check=True)
  out, _ = begin(checkout, 'multislice.sh', 'mine', '--config', 'a b', SLICES='2', ZONE='z', REPOSITORY='r').communicate()
  assert 'ssh mine-0 --zone z --worker=all' in out and 'ssh mine-1' in out and out.count(r'bash launch/train.sh --config a\ b') == 2
