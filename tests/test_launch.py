"""The scripts of launch/ parse, pass shellcheck, and pass on arguments, signals and statuses."""

import configparser
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from lavit_jax.training.config import load_config

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted(
  [*(ROOT / 'launch').glob('*.sh'), *(ROOT / 'launch').glob('*.sbatch'), ROOT / '.ci' / 'run']
)
SHELLCHECK = shutil.which(
  'shellcheck', path=os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ['PATH']])
)
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
MAKER = """#!/usr/bin/env bash
[ "$*" = '-m venv --clear .venv' ] || exec {python} "$@"
cp {copy} .venv/bin/python && touch .venv/bin/pip
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
WORKER = """#!/usr/bin/env bash
[[ $* = *' ssh mine --zone z --worker=all --command '* ]] && cd "$WORKER" && exec bash -c "${@: -1}"
"""


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
  subprocess.run(['bash', '-n', script], check=True)


@pytest.mark.skipif(
  SHELLCHECK is None, reason="no shellcheck; it comes with pip install -e '.[test]'"
)
@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
  result = subprocess.run(
    [SHELLCHECK, script.relative_to(ROOT)], cwd=ROOT, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stdout


def test_launchers_share_one_entry():
  others = {'demo.sh', 'test.sh', 'lint.sh', 'docs.sh', 'install.sh', 'run', 'train.sh'}
  launchers = {path.name for path in SCRIPTS} - others
  assert launchers == {
    'detached.sh',
    'gpus.sh',
    'multislice.sh',
    'slurm.sbatch',
    'tpu_pod.sh',
    'xpk.sh',
  }
  for name in launchers:
    text = (ROOT / 'launch' / name).read_text()
    entry = 'detached' if name == 'tpu_pod.sh' else 'train'
    assert f'launch/{entry}.sh' in text, name
    assert '# usage: ' in text, name
    assert len(text.splitlines()) < 45, name


def test_launchers_install_bucket_support():
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  assert setup['options.extras_require']['gcs'].split() == ['gcsfs']
  pins = dict(
    line.split('==')
    for line in (ROOT / 'launch' / 'constraints.txt').read_text().splitlines()
    if '==' in line
  )
  assert {'gcsfs', 'fsspec', 'aiohttp', 'google-auth', 'google-cloud-storage'} <= set(pins)
  for name, extras in {
    'gpus.sh': '[cuda,gcs]',
    'slurm.sbatch': '[cuda,gcs]',
    'tpu_pod.sh': '[tpu,gcs]',
    'xpk.sh': '[tpu,gcs]',
  }.items():
    assert extras in (ROOT / 'launch' / name).read_text(), name


def test_an_image_holds_the_files_for_training_alone():
  lines = (ROOT / '.dockerignore').read_text().splitlines()
  first, *patterns = [line for line in lines if line and not line.startswith('#')]
  included = {pattern[1:] for pattern in patterns if pattern.startswith('!')}
  assert first == '*'
  assert included == {
    'README.md',
    'configs',
    'launch',
    'lavit_jax',
    'pyproject.toml',
    'setup.cfg',
  }
  assert all((ROOT / name).exists() for name in included)


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


def write_script(path, text):
  path.write_text(text)
  path.chmod(0o755)
  return path


def start_script(checkout, script, *arguments, **env):
  env = {'PYTHON': sys.executable, 'PATH': f'{checkout}/.venv/bin:{os.environ["PATH"]}', **env}
  env = {
    name: value
    for name, value in os.environ.items()
    if name not in ('REPOSITORY', 'CUDA_VISIBLE_DEVICES')
  } | env
  # A shell has its processes in the background ignore these signals. They are default here, and so
  # in the script, without a `preexec_fn`: that would copy the memory map of all tests.
  ours = {
    number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)
  }
  try:
    return subprocess.Popen(
      ['bash', checkout / 'launch' / script, *arguments],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
    )
  finally:
    for number, handler in ours.items():
      signal.signal(number, handler)


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


def test_commands_of_a_cluster(checkout):
  run = start_script(
    checkout, 'xpk.sh', 'mine', '--config', 'a b', CLUSTER='c', ZONE='z', TPU='v5p-128'
  )
  out, _ = run.communicate()
  assert '--num-slices 1' in out
  assert r"--command exec env EXTRAS='[tpu,gcs]' bash launch/train.sh --config a\ b" in out
  commit(checkout)
  out, _ = start_script(
    checkout, 'multislice.sh', 'mine', '--config', 'a b', SLICES='2', ZONE='z', REPOSITORY='r'
  ).communicate()
  assert 'ssh mine-0 --zone z --worker=all' in out
  assert 'ssh mine-1' in out
  assert out.count(r'bash launch/detached.sh --config a\ b') == 2


def commit(checkout):
  git = ['git', '-C', str(checkout), '-c', 'user.name=x', '-c', 'user.email=x']
  for command in (['init', '--quiet'], ['add', '--all'], ['commit', '--quiet', '--message', 'x']):
    subprocess.run([*git, *command], check=True)


@pytest.mark.parametrize(
  'tasks, status, queued_again',
  [
    ('143 143', 143, True),
    ('134 200', 200, True),
    ('137 134', 137, True),
    ('0 0', 0, False),
    ('2 200', 2, False),
    ('134 1', 1, False),
  ],
)
def test_slurm_queues_a_job_again_unless_it_has_an_error(checkout, tasks, status, queued_again):
  env = dict(SLURM_SUBMIT_DIR=str(checkout), SLURM_JOB_ID='7', TASKS=tasks)
  run = start_script(checkout, 'slurm.sbatch', **env)
  assert ('requeue 7' in run.communicate()[0]) == queued_again
  assert run.returncode == status
  run = start_script(checkout, 'slurm.sbatch', SLURM_RESTART_COUNT='3', RESTARTS='3', **env)
  assert 'requeue' not in run.communicate()[0]
  assert run.returncode == status


@pytest.fixture
def pod(checkout, tmp_path_factory):
  """pod(argument, ...): starts launch/tpu_pod.sh for a pod with one worker."""
  (checkout / '.venv' / 'bin' / 'gcloud').write_text(WORKER)
  commit(checkout)
  worker = tmp_path_factory.mktemp('worker')
  runs = []

  def start(*arguments, **env):
    runs.append(
      start_script(
        checkout,
        'tpu_pod.sh',
        'mine',
        *arguments,
        ZONE='z',
        REPOSITORY=str(checkout),
        WORKER=str(worker),
        **env,
      )
    )
    return runs[-1]

  yield start
  start('stop').communicate(timeout=30)
  for run in runs:
    run.kill()


def test_training_on_a_pod_outlives_the_terminal(pod):
  first = pod('--config', 'a b')
  wait_for(first, 'train --config a b')
  os.killpg(first.pid, signal.SIGKILL)  # the connection is lost
  again = pod('--config', 'a b')
  other = pod('--config', 'c')
  no_arguments = pod()
  for run in (again, no_arguments):
    wait_for(run, 'train --config a b')
  assert 'is training with --config a\\ b; stop that first' in other.communicate(timeout=30)[0]
  assert other.returncode == 2
  stop = pod('stop')
  for run in (again, no_arguments, stop):
    assert 'saved' in run.communicate(timeout=30)[0]
    assert run.returncode == 143
  later = pod()
  assert 'saved' in later.communicate(timeout=30)[0]
  assert later.returncode == 143


def test_a_pod_returns_the_status(pod):
  for status in (0, 200):
    run = pod('--config', 'a', STATUS=str(status))
    assert 'train --config a' in run.communicate(timeout=30)[0]
    assert run.returncode == status


def test_a_pod_is_stopped_during_the_installation_and_started_again(pod):
  first = pod('--config', 'a', SLOW='yes')
  wait_for(first, 'its child waits')
  stop = pod('stop')
  for run in (first, stop):
    run.communicate(timeout=30)
    assert run.returncode == 143
  again = pod('--config', 'a', STATUS='0')
  assert 'train --config a' in again.communicate(timeout=30)[0]
  assert again.returncode == 0


def test_a_checkout_without_origin_leaves_the_workers_alone(checkout):
  commit(checkout)
  run = start_script(checkout, 'tpu_pod.sh', 'mine', '--config', 'a', ZONE='z')
  out, _ = run.communicate()
  assert out.startswith('lavit: error: git has no remote named origin')
  assert out.count('\n') == 1
  assert run.returncode == 2
  run = start_script(checkout, 'tpu_pod.sh', 'mine', 'stop', ZONE='z')  # needs no origin
  assert 'bash launch/detached.sh stop' in run.communicate()[0]
  assert run.returncode == 0


@pytest.mark.parametrize('script', ['tpu_pod.sh', 'multislice.sh', 'xpk.sh', 'slurm.sbatch'])
def test_the_config_of_a_usage_line_fits_its_machines(script):
  text = (ROOT / 'launch' / script).read_text()
  if script == 'slurm.sbatch':
    devices = math.prod(
      int(re.search(rf'--{name}=(\d+)', text)[1]) for name in ('nodes', 'gpus-per-node')
    )
  else:
    (devices,) = {int(cores) // 2 for cores in re.findall(r'v5p-(\d+)', text)}  # two cores a chip
  for config in re.findall(r'configs/\w+\.py:\w+', text):
    mesh = load_config(f'{ROOT}/{config}').mesh
    assert devices % (mesh.fsdp * mesh.tensor) == 0, f'{config} on {devices}'


def wait_for(run, text):
  """Reads the output until a line has `text`."""
  line = run.stdout.readline()
  while text not in line:
    assert line, f'the script ended without {text!r}'
    line = run.stdout.readline()
