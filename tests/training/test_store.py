"""Runs whose work directory is in a store: gs://, which here is a server on loopback.

It has what an object store has (tests/fake_gcs.py): whole objects, no renames, nothing appended.
"""

import json
import time

import nano
import pytest
from nano import finish, launch_job

from lavit_jax import cli
from lavit_jax.training import flops, metrics, workdir
from lavit_jax.training.loop import train
from lavit_jax.weights.store import remote
from lavit_jax.weights.store.folder import load_params

nano.install()
OPTIONS = dict(num_steps=8, checkpoint_every=3, eval_every=4, eval_batches=1)


@pytest.fixture(scope='session')
def local_lines(tmp_path_factory):
  """metrics.jsonl of the same run on a disk."""
  folder = tmp_path_factory.mktemp('local')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(flops, 'step_flops', lambda run: flops.StepFlops(1.0))
    train(nano.config('encoder', **OPTIONS), folder)
  return (folder / 'metrics.jsonl').read_text()


def logged_steps(gcs, run):
  return [json.loads(line)['step'] for line in gcs.text(f'{run}/metrics.jsonl').splitlines()]


def wait_for(gcs, process, name):
  """Waits until an object is there."""
  while process.poll() is None and name not in gcs.objects:
    time.sleep(0.005)
  assert process.poll() is None, process.communicate()[0]


def test_a_run_in_a_store_is_that_on_a_disk(
  gcs, bucket, local_lines, without_flops, monkeypatch, capsys
):
  """It ends without a last copy after a checkpoint, goes on, and exports."""
  run = f'{bucket}/run'
  config = nano.config('encoder', **OPTIONS)

  def fail(self, step, values):
    if step == 8:
      raise RuntimeError('the machine is gone')
    log_step(self, step, values)

  log_step = metrics.MetricLogger.step
  with monkeypatch.context() as patch:
    patch.setattr(metrics.MetricLogger, 'step', fail)
    patch.setattr(workdir.Mirror, '__exit__', lambda self, *_: self._stop.set())
    with pytest.raises(RuntimeError, match='the machine is gone'):
      train(config, f'gs://{run}')
  assert logged_steps(gcs, run) == [1, 2, 3, 4, 4, 5, 6]  # not behind the checkpoint
  gcs.put(f'{run}/checkpoints/7/state/half', b'half')
  gcs.put(f'{run}/export/.unfinished', b'')
  gcs.put(f'{run}/export/parts/half', b'half')
  train(config, f'gs://{run}')
  assert 'continuing from step 6' in capsys.readouterr().out
  assert gcs.text(f'{run}/metrics.jsonl') == local_lines
  folders = {name.split('/')[0] for name in gcs.names(f'{run}/')}
  files = {'.goodput_alive', 'config.json', 'goodput.jsonl', 'metrics.jsonl'}
  assert folders - files == {'checkpoints', 'export', 'tensorboard'}
  assert {name.split('/')[0] for name in gcs.names(f'{run}/checkpoints/')} == {'6', '8'}
  assert 'parts/half' not in gcs.names(f'{run}/export/')
  assert list(load_params(remote.fetch(f'gs://{run}/export'))) == ['vit']
  assert cli.main(['inspect', f'gs://{run}/export']) == 0
  assert 'vit' in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_run_repeats_itself_bit_for_bit(gcs, bucket, start, tmp_path):
  finish(start('encoder', tmp_path, **OPTIONS))  # on a disk, with the same flags of XLA
  run = f'{bucket}/run'
  process = start('encoder', f'gs://{run}', **OPTIONS)
  wait_for(gcs, process, f'{run}/checkpoints/3/commit_success.txt')
  process.kill()
  process.communicate()
  assert f'{run}/.lock' in gcs.objects
  assert logged_steps(gcs, run)[:3] == [1, 2, 3]
  out = finish(start('encoder', f'gs://{run}', **OPTIONS))
  assert 'continuing from step' in out and f'the weights are in gs://{run}/export' in out
  assert gcs.text(f'{run}/metrics.jsonl') == (tmp_path / 'metrics.jsonl').read_text()
  assert f'{run}/.lock' not in gcs.objects


@pytest.mark.slow
def test_processes_without_a_shared_disk(gcs, bucket, running, tmp_path, local_lines):
  """Each has folders of its own and writes its own part; one is killed, and all go on."""
  run = f'{bucket}/run'
  own = {}
  for i in range(2):
    (tmp_path / str(i)).mkdir()
    own[i] = {'env': {'TMPDIR': str(tmp_path / str(i))}}
  shards = dict(mesh__data=1, mesh__fsdp=2)

  def start():
    job = launch_job('encoder', f'gs://{run}', 2, 1, 5, own, **shards, **OPTIONS)
    running.extend(job)
    return job

  job = start()
  wait_for(gcs, job[0], f'{run}/checkpoints/3/commit_success.txt')
  job[1].kill()
  for process in job:
    process.communicate()
  first, second = map(finish, start())
  assert 'continuing from step' in first and 'step' not in second
  names = gcs.names(f'{run}/checkpoints/8/')
  for process in range(2):
    assert any(name.startswith(f'state/ocdbt.process_{process}/d/') for name in names)
    assert f'data/process_{process}-of-2.json' in names
  lines = gcs.text(f'{run}/metrics.jsonl').splitlines()
  for line, alone in zip(lines, local_lines.splitlines(), strict=True):
    line, alone = json.loads(line), json.loads(alone)
    key = 'loss' if 'loss' in line else 'heldout/loss'
    assert line['step'] == alone['step'] and line[key] == pytest.approx(alone[key], rel=1e-4)
