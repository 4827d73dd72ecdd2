"""A work directory in a store: checkpoints, the lock, and the copies of what grows."""

import json
import threading
import time

import chex
import jax
import pytest
from checkpoint_runs import abstract, config, numbers, state
from etils import epath
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from lavit_jax import compilation_cache
from lavit_jax.errors import Unreachable, UserError
from lavit_jax.training import distributed, lock, workdir
from lavit_jax.training.checkpoint import Checkpoints, saved_settings
from lavit_jax.training.lock import WorkdirLock, refuse_if_running
from lavit_jax.training.workdir import Mirror, open_workdir, records_folder


@pytest.fixture
def url(bucket):
  return f'gs://{bucket}/run'


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(lock, 'BEAT_INTERVAL', 0.05)
  monkeypatch.setattr(lock, 'POLL_INTERVAL', 0.02)
  monkeypatch.setattr(lock, 'SILENCE', 0.5)


@pytest.mark.parametrize('address', ['s3://bucket/run', 'memory://run', 'gs://bucket', 'gs:///run'])
def test_addresses_that_checkpoints_cannot_be_written_to(address):
  with pytest.raises(UserError, match=f'--workdir {address}: checkpoints are written to a folder'):
    open_workdir(address)


def test_a_path_of_this_machine_stays_as_it_is(tmp_path):
  assert str(open_workdir('runs/x')) == 'runs/x'
  assert str(open_workdir(f'file://{tmp_path}')) == str(tmp_path)
  assert records_folder(open_workdir(tmp_path)) == tmp_path


def test_checkpoints_in_a_store(gcs, bucket, url):
  """Those without the object that is written last are none, and are cleared away."""
  checkpoints = Checkpoints(url, config(), keep=2, settings={'llama': {'rope_theta': 100.0}})
  data = numbers()
  for step in (1, 2, 3):
    next(data)
    checkpoints.save(step, state(step), data)
  checkpoints.close()
  assert {name.split('/')[0] for name in gcs.names(f'{bucket}/run/checkpoints/')} == {'2', '3'}
  gcs.remove(f'{bucket}/run/checkpoints/3/commit_success.txt')
  assert saved_settings(url) == {'llama': {'rope_theta': 100.0}}
  again = Checkpoints(url, config(), keep=2, settings={'llama': {'rope_theta': 100.0}})
  assert not gcs.names(f'{bucket}/run/checkpoints/3/')
  step, restored = again.restore_latest(abstract(state(0)), data)
  chex.assert_trees_all_equal(restored, state(2))
  assert step == 2 and next(data)[0] == 8
  again.save(3, state(4), data)
  again.wait()
  chex.assert_trees_all_equal(again.restore(3, abstract(state(0)), data), state(4))
  assert again.set_aside_broken(3) == [3]
  names = {name.split('/')[0] for name in gcs.names(f'{bucket}/run/checkpoints/')}
  assert again.latest() == 2 and names == {'2', '3.broken'}
  again.close()
  Checkpoints(url, config(), keep=2).close()
  assert gcs.names(f'{bucket}/run/checkpoints/3.broken/')  # it is not half-written


def test_a_damaged_checkpoint_in_a_store_is_set_aside(gcs, bucket, url):
  checkpoints = Checkpoints(url, config(), keep=2)
  data = numbers()
  for step in (1, 2):
    checkpoints.save(step, state(step), data)
  checkpoints.wait()
  gcs.remove(f'{bucket}/run/checkpoints/2/state/manifest.ocdbt')
  with pytest.raises(UserError, match='checkpoints/2 is damaged or .*skip_damaged=true'):
    checkpoints.restore_latest(abstract(state(0)), data)
  step, restored = checkpoints.restore_latest(abstract(state(0)), data, skip_damaged=True)
  chex.assert_trees_all_equal(restored, state(1))
  assert step == 1 and gcs.names(f'{bucket}/run/checkpoints/2.damaged/')
  checkpoints.close()


def test_a_store_that_refuses_is_no_damage(gcs, url, monkeypatch):
  checkpoints = Checkpoints(url, config(), keep=2)
  data = numbers()
  checkpoints.save(1, state(1), data)
  checkpoints.wait()

  def refuse(*args, **kwargs):
    raise ValueError('PERMISSION_DENIED: Error reading "gs://bucket"')

  monkeypatch.setattr(checkpoints.manager, 'restore', refuse)
  with pytest.raises(Unreachable, match='cannot be read .PERMISSION_DENIED.* the permissions'):
    checkpoints.restore_latest(abstract(state(0)), data, skip_damaged=True)
  monkeypatch.setattr(checkpoints.manager, 'save', refuse)
  with pytest.raises(Unreachable, match='checkpoints cannot be written'):
    checkpoints.save(2, state(2), data)


def test_a_second_run_in_a_store_is_refused(gcs, bucket, url):
  with WorkdirLock(url):
    for enter in (WorkdirLock(url).__enter__, lambda: refuse_if_running(url)):
      with pytest.raises(UserError, match=f'{url} is in use: process .* stop that run first'):
        enter()
  assert f'{bucket}/run/.lock' not in gcs.objects


def test_a_run_killed_elsewhere_is_taken_over(gcs, bucket, url, quick, capsys):
  """By one of several that find it dead."""
  foreign = dict(run='other', host=['pod-7', 'boot', 'pid:[1]'], pid=1, began='5', beat=0)
  gcs.put(f'{bucket}/run/.lock', json.dumps(foreign).encode())
  results = []

  def enter():
    try:
      results.append(WorkdirLock(url).__enter__())
    except UserError as error:
      results.append(error)

  threads = [threading.Thread(target=enter) for _ in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  (own,) = (result for result in results if isinstance(result, WorkdirLock))
  assert json.loads(gcs.text(f'{bucket}/run/.lock'))['run'] == own.run
  gcs.put(f'{bucket}/run/.lock', json.dumps(foreign).encode())
  deadline = time.monotonic() + 20
  while not own.lost and time.monotonic() < deadline:
    time.sleep(0.02)
  with pytest.raises(UserError, match='another run has taken this work directory over'):
    own.check()
  own.__exit__()
  assert json.loads(gcs.text(f'{bucket}/run/.lock')) == foreign


def test_what_grows_is_copied_and_taken_up(gcs, bucket, url):
  """Only what has changed; and nothing once another run has the directory."""
  path = open_workdir(url)
  gcs.put(f'{bucket}/run/metrics.jsonl', b'first\n')
  folder = records_folder(path)
  with Mirror(path, folder, lambda: True) as mirror:
    with (folder / 'metrics.jsonl').open('a') as file:
      file.write('second\n')
    (folder / 'pictures').mkdir()
    (folder / 'pictures' / '1.png').write_bytes(b'\x89')
    mirror.copy()
    assert gcs.text(f'{bucket}/run/metrics.jsonl') == 'first\nsecond\n'
    count = len(gcs.log)
    mirror.copy()
    assert len(gcs.log) == count
  assert gcs.names(f'{bucket}/run/') == ['metrics.jsonl', 'pictures/1.png']
  with Mirror(path, folder, lambda: False):
    (folder / 'config.json').write_text('{}')
  assert len(gcs.log) == count + 1


def test_it_is_copied_while_the_run_goes_on(gcs, bucket, url, monkeypatch):
  monkeypatch.setattr(workdir, 'INTERVAL', 0.01)
  path = open_workdir(url)
  folder = records_folder(path)
  with Mirror(path, folder, lambda: True):
    (folder / 'metrics.jsonl').write_text('line\n')
    deadline = time.monotonic() + 20
    while gcs.text(f'{bucket}/run/metrics.jsonl') != 'line\n':
      assert time.monotonic() < deadline
      time.sleep(0.01)


def test_all_processes_see_a_store(url, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(distributed, 'wait_for_all', lambda point: None)
  monkeypatch.setattr(distributed, 'gather', lambda message: [message] * 2)
  distributed.check_shared(epath.Path(url))


def test_compiled_programs_in_a_store(gcs, bucket, monkeypatch):
  """JAX writes them; those that were written first are removed."""
  names = ('jax_compilation_cache_dir', 'jax_compilation_cache_max_size')
  before = {name: getattr(jax.config, name) for name in names}
  for name in ('a-cache', 'b-cache', 'notes', 'c-cache'):
    gcs.put(f'{bucket}/compiled/{name}', bytes(100))
  try:
    monkeypatch.setattr(compilation_cache, 'MAX_BYTES', 250)
    compilation_cache.enable(f'gs://{bucket}/compiled')
    assert gcs.names(f'{bucket}/compiled/') == ['b-cache', 'c-cache', 'notes']
    reset_cache()
    jax.jit(lambda x: 3 * x + 0.5)(1.0)
    assert any(name.startswith('jit_') for name in gcs.names(f'{bucket}/compiled/'))
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    reset_cache()
