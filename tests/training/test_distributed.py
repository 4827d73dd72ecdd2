"""Jobs of several processes on loopback have the losses of one process.

Whichever process is killed, and on whatever they are continued.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import nano
import numpy as np
import pytest
from nano import finish, launch, launch_job, rows, until
from numbered_images import sample, write_tar

from lavit_jax.errors import Unreachable, UserError
from lavit_jax.training import distributed
from lavit_jax.weights.store import folder

nano.install()
STEPS = dict(num_steps=16, checkpoint_every=3, eval_every=8, eval_batches=1, picture_every=16)
TIMEOUT = 5  # seconds until a silent process counts as lost


@pytest.fixture
def start_job(running):
  """start_job(stage, workdir, processes, devices of each, key=value ...) -> the processes."""

  def begin(stage, workdir, count, devices, **changes):
    running.extend(job := launch_job(stage, workdir, count, devices, TIMEOUT, **changes))
    return job

  return begin


@pytest.fixture(scope='session')
def alone(tmp_path_factory):
  """The run of one process on two devices."""
  workdir = tmp_path_factory.mktemp('alone')
  finish(launch('encoder', workdir, 2, **STEPS))
  return workdir


@pytest.fixture(scope='session')
def killed(tmp_path_factory):
  """A run of two processes, of which one was killed when two checkpoints were whole.

  It is (workdir, the output of the other, its status, the seconds that it took to end).
  """
  return kill_on_the_way('encoder', tmp_path_factory.mktemp('killed'), **STEPS)


def kill_on_the_way(stage, workdir, **options):
  job = launch_job(stage, workdir, 2, 1, TIMEOUT, **options)
  until(job[0], workdir, 7)
  while len(whole_checkpoints(workdir)) < 2:
    assert job[0].poll() is None, job[0].communicate()[0]
    time.sleep(0.01)
  job[1].kill()
  start = time.monotonic()
  out, _ = job[0].communicate(timeout=60)
  job[1].communicate()
  return workdir, out, job[0].returncode, time.monotonic() - start


def whole_checkpoints(workdir):
  """Their steps, in order."""
  return sorted(
    int(folder.name) for folder in (workdir / 'checkpoints').iterdir() if folder.name.isdigit()
  )


def losses(workdir):
  return [[row['step'], row.get('loss', row.get('heldout/loss'))] for row in rows(workdir)]


def test_two_processes_have_the_losses_of_one(start_job, alone, tmp_path):
  first, second = map(finish, start_job('encoder', tmp_path, 2, 1, profile='2:3', **STEPS))
  assert len(list((tmp_path / 'profile').rglob('*.xplane.pb'))) == 1
  assert 'step 16/16' in first and 'step' not in second  # one of them speaks
  assert len(losses(tmp_path)) == 18
  np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=1e-5)
  assert (tmp_path / 'pictures' / 'encoder_0000016.png').exists()
  exports = [folder.load_params(run / 'export', variant='nano') for run in (tmp_path, alone)]
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), *exports)


def test_a_killed_process_ends_the_others(killed):
  _, out, status, seconds = killed
  assert status in (Unreachable.status, -signal.SIGABRT)
  assert 'process 0 of 2 has lost another one' in out or 'another task died' in out
  assert seconds < TIMEOUT + 10


@pytest.mark.slow
def test_started_again_they_repeat_themselves_bit_for_bit(start_job, alone, killed, tmp_path):
  """A half-written folder is no checkpoint."""
  shutil.copytree(killed[0], tmp_path, dirs_exist_ok=True)
  half = tmp_path / 'checkpoints' / '15.orbax-checkpoint-tmp-7'
  shutil.copytree(next((tmp_path / 'checkpoints').glob('[0-9]*')) / 'config', half / 'config')
  before = losses(tmp_path)
  first, _ = map(finish, start_job('encoder', tmp_path, 2, 1, **STEPS))
  assert 'continuing from step' in first and not half.exists()
  after = losses(tmp_path)
  assert before == after[: len(before)] and len(after) == 18
  np.testing.assert_allclose(after, losses(alone), rtol=1e-5)


@pytest.mark.parametrize(
  'count, devices, mesh',
  [
    (1, 2, dict(mesh__data=1, mesh__fsdp=1, mesh__tensor=2)),
    pytest.param(1, 1, {}, marks=pytest.mark.slow),
    pytest.param(4, 1, {}, marks=pytest.mark.slow),
    pytest.param(4, 2, dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2), marks=pytest.mark.slow),
    pytest.param(2, 2, dict(mesh__data=2, mesh__fsdp=1, mesh__tensor=2), marks=pytest.mark.slow),
    # Two processes read the same rows.
    pytest.param(4, 1, dict(mesh__data=2, mesh__fsdp=1, mesh__tensor=2), marks=pytest.mark.slow),
  ],
)
def test_another_number_of_processes_or_another_mesh_goes_on(
  start_job, alone, killed, tmp_path, count, devices, mesh
):
  shutil.copytree(killed[0], tmp_path, dirs_exist_ok=True)
  if count == 1:
    out = finish(launch('encoder', tmp_path, devices, **STEPS, **mesh))
  else:
    out, *_ = map(finish, start_job('encoder', tmp_path, count, devices, **STEPS, **mesh))
  first = int(out.split('continuing from step ')[1].split()[0])
  assert 3 <= first < 16
  now = losses(tmp_path)
  before = losses(alone)
  assert [step for step, _ in now] == [step for step, _ in before]
  # Another batch would be off by a hundredth at least.
  np.testing.assert_allclose(now[: first + 3], before[: first + 3], rtol=1e-4)
  np.testing.assert_allclose(now, before, rtol=0.05)  # rounding grows as it trains


@pytest.fixture(scope='session')
def on_tars(tmp_path_factory):
  """(options of a run on tars, the run of one process, a run of two of which one was killed)."""
  tars = tmp_path_factory.mktemp('tars')
  for t in range(5):
    write_tar(
      tars / f'{t}.tar',
      [(f'bad{t}', {'png': b'no picture'})] + [sample(i) for i in range(20 * t, 20 * t + 20)],
    )
  source = dict(format='tars', path=f'{tars}/*.tar', window=32)
  options = dict(
    num_steps=16, checkpoint_every=3, data__sources=(source,), data__crop='random', data__shards=4
  )
  finish(launch('autoencoder', tars / 'alone', 2, **options))
  return (
    options,
    tars / 'alone',
    kill_on_the_way('autoencoder', tars / 'killed', **options)[0],
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  'count, devices, mesh',
  [
    (1, 2, {}),
    (2, 1, {}),
    (4, 1, {}),
    (1, 2, dict(mesh__data=1, mesh__tensor=2)),
    (2, 2, dict(mesh__data=2, mesh__tensor=2)),
    (4, 1, dict(mesh__data=2, mesh__tensor=2)),  # two processes read the same shards
    (2, 2, dict(mesh__data=1, mesh__fsdp=4)),
  ],
)
def test_a_run_on_tars_goes_on_on_other_machines(
  on_tars, tmp_path, start_job, count, devices, mesh
):
  """The batches of a run that was not stopped, over an epoch in which images are skipped."""
  options, alone, killed = on_tars
  shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
  if count == 1:
    out = finish(launch('autoencoder', tmp_path, devices, **options, **mesh))
  else:
    out, *_ = map(finish, start_job('autoencoder', tmp_path, count, devices, **options, **mesh))
  first = int(out.split('continuing from step ')[1].split()[0])
  assert 3 <= first < 16
  now = losses(tmp_path)
  before = losses(alone)
  assert [step for step, _ in now] == [step for step, _ in before] == list(range(1, 17))
  np.testing.assert_allclose(now[: first + 3], before[: first + 3], rtol=1e-4)
  np.testing.assert_allclose(now, before, rtol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
  'stage, mesh',
  [
    ('autoencoder', {}),
    ('autoencoder', dict(mesh__data=1, mesh__fsdp=4)),
    ('encoder', dict(mesh__data=1, mesh__fsdp=4)),
  ],
)
def test_four_processes_have_the_losses_of_one(start_job, tmp_path, stage, mesh):
  finish(launch(stage, tmp_path / 'one', 4, num_steps=6, **mesh))
  list(map(finish, start_job(stage, tmp_path / 'four', 4, 1, num_steps=6, **mesh)))
  assert len(losses(tmp_path / 'one')) == 6
  np.testing.assert_allclose(losses(tmp_path / 'four'), losses(tmp_path / 'one'), rtol=1e-5)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_in_the_stages_with_noise(start_job, tmp_path):
  """Which row has which noise matters here, and in the language model which pairs share a shard."""
  finish(launch('encoder', tmp_path / 'encoder', num_steps=1))
  frozen = dict(frozen=f'{tmp_path}/encoder/export')
  for stage in ('tokenizer', 'lm'):
    options = dict(
      num_steps=4, **frozen, **(dict(tokenizer__quantize_from=2) if stage == 'tokenizer' else {})
    )
    finish(launch(stage, tmp_path / stage, 2, **options))
    list(map(finish, start_job(stage, tmp_path / f'{stage}-two', 2, 1, **options)))
    assert len(losses(tmp_path / stage)) == 4
    np.testing.assert_allclose(
      losses(tmp_path / f'{stage}-two'), losses(tmp_path / stage), rtol=1e-5
    )
    frozen['frozen'] += f',{tmp_path}/{stage}/export'


@pytest.mark.parametrize(
  'phase, options',
  [
    pytest.param('steps', dict(eval_every=0), marks=pytest.mark.slow),
    # The programs of `killed`; the evaluation would take hours.
    ('evaluation', STEPS | dict(checkpoint_every=0, eval_every=3, eval_batches=1 << 20)),
    ('compilation', STEPS | dict(checkpoint_every=0)),
  ],
)
def test_sigterm_to_one_of_two_stops_both(start_job, tmp_path, phase, options):
  """At the same step, with everything saved; status 143."""
  job = start_job('encoder', tmp_path, 2, 1, **dict(num_steps=100_000) | options)
  if phase == 'compilation':
    while not (tmp_path / 'checkpoints').exists():
      assert job[0].poll() is None, job[0].communicate()[0]
      time.sleep(0.01)
  else:
    until(job[0], tmp_path, 3)
  job[1].send_signal(signal.SIGTERM)
  out, _ = (finish(process, 143) for process in job)
  saved = whole_checkpoints(tmp_path)
  if phase == 'evaluation':
    assert saved == [3]
  if rows(tmp_path):
    last = rows(tmp_path)[-1]['step']
    assert saved == [last] and f'stopped at step {last} as asked' in out
  else:
    assert phase == 'compilation' and not saved


LATE = f"""
import sys, time
import jax
from lavit_jax.training import distributed
distributed.connect()
time.sleep({TIMEOUT + 2} * (jax.process_index() == int(sys.argv[1])))
sys.exit(143)
"""


@pytest.mark.slow
@pytest.mark.parametrize('late', [0, 1])
def test_whoever_ends_first_waits_for_one_that_still_works(running, late):
  """For longer than for a silent one."""
  for env in nano.job_environments(2, TIMEOUT):
    env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(nano.ROOT), **env}
    running.append(
      subprocess.Popen(
        [sys.executable, '-c', LATE, str(late)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
    )
  for process in running:
    finish(process, 143)


def test_the_timeout_is_of_silence_alone(monkeypatch):
  """A process may write for longer at the end; its heartbeats go on."""
  options = {}
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *_, **given: options.update(given))
  distributed.connect('10.0.0.1:99', 2, 1, TIMEOUT)
  last = distributed.LAST_TIMEOUT
  assert options == dict(heartbeat_timeout_seconds=TIMEOUT, shutdown_timeout_seconds=last)
  assert last > 10 * TIMEOUT


@pytest.mark.slow
@pytest.mark.parametrize('silent', [0, 1])
def test_a_process_that_falls_silent_ends_the_others(start_job, tmp_path, silent):
  """Its connections stay open, as those of a machine that hangs."""
  job = start_job('encoder', tmp_path, 2, 1, num_steps=100_000)
  until(job[0], tmp_path, 3)
  job[silent].send_signal(signal.SIGSTOP)
  begin = time.monotonic()
  out, _ = job[1 - silent].communicate(timeout=60)
  assert time.monotonic() - begin < 2 * TIMEOUT + 10
  assert job[1 - silent].returncode in (Unreachable.status, -signal.SIGABRT) and (
    'has lost another one' in out or 'another task died' in out
  )


@pytest.mark.slow
def test_a_workdir_that_is_not_shared(start_job, tmp_path):
  for out in (
    finish(process, 2)
    for process in start_job('encoder', tmp_path / 'a', 2, 1, own={1: dict(workdir=tmp_path / 'b')})
  ):
    assert re.search(
      rf'UserError: what process 0 .* writes to {tmp_path}/. is not seen by process 1 .*; '
      '--workdir must be one folder',
      out,
    ), out
  assert not any((tmp_path / 'a').iterdir()) and not (tmp_path / 'b').exists()


@pytest.mark.slow
def test_an_error_of_one_process_is_reported_and_ends_the_others(start_job, tmp_path):
  begin = time.monotonic()
  first, second = start_job('encoder', tmp_path, 2, 1, own={1: dict(data__source='/nowhere')})
  assert 'UserError: data: /nowhere has no emoji data set' in finish(second, 2)
  first.communicate(timeout=60)
  assert first.returncode in (Unreachable.status, -signal.SIGABRT) and time.monotonic() - begin < 60


@pytest.mark.slow
def test_two_processes_go_on_from_the_checkpoint_before_a_damaged_one(start_job, killed, tmp_path):
  shutil.copytree(killed[0], tmp_path, dirs_exist_ok=True)
  before, last = whole_checkpoints(tmp_path)[-2:]
  largest = max(
    (tmp_path / 'checkpoints' / str(last) / 'state').rglob('*'),
    key=lambda file: file.is_file() * file.stat().st_size,
  )
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  out = ''.join(
    process.communicate(timeout=100)[0] for process in start_job('encoder', tmp_path, 2, 1, **STEPS)
  )
  assert f'checkpoints/{last} is damaged' in out and 'step 16/16' not in out
  out, _ = map(finish, start_job('encoder', tmp_path, 2, 1, skip_damaged=True, **STEPS))
  assert int(out.split('continuing from step ')[1].split()[0]) == before
  assert 'step 16/16' in out


@pytest.mark.parametrize(
  'addresses, message',
  [
    (
      ('10.0.0.1:99', 2, None),
      r'needs --coordinator HOST:PORT, --processes N and --process I '
      r'.*there is 10.0.0.1:99, 2, None',
    ),
    (('10.0.0.1:99', 2, 2), r'--process 2: of 2 processes the first is 0 and the last 1'),
    (('10.0.0.1', 2, 0), r'--coordinator 10.0.0.1: give host and port'),
  ],
)
def test_a_job_that_is_not_described_well(addresses, message):
  with pytest.raises(UserError, match=message):
    distributed.connect(*addresses)


def test_a_variable_that_is_no_number(monkeypatch):
  monkeypatch.setenv('JAX_NUM_PROCESSES', 'two')
  with pytest.raises(UserError, match="JAX_NUM_PROCESSES='two' is not a number"):
    distributed.connect()


@pytest.mark.parametrize(
  'error, status, message',
  [
    (
      RuntimeError('UNKNOWN: Gloo all-reduce failed: Connection reset by peer'),
      200,
      r'process 1 of 3 has lost another one .Gloo all-reduce',
    ),
    (UserError('the disk is full'), 2, '^the disk is full$'),
    (Unreachable('gs://b/0.tar cannot be read'), 200, '^gs://b/0.tar cannot be read$'),
    (RuntimeError('RESOURCE_EXHAUSTED: Out of memory'), 1, '^RESOURCE_EXHAUSTED'),
  ],
)
def test_a_process_that_fails_does_not_wait_for_the_others(monkeypatch, error, status, message):
  at_exit = []
  monkeypatch.setattr(distributed.jax, 'process_count', lambda: 3)
  monkeypatch.setattr(distributed.jax, 'process_index', lambda: 1)
  monkeypatch.setattr(distributed.atexit, 'register', lambda *call: at_exit.append(call))
  with pytest.raises({1: RuntimeError, 2: UserError, 200: Unreachable}[status], match=message):
    with distributed.exit_together():
      raise error
  assert at_exit == [(distributed._leave, status)]
