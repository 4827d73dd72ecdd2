"""Runs whose work directory is in a store: gs://, which here is a server on loopback.

It has what an object store has (tests/fake_gcs.py): whole objects, no renames, nothing appended.
"""

import json
import time

import nano
import pytest
from nano import finish, launch_job

from lavit_jax.training.loop import train
from lavit_jax.weights.store import remote
from lavit_jax.weights.store.folder import load_params

nano.install()
OPTIONS = dict(num_steps=12, checkpoint_every=3, eval_every=6, eval_batches=1)


def wait_for(gcs, process, name):
  """Waits until an object is there."""
  while process.poll() is None and name not in gcs.objects:
    time.sleep(0.005)
  assert process.poll() is None, process.communicate()[0]


@pytest.fixture(scope='session')
def local_lines(tmp_path_factory):
  """metrics.jsonl of the same run on a disk."""
  folder = tmp_path_factory.mktemp('local')
  with pytest.MonkeyPatch.context() as patch:
    from lavit_jax.training import flops

    patch.setattr(flops, 'step_flops', lambda run: flops.StepFlops(1.0))
    train(nano.config('encoder', **OPTIONS), folder)
  return (folder / 'metrics.jsonl').read_text()


def test_a_killed_run_repeats_itself_bit_for_bit(gcs, bucket, start, local_lines):
  """Its metrics are those of an uninterrupted run on a disk; nothing half-written stays."""
  url = f'gs://{bucket}/run'
  process = start('encoder', url, **OPTIONS)
  wait_for(gcs, process, f'{bucket}/run/checkpoints/3/commit_success.txt')
  process.kill()
  process.communicate()
  assert f'{bucket}/run/.lock' in gcs.objects
  steps = [
    json.loads(line)['step'] for line in gcs.text(f'{bucket}/run/metrics.jsonl').splitlines()
  ]
  assert steps[:3] == [1, 2, 3]  # a checkpoint is not ahead of the metrics
  gcs.put(f'{bucket}/run/checkpoints/11/state/half', b'half')
  out = finish(start('encoder', url, **OPTIONS))
  assert 'continuing from step' in out and f'the weights are in {url}/export' in out
  assert gcs.text(f'{bucket}/run/metrics.jsonl') == local_lines
  assert not any(
    name.startswith(('checkpoints/11', '.lock')) for name in gcs.names(f'{bucket}/run/')
  )
  assert list(load_params(remote.fetch(f'{url}/export'))) == ['vit']


@pytest.mark.slow
def test_processes_without_a_shared_disk(gcs, bucket, running, tmp_path):
  """Each has folders of its own and writes its own part; one is killed, and all go on."""
  url = f'gs://{bucket}/run'
  own = {}
  for i in range(2):
    (tmp_path / str(i)).mkdir()
    own[i] = {'env': {'TMPDIR': str(tmp_path / str(i))}}
  shards = dict(mesh__data=1, mesh__fsdp=2)

  def start():
    job = launch_job('encoder', url, 2, 1, 5, own, **shards, **OPTIONS)
    running.extend(job)
    return job

  job = start()
  wait_for(gcs, job[0], f'{bucket}/run/checkpoints/6/commit_success.txt')
  job[1].kill()
  for process in job:
    process.communicate()
  first, second = map(finish, start())
  assert 'continuing from step' in first and 'step' not in second
  names = gcs.names(f'{bucket}/run/checkpoints/12/')
  for process in range(2):
    assert any(name.startswith(f'state/ocdbt.process_{process}/d/') for name in names)
    assert f'data/process_{process}-of-2.json' in names
