"""The scripts of launch/: they parse, shellcheck has nothing to say, and what they start gets its arguments and its signals."""

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
cp {made} .venv/bin/python && touch .venv/bin/pip
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
def test_it_parses(script):
  subprocess.run(['bash', '-n', script], check=True)


@pytest.mark.skipif(
  SHELLCHECK is None, reason="no shellcheck; it comes with pip install -e '.[test]'"
)
@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
  told = subprocess.run(
    [SHELLCHECK, script.relative_to(ROOT)], cwd=ROOT, capture_output=True, text=True
  )
  assert told.returncode == 0, told.stdout


def test_those_that_train_share_one_entry():
  here = {'demo.sh', 'test.sh', 'lint.sh', 'docs.sh', 'install.sh', 'run', 'train.sh'}
  ours = {path.name for path in SCRIPTS} - here
  assert ours == {'detached.sh', 'gpus.sh', 'multislice.sh', 'slurm.sbatch', 'tpu_pod.sh', 'xpk.sh'}
  for name in ours:
    text = (ROOT / 'launch' / name).read_text()
    assert (
      f'launch/{"detached" if name == "tpu_pod.sh" else "train"}.sh' in text and '# usage: ' in text
    ), name
    assert len(text.splitlines()) < 45, name


def test_they_install_what_opens_buckets():
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


def test_an_image_holds_what_training_needs_and_nothing_else():
  first, *lines = [
    line
    for line in (ROOT / '.dockerignore').read_text().splitlines()
    if line and not line.startswith('#')
  ]
  let_in = {line[1:] for line in lines if line.startswith('!')}
  assert first == '*' and let_in == {
    'README.md',
    'configs',
    'launch',
    'lavit_jax',
    'pyproject.toml',
    'setup.cfg',
  }
  assert all((ROOT / name).exists() for name in let_in)


@pytest.fixture
def checkout(tmp_path):
  """The scripts beside a .venv whose lavit only says what it was given, and a machine of GPUS."""
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
    put(tmp_path / '.venv' / 'bin' / name, text)
  return tmp_path


def put(path, text):
  path.write_text(text)
  path.chmod(0o755)
  return path


def begin(checkout, script, *arguments, **env):
  env = {'PYTHON': sys.executable, 'PATH': f'{checkout}/.venv/bin:{os.environ["PATH"]}', **env}
  env = {
    name: value
    for name, value in os.environ.items()
    if name not in ('REPOSITORY', 'CUDA_VISIBLE_DEVICES')
  } | env
  return subprocess.Popen(
    ['bash', checkout / 'launch' / script, *arguments],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
    preexec_fn=heed_signals,
  )


def heed_signals():
  """Also where the tests run in the background, whose shell has them ignored."""
  for each in (signal.SIGINT, signal.SIGHUP):
    signal.signal(each, signal.SIG_DFL)


def test_arguments_arrive_whole_and_the_status_comes_back(checkout):
  run = begin(checkout, 'train.sh', '--config', 'a b', STATUS='2')
  assert 'train --config a b' in run.communicate()[0] and run.returncode == 2
  run = begin(checkout, 'train.sh', STATUS='134')
  assert (
    'lavit: error: another process of this job ended or fell silent' in run.communicate()[0]
    and run.returncode == 134
  )


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
def test_signals_go_through_and_are_waited_for(checkout, script, env, end):
  run = begin(checkout, script, **env)
  for _ in range(int(env.get('PROCESSES', 1))):
    until(run, 'train')
  time.sleep(0.5)  # until the shells have their traps
  end(run)
  out, _ = run.communicate(timeout=30)
  assert out.count('saved') == int(env.get('PROCESSES', 1)) and run.returncode == 143


@one_or_two
@ends
def test_signals_end_an_installation_and_its_children(checkout, tmp_path, script, env, end):
  (tmp_path / 'statuses').mkdir()
  run = begin(checkout, script, SLOW='yes', STATUSES=str(tmp_path / 'statuses'), **env)
  until(run, 'its child waits')
  end(run)
  assert (
    'train' not in run.communicate(timeout=10)[0] and run.returncode == 143
  )  # its output is closed: nothing lives on
  assert os.listdir(tmp_path / 'statuses') == (['143'] if script == 'train.sh' else [])


@pytest.mark.parametrize('broken', ['python', 'pip'])
def test_a_venv_without_pip_is_made_again(checkout, tmp_path, broken):
  """Either nothing of it is there, or the script that is its last file is not."""
  made = shutil.copy(checkout / '.venv' / 'bin' / 'python', tmp_path / 'made')
  if broken == 'pip':
    (checkout / '.venv' / 'bin' / 'pip').unlink()
  else:
    put(checkout / '.venv' / 'bin' / 'python', '#!/bin/sh\necho No module named pip >&2\nexit 1\n')
  maker = put(
    tmp_path / 'maker', '#!/bin/sh\n[ "$2" != venv ] || exit 1\nexec %s "$@"\n' % sys.executable
  )
  run = begin(checkout, 'train.sh', STATUS='0', PYTHON=str(maker))
  version = '%d.%d' % sys.version_info[:2]
  assert (
    f'apt install python{version}-venv' in (out := run.communicate()[0])
    and 'train' not in out
    and run.returncode == 2
  )
  put(maker, MAKER.format(python=sys.executable, made=made))
  run = begin(checkout, 'train.sh', STATUS='0', PYTHON=str(maker))
  assert (
    'train' in run.communicate()[0].split()
    and run.returncode == 0
    and (checkout / '.venv' / 'bin' / 'pip').exists()
  )


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
  put(
    checkout / '.venv' / 'bin' / 'lavit',
    '#!/bin/sh\necho "${7:-} has ${CUDA_VISIBLE_DEVICES-all}."\n',
  )
  env = {} if visible is None else dict(CUDA_VISIBLE_DEVICES=visible)
  run = begin(checkout, 'gpus.sh', PROCESSES='2', GPUS='4', EXTRAS='', **env)
  out, _ = run.communicate()
  assert run.returncode == 0 and [f'{i} has {share}.' in out for i, share in enumerate(shares)] == [
    True,
    True,
  ], out


@pytest.mark.parametrize('processes', ['0', 'two', '-1', '1.5'])
def test_a_number_of_processes_that_is_none(checkout, processes):
  run = begin(checkout, 'gpus.sh', PROCESSES=processes)
  assert run.communicate()[0].startswith('lavit: error: PROCESSES=') and run.returncode == 2


def test_gpus_that_do_not_divide(checkout):
  run = begin(checkout, 'gpus.sh', PROCESSES='2', GPUS='8', CUDA_VISIBLE_DEVICES='1,2,3')
  assert (
    '3 GPUs cannot be shared out to PROCESSES=2 alike' in run.communicate()[0]
    and run.returncode == 2
  )


def test_processes_of_one_machine_are_numbered(checkout):
  run = begin(
    checkout, 'gpus.sh', '--workdir', 'w', STATUS='0', PROCESSES='2', EXTRAS='', PORT='77'
  )
  out, _ = run.communicate()
  assert run.returncode == 0
  for i in (0, 1):
    assert f'train --coordinator 127.0.0.1:77 --processes 2 --process {i} --workdir w' in out


def test_what_a_cluster_is_told(checkout):
  run = begin(checkout, 'xpk.sh', 'mine', '--config', 'a b', CLUSTER='c', ZONE='z', TPU='v5p-128')
  assert (
    '--num-slices 1' in (out := run.communicate()[0])
    and r"--command exec env EXTRAS='[tpu,gcs]' bash launch/train.sh --config a\ b" in out
  )
  commit(checkout)
  out, _ = begin(
    checkout, 'multislice.sh', 'mine', '--config', 'a b', SLICES='2', ZONE='z', REPOSITORY='r'
  ).communicate()
  assert (
    'ssh mine-0 --zone z --worker=all' in out
    and 'ssh mine-1' in out
    and out.count(r'bash launch/detached.sh --config a\ b') == 2
  )


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
)  # what is our fault is so again
def test_slurm_queues_again_what_a_restart_may_mend(checkout, tasks, status, queued_again):
  env = dict(SLURM_SUBMIT_DIR=str(checkout), SLURM_JOB_ID='7', TASKS=tasks)
  run = begin(checkout, 'slurm.sbatch', **env)
  assert ('requeue 7' in run.communicate()[0]) == queued_again and run.returncode == status
  run = begin(checkout, 'slurm.sbatch', SLURM_RESTART_COUNT='3', RESTARTS='3', **env)
  assert 'requeue' not in run.communicate()[0] and run.returncode == status


@pytest.fixture
def pod(checkout, tmp_path_factory):
  """pod(argument ...) -> launch/tpu_pod.sh, running, to whose one worker gcloud leads."""
  (checkout / '.venv' / 'bin' / 'gcloud').write_text(WORKER)
  commit(checkout)
  worker, runs = tmp_path_factory.mktemp('worker'), []

  def start(*arguments, **env):
    runs.append(
      begin(
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
  until(first, 'train --config a b')
  os.killpg(first.pid, signal.SIGKILL)  # with the connection
  again, other, alone = pod('--config', 'a b'), pod('--config', 'c'), pod()
  for run in (again, alone):
    until(run, 'train --config a b')
  assert (
    'is training with --config a\\ b; stop that first' in other.communicate(timeout=30)[0]
    and other.returncode == 2
  )
  stop = pod('stop')
  for run in (again, alone, stop):
    assert 'saved' in run.communicate(timeout=30)[0] and run.returncode == 143
  later = pod()
  assert 'saved' in later.communicate(timeout=30)[0] and later.returncode == 143


def test_the_status_comes_back_from_a_pod(pod):
  for status in (0, 200):
    run = pod('--config', 'a', STATUS=str(status))
    assert 'train --config a' in run.communicate(timeout=30)[0] and run.returncode == status


def test_a_pod_is_stopped_while_it_installs_and_started_again(pod):
  first = pod('--config', 'a', SLOW='yes')
  until(first, 'its child waits')
  stop = pod('stop')
  for run in (first, stop):
    run.communicate(timeout=30)
    assert run.returncode == 143
  again = pod('--config', 'a', STATUS='0')
  assert 'train --config a' in again.communicate(timeout=30)[0] and again.returncode == 0


def test_a_checkout_without_origin_leaves_the_workers_alone(checkout):
  commit(checkout)
  run = begin(checkout, 'tpu_pod.sh', 'mine', '--config', 'a', ZONE='z')
  out, _ = run.communicate()
  assert (
    out.startswith('lavit: error: git knows no origin')
    and out.count('\n') == 1
    and run.returncode == 2
  )
  run = begin(checkout, 'tpu_pod.sh', 'mine', 'stop', ZONE='z')  # which needs none
  assert 'bash launch/detached.sh stop' in run.communicate()[0] and run.returncode == 0


@pytest.mark.parametrize('script', ['tpu_pod.sh', 'multislice.sh', 'xpk.sh', 'slurm.sbatch'])
def test_the_page_of_a_usage_line_fits_its_machines(script):
  text = (ROOT / 'launch' / script).read_text()
  if script == 'slurm.sbatch':
    devices = math.prod(
      int(re.search(rf'--{name}=(\d+)', text)[1]) for name in ('nodes', 'gpus-per-node')
    )
  else:
    (devices,) = {int(cores) // 2 for cores in re.findall(r'v5p-(\d+)', text)}  # two cores a chip
  for page in re.findall(r'configs/\w+\.py:\w+', text):
    mesh = load_config(f'{ROOT}/{page}').mesh
    assert devices % (mesh.fsdp * mesh.tensor) == 0, f'{page} on {devices}'


def until(run, text):
  while text not in (line := run.stdout.readline()):
    assert line, f'it ended without {text!r}'
