"""The loop on a list of sources: exact resume, counts of skipped examples, time spent waiting."""

import json
import re
import shutil
import time
from types import SimpleNamespace

import jax
import nano
import pytest
from numbered_images import sample, write_tar

from lavit_jax.data import formats
from lavit_jax.data.row_workers import SkipCounter
from lavit_jax.data.sources import check_files
from lavit_jax.data.streams import Stream
from lavit_jax.errors import UserError
from lavit_jax.training import batches, loop, metrics

nano.install()


def lines(folder):
  return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.usefixtures('without_flops')
def test_goes_on_to_the_bit_and_counts_what_is_skipped(tmp_path, capsys, monkeypatch):
  compile_fully = jax.stages.Lowered.compile
  monkeypatch.setattr(
    jax.stages.Lowered, 'compile', lambda self: compile_fully(self, nano.QUICK_OPTIONS)
  )
  for t in range(2):
    bad = [('x', {'png': b'no image', 'txt': b'words'})]
    write_tar(tmp_path / f'{t}.tar', [sample(i) for i in range(20 * t, 20 * t + 20)] + bad)
  source = dict(format='tars', path=f'{tmp_path}/*.tar', window=7)
  config = nano.config(
    'autoencoder', checkpoint_every=2, keep=3, data__sources=(source,), data__crop='random'
  )
  loop.train(config, tmp_path / 'run')
  out = capsys.readouterr().out
  first = lines(tmp_path / 'run')
  assert (
    'data/skipped_corrupt_image' in out
    and 'data_wait' in out
    and [row['step'] for row in first] == [1, 2, 3, 4]
  )
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '4')
  assert 'changed since' not in out
  with config.unlocked():
    config.log_every = 2
    config.data.scene_share = 0.5  # which composed data alone have
  with monkeypatch.context() as patch:
    next_batch = loop.next_batch
    patch.setattr(loop, 'next_batch', lambda data: time.sleep(2) or next_batch(data))
    loop.train(config, tmp_path / 'run')
  out = capsys.readouterr().out
  assert 'continuing from step 2' in out and lines(tmp_path / 'run') == first
  assert 'changed since then: log_every 1 -> 2\n' in out
  assert (
    'warning: changed since then, so the next examples are not those that it would have seen: '
    'data.scene_share 0.3 -> 0.5\n' in out
  )
  assert float(re.search(r'step 4/4 .* data_wait ([\d.]+)%', out)[1]) > 10  # of 2 s and two steps


def test_sources_without_held_out_ones_are_refused_at_once(tmp_path):
  config = nano.config('autoencoder', eval_every=4, data__sources=(dict(format='tars', path='x'),))
  with pytest.raises(UserError, match='data.sources without data.heldout'):
    loop.train(config, tmp_path / 'run')


@pytest.mark.parametrize(
  'heldout, message',
  [
    (dict(format='tras', path='x.tar'), r"^data.heldout\[0\] has format 'tras'; choose one of"),
    (
      dict(format='tars', path='/nowhere/{0..9}.tar'),
      r'^data.heldout\[0\]: 10 of 10 tars are not there, such as /nowhere/0.tar; check the path',
    ),
    (
      dict(format='parquet', path='/nowhere/a.parquet'),
      r'^data.heldout\[0\]: /nowhere/a.parquet: not a Parquet file',
    ),
  ],
)
def test_held_out_data_is_checked_before_the_first_step(tmp_path, heldout, message):
  write_tar(tmp_path / 'a.tar', [sample(0)])
  options = dict(
    data__sources=(dict(format='tars', path=f'{tmp_path}/a.tar'),), data__heldout=(heldout,)
  )
  with pytest.raises(UserError, match=message):
    loop.train(nano.config('autoencoder', eval_every=4, **options), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_few_held_out_tars_may_be_absent(tmp_path):
  for i in range(3):
    write_tar(tmp_path / f'{i}.tar', [sample(i)])
  source = dict(format='tars', path=f'{tmp_path}/{{0..3}}.tar')
  check_files('data.heldout', (source,), 0.25)
  with pytest.raises(
    UserError, match=r'data.heldout\[0\]: 1 of 4 tars are not there, such as .*/3.tar'
  ):
    check_files('data.heldout', (source,), 0.2)


@pytest.mark.usefixtures('without_flops')
def test_a_step_is_saved_before_it_is_evaluated(tmp_path, monkeypatch):
  """A failing evaluation loses no step, and a restarted run does not repeat the evaluation."""
  compile_fully = jax.stages.Lowered.compile
  monkeypatch.setattr(
    jax.stages.Lowered, 'compile', lambda self: compile_fully(self, nano.QUICK_OPTIONS)
  )

  def fail(self, *args):
    raise UserError('no such data any more')

  monkeypatch.setattr(loop.Evaluator, 'evaluate', fail)
  with pytest.raises(UserError, match='no such data any more'):
    loop.train(nano.config('autoencoder', eval_every=2, checkpoint_every=2), tmp_path)
  assert [row['step'] for row in lines(tmp_path)] == [1, 2]
  assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['2']


def test_held_out_rows_are_of_the_held_out_sources(tmp_path):
  for name, start in ('a', 0), ('b', 100):
    write_tar(tmp_path / f'{name}.tar', [sample(i) for i in range(start, start + 20)])
  sources = {
    f'data__{key}': (dict(format='tars', path=f'{tmp_path}/{name}.tar'),)
    for key, name in (('sources', 'a'), ('heldout', 'b'))
  }
  run = nano.run('lm', **sources)
  red = {
    split: batches.next_batch(batches.open_batches(run, split))['image'][:, 0, 0, 0]
    for split in ('train', 'heldout')
  }
  assert red['train'].max() < 20 and red['heldout'].tolist() == list(range(100, 108))


class Clock:
  """The time that metrics.Log sees, and a device that does one step after the other."""

  def __init__(self):
    self.now = 0.0
    self.free = 0.0

  def monotonic(self):
    return self.now

  def pass_to(self, then):
    self.now = max(self.now, then)

  def fetch(self, seconds):
    self.now += seconds
    return 'batch'

  def step(self, seconds):
    """The loss of a step, which is there when the device is done with it."""
    self.free = max(self.free, self.now) + seconds
    return Computing(self, self.free)

  def submit(self, when_ready, values):
    """As an executor does: what a thread that waits for the device knows of it."""
    then = values['loss'].then
    return SimpleNamespace(done=lambda: self.now >= then, result=lambda: then)

  def shutdown(self):
    pass


class Computing(float):
  def __new__(cls, clock, then):
    self = super().__new__(cls, 1.0)
    self.then = then
    self.block_until_ready = lambda: clock.pass_to(then)
    return self


@pytest.fixture
def timed(tmp_path, monkeypatch):
  """(a log, the clock it goes by)."""
  log = metrics.MetricLogger(tmp_path, 0, num_steps=12, batch_size=4)
  clock = Clock()
  log.watch.shutdown()
  log.watch = clock
  monkeypatch.setattr(metrics, 'time', clock)
  log.restart_clock()
  yield log, clock
  log.close()


@pytest.mark.parametrize(
  'source, step, wait',
  [
    (0.05, 0.0, 1.0),  # the device has nothing to do
    (0.0, 0.05, 0.0),
    # A little slower than the device, which waits for the first batch, and the difference.
    (0.08, 0.06, (0.08 + 11 * 0.02) / (12 * 0.08)),
    # A little faster: the host is two steps ahead at the end.
    (0.05, 0.08, 0.05 / (0.05 + 10 * 0.08)),
  ],
)
def test_data_wait_is_the_share_of_time_that_the_device_waits(
  timed, capsys, monkeypatch, source, step, wait
):
  """From the seconds of the source and the device for a step; terminal and TensorBoard agree."""
  (log, clock) = timed
  shown = {}
  monkeypatch.setattr(log, 'scalars', lambda step, values: shown.update(values))
  for i in range(1, 13):
    assert log.fetch(clock.fetch, source) == 'batch'
    log.step(i, {'loss': clock.step(step)})
  log.report({'data/skipped_no_image': 3})
  assert shown['data_wait'] == pytest.approx(wait)
  out = capsys.readouterr().out
  assert f'data_wait {wait:.1%}' in out and 'data/skipped_no_image 3' in out and log.waited == 0


def test_what_the_device_did_before_is_no_waiting(timed):
  log, clock = timed
  log.step(1, {'loss': clock.step(0.2)})
  log.flush()
  clock.pass_to(0.5)  # evaluating, saving
  log.fetch(clock.fetch, 0.1)
  assert log.waited == pytest.approx(0.1)
  log.restart_clock()
  assert log.waited == 0


@pytest.mark.slow
def test_skips_of_all_processes_are_counted(running, tmp_path):
  """The first process, which alone writes, skips none; the other one reads the tar with two."""
  source = dict(format='tars', path=f'{tmp_path}/{{0..1}}.tar', window=4)
  _, second = Stream.of(formats.Tars(source['path'], None, ('txt',)), 0, '', 0, 4, 8).unit(1, 0)
  for t in range(2):
    bad = [(f'x{n}', {'png': b'no image', 'txt': b'words'}) for n in range(2 * (t == second))]
    write_tar(tmp_path / f'{t}.tar', bad + [sample(i) for i in range(300)])
  job = nano.launch_job(
    'autoencoder', tmp_path / 'run', 2, 1, timeout=20, num_steps=2, data__sources=(source,)
  )
  running.extend(job)
  first, other = map(nano.finish, job)
  assert (
    'data/skipped_corrupt_image 2' in first
    and 'skipped: ' not in first
    and 'skipped: corrupt image' in other
  )
  (metrics_of,) = (tmp_path / 'run' / 'tensorboard').iterdir()
  assert b'data/skipped_corrupt_image' in metrics_of.read_bytes()


def test_processes_with_the_same_rows_count_once(monkeypatch):
  messages = [{'share': 0, 'a': 1}, {'share': 1, 'a': 2, 'b': 5}, {'share': 0, 'a': 1}]
  monkeypatch.setattr(batches.distributed, 'gather', lambda values: messages)
  run = nano.run('autoencoder', data__sources=(dict(format='tars', path='x'),))
  assert batches.count_skipped(run, SkipCounter()) == {'a': 3, 'b': 5}
