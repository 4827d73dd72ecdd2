"""Global batches do not depend on the processes; what shards read, keep open and share."""

import itertools
import json
import weakref
from concurrent.futures import Future

import fsspec
import grain
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile
from numbered_images import WRITERS, batches, number, read_numbers, write_tars

from lavit_jax.data import formats, open_units, paths, streams
from lavit_jax.data.shards import StoreShard, open_stored
from lavit_jax.errors import UserError
from lavit_jax.training import integrity

SEQUENTIAL = ('tars', 'parquet')
PROCESSES = {  # the rows of a global batch of 8 in each process
  '1': [range(8)],
  '2': [range(4), range(4, 8)],
  '4': [(0, 1), (2, 3), (4, 5), (6, 7)],
  'permuted': [(2, 3, 6, 7), (0, 1, 4, 5)],
  'shared': [range(4), range(4), range(4, 8), range(4, 8)],
}


class Job:
  """The iterators of several processes; their state is merged as in a checkpoint."""

  def __init__(self, processes, sources, shards=4, **options):
    self.rows = [list(rows) for rows in PROCESSES[processes]]
    self.iterators = [
      batches(
        *sources,
        batch_size=len(rows),
        shard_index=7,
        shard_count=8 // len(rows),
        rows=rows,
        shards=shards,
        **options,
      )
      for rows in self.rows
    ]

  def __next__(self):
    """A global batch."""
    whole = {}
    for rows, iterator in zip(self.rows, self.iterators):
      for key, value in next(iterator).items():
        whole.setdefault(key, np.zeros((8, *value.shape[1:]), value.dtype))[rows] = value
    return whole

  def get_state(self):
    return integrity.merge_positions(
      [json.loads(json.dumps(iterator.get_state())) for iterator in self.iterators], 'it'
    )

  def set_state(self, state):
    for iterator in self.iterators:
      iterator.set_state(state)


@pytest.fixture(scope='module', params=[*WRITERS, 'mix'])
def uninterrupted(written, request):
  """(sources, 12 global batches of one process)."""
  mix = [written['tars'] | {'weight': 3.0}, written['folder'], written['parquet']]
  sources = mix if request.param == 'mix' else [written[request.param]]
  job = Job('1', sources, crop='random')
  return sources, [next(job) for _ in range(12)]


def equal(batch, other):
  assert batch.keys() == other.keys()
  for key in batch:
    np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


@pytest.mark.parametrize('processes', ['2', '4', 'permuted', 'shared'])
def test_global_batches_do_not_depend_on_the_processes(uninterrupted, processes):
  sources, whole = uninterrupted
  job = Job(processes, sources, crop='random')
  for batch in whole:
    equal(next(job), batch)


@pytest.mark.parametrize(
  'chain', [('1', '2', '4'), ('4', '1', '2'), ('2', 'permuted', '1'), ('permuted', 'shared', '4')]
)
def test_others_go_on_where_some_processes_stopped(uninterrupted, chain):
  """Within an epoch, each time after four batches."""
  sources, whole = uninterrupted
  expected = iter(whole)
  state = None
  for processes in chain:
    job = Job(processes, sources, crop='random')
    if state:
      job.set_state(state)
    for batch in itertools.islice(expected, 4):
      equal(next(job), batch)
    state = job.get_state()


@pytest.mark.parametrize('name', WRITERS)
def test_an_epoch_of_all_processes_has_every_image_once(written, name):
  job = Job('2', [written[name]])
  for _ in range(4):
    assert sorted(read_numbers(job, 3)) == list(range(24))


@pytest.mark.parametrize('name', SEQUENTIAL)
@pytest.mark.parametrize('shards', [2, 4])
def test_no_unit_of_a_stream_is_read_by_two(written, name, shards):
  whole = read_numbers(batches(written[name], batch_size=8, shards=shards), 3)
  unit_size = 6 if name == 'tars' else 3
  rows_per_shard = 8 // shards
  units = []
  for shard in range(shards):
    first = shard * rows_per_shard
    images = [whole[batch + first : batch + first + rows_per_shard] for batch in (0, 8, 16)]
    units.append({image // unit_size for image in sum(images, [])})
  assert sum(map(len, units)) == len(set.union(*units)) == 24 // unit_size


@pytest.mark.parametrize('processes', ['1', '4', 'permuted'])
def test_fewer_tars_than_shards(tmp_path, processes):
  """Three tars of seven images, for two readers with four shards each.

  In eight epochs all shards have as many images.
  """
  source = write_tars(tmp_path, 21, 3) | {'window': 40}
  job = Job(processes, [source], shards=8)
  other = Job('2', [source], shards=8)
  found = []
  for _ in range(21):
    batch = next(job)
    equal(next(other), batch)
    found += [number(image) for image in batch['image']]
  assert sorted(found) == sorted([*range(21)] * 8)


@pytest.mark.parametrize(
  'shards, processes, index, message',
  [
    (3, 2, 0, r'batch_size=8 must be a multiple of data.shards=3'),
    (0, 2, 0, 'must be a multiple of data.shards=0'),
    (
      2,
      4,
      1,
      'data.shards=2 cannot be dealt to processes that hold 2 of 8 rows in this order; '
      'data.shards must be a multiple of the pieces',
    ),
  ],
)
def test_shards_that_do_not_fit(written, shards, processes, index, message):
  with pytest.raises(UserError, match=message):
    batches(
      written['tars'],
      batch_size=8 // processes,
      shard_index=index,
      shard_count=processes,
      shards=shards,
    )


def test_every_batch_has_its_part_of_every_source(written):
  job = Job(
    '1', [written['arrayrecord'] | {'weight': 3.0}, written['folder'] | {'use': 'draw'}], shards=8
  )
  assert all(next(job)['kind'].sum() == 2 for _ in range(10))


def test_the_window_is_divided_among_the_shards(written):
  def window(shards, **options):
    source = dict(format='parquet', path=written['parquet']['path'], **options)
    return batches(source, batch_size=512, shards=shards).get_state()['of']['sources'][0]['window']

  assert [window(shards) for shards in (1, 16, 512)] == [2048, 128, 32] and [
    window(n, window=1000) for n in (1, 16, 512)
  ] == [1000, 63, 2]


class Counted:
  """A store of 24 records, or a stream of units of 40, which counts what is read of it."""

  cost = 1

  def __init__(self, units=24):
    self.units = units
    self.count = 0

  def __len__(self):
    return self.units

  def read(self, unit, start=0, ahead=0):
    for i in range(start, 40):
      self.count += 1
      yield i, i + 1, formats.Record(b'', (), f'{unit} {i}')
    yield 40, 40, formats.Skip('', str(unit), 'files')


class Immediate:
  """An executor that runs a task when it is submitted."""

  def submit(self, function, *args):
    (future := Future()).set_result(function(*args))
    return future


def stream_shards(records, shards, local_shards, number=0, window=7, seed=1):
  """The tickets of some shards of a stream, each endless."""
  stream = streams.Stream.of(records, number, '', seed, window, shards)
  units = open_units.OpenUnits()
  shards_of_reader = {}
  for shard in local_shards:
    shards_of_reader.setdefault(shard // stream.fan, []).append(shard % stream.fan)
  readers = {
    index: streams.Reader(stream, index, fan_shards, Immediate(), units)
    for index, fan_shards in shards_of_reader.items()
  }
  return [
    streams.StreamShard(readers[shard // stream.fan], shard % stream.fan) for shard in local_shards
  ]


def keys(iterator, count) -> list[tuple]:
  return [next(iterator).key for _ in range(count)]


def test_each_example_of_each_epoch_and_source_has_a_key_of_its_own():
  """It seeds crop and caption."""

  found = []
  for source in (0, 1):
    for shard in stream_shards(Counted(), 4, range(4), source):
      found += keys(shard, 2 * 6 * 41)
    found += keys(StoreShard(open_stored(Counted(), source + 2, '', 1), 0, 1), 48)
  assert len(set(found)) == len(found) == 2 * (2 * 24 * 41 + 48)


@pytest.mark.parametrize(
  'units, shards, local_shards',
  [(1, 8, range(8)), (3, 8, range(8)), (47, 64, range(4, 8)), (47, 64, range(64))],
)
def test_shards_that_share_a_unit_read_it_once(units, shards, local_shards):
  """Also when one of them is a little behind, as after images that were skipped."""
  records = Counted(units)
  steps = 60
  local = stream_shards(records, shards, local_shards)
  keys(local[0], 5)
  found = []
  for _ in range(steps):
    for shard in local:
      found += keys(shard, 1)
  assert len(set(found)) == len(found)
  fan = streams.Stream.of(records, 0, '', 1, 7, shards).fan
  count = len(local_shards)
  apart = 1 if count % fan == 0 else fan / count
  assert records.count <= apart * (steps * count + 3 * 7 * count + 5 * fan)


@pytest.fixture
def no_open_units(monkeypatch):
  """Nothing waits open that other tests have dropped."""
  monkeypatch.setattr(open_units.OpenUnits, '_instances', weakref.WeakSet())


def test_units_that_wait_too_long_are_closed(no_open_units, monkeypatch):
  monkeypatch.setattr(open_units, '_MAX_OPEN', 64)
  units = open_units.OpenUnits()
  records = Counted()
  waiting = [records.read(0) for _ in range(100)]
  for place, rows in enumerate(waiting):
    units.keep(place, rows, 1)
  waiting.clear()
  closed = [place for place in range(100) if units.take(place) is None]
  assert closed == list(range(36))


def test_a_place_that_two_come_to_counts_once(no_open_units):
  units = open_units.OpenUnits()
  records = Counted()
  for place in range(open_units._MAX_OPEN):
    units.keep(place, records.read(0), 1)
  units.keep(7, last := records.read(0), 1)
  assert units.take(7) is last and all(
    units.take(place) for place in range(open_units._MAX_OPEN) if place != 7
  )


def test_what_waits_is_bounded_over_all_iterators_of_a_process(no_open_units):
  records = Counted()
  one = open_units.OpenUnits()
  other = open_units.OpenUnits()
  for place in range(open_units._MAX_OPEN // 8):
    one.keep(place, records.read(0), 8)
  other.keep(0, records.read(0), 8)
  assert other.take(0) is None and one.take(0) is not None
  other.keep(0, records.read(0), 8)
  one.close()
  one.keep(0, records.read(0), 8)  # by a thread that was still reading
  assert other.take(0) is not None and one.take(0) is None and one.take(1) is None


class Bucket(MemoryFileSystem):
  """A store that counts what is opened and fetched of it."""

  protocol = 'bucket'
  store = {}
  pseudo_dirs = ['']
  opens = 0
  fetched = 0

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.replace('bucket://', 'memory://'))

  def _open(self, path, mode='rb', block_size=None, **options):
    if mode != 'rb':
      return super()._open(path, mode, **options)
    Bucket.opens += 1
    return Fetched(self, path, mode, block_size)


class Fetched(AbstractBufferedFile):
  def _fetch_range(self, start, end):
    Bucket.fetched += end - start
    return Bucket.store[self.path].getvalue()[start:end]


@pytest.fixture
def bucket(tmp_path, monkeypatch, no_open_units):
  """(a source of 96 tars of 12 samples in a Bucket, the bytes of all of them).

  Two samples of a tar make a window.
  """
  fsspec.register_implementation('bucket', Bucket, clobber=True)
  for name, value in dict(store={}, opens=0, fetched=0).items():
    monkeypatch.setattr(Bucket, name, value)
  source = write_tars(tmp_path, 96 * 12, 96)
  files = [file.read_bytes() for file in sorted(tmp_path.glob('*.tar'))]
  for i, content in enumerate(files):
    fsspec.filesystem('bucket').pipe(f'/tars/{i:05d}.tar', content)
  return source | {'path': 'bucket://tars/*.tar', 'window': 2 * 96}, sum(map(len, files))


@pytest.mark.parametrize('ahead', [8 << 20, 1 << 14])
def test_a_store_is_asked_once_for_what_many_shards_read(bucket, ahead, monkeypatch):
  """However much a file reads ahead, and though 96 shards read five windows each, in turn."""
  monkeypatch.setattr(paths, '_MAX_AHEAD', ahead)
  monkeypatch.setattr(paths, '_MIN_AHEAD', 1 << 10)
  source, size = bucket
  data = batches(source, task='images', batch_size=96, shards=96, num_threads=0)
  assert len(set(read_numbers(data, 10))) == 960
  data.close()
  assert Bucket.opens == 96 and Bucket.fetched <= size


def test_what_does_not_stay_open_costs_little(bucket, monkeypatch):
  """If no tar may wait open, at most what each one reads ahead is fetched in vain."""
  monkeypatch.setattr(paths, '_MIN_AHEAD', 1 << 10)
  monkeypatch.setattr(paths, '_TOTAL_AHEAD', 96 << 11)
  monkeypatch.setattr(open_units, '_MAX_OPEN', 0)
  source, size = bucket
  data = batches(source, task='images', batch_size=96, shards=96, num_threads=0)
  for _ in range(10):
    next(data)
  data.close()
  assert Bucket.opens >= 5 * 96 and Bucket.fetched <= size + Bucket.opens * 1.25 * (1 << 11)


def test_what_all_files_read_ahead_is_bounded():
  for files in (1, 50, 64, 512, 3072):
    ahead = paths.read_ahead_size(files)
    assert 256 << 10 <= ahead <= 8 << 20 and 1.25 * ahead * min(files, 512) <= 500 << 20


def test_epochs_and_windows_are_shuffled_apart():
  stream = streams.Stream.of(Counted(), 0, '', 1, 20, 1)
  first = [stream.unit(0, turn) for turn in range(24)]
  second = [stream.unit(0, turn) for turn in range(24, 48)]
  assert sorted(first) == [(0, unit) for unit in range(24)]
  assert sorted(second) == [(1, unit) for unit in range(24)]
  assert [unit for _, unit in first] != [unit for _, unit in second]
  reader = streams.Reader(stream, 0, [0], Immediate(), open_units.OpenUnits())
  first, after = reader.read(0, 0, 0)
  again, _ = reader.read(0, 0, 0)
  second, _ = reader.read(*after)
  places = [
    [ticket.key[3] % 20 for ticket in tickets[0] if ticket.key[3] < 40]
    for tickets in (first, second, again)
  ]
  assert places[0] == places[2] != places[1] and sorted(places[0]) == sorted(places[1]) == list(
    range(20)
  )


def test_sources_of_equal_length_have_orders_of_their_own():
  """Otherwise an image with use 'caption' meets itself with use 'draw' in a batch.

  The first source has the order of a list of one source.
  """

  class Numbers:
    def __len__(self):
      return 32

    def read(self, index):
      return index

  orders = []
  for source in range(3):
    tickets = open_stored(Numbers(), source, '', 7)
    orders.append([tickets[i].read() for i in range(32)])
  arrays = np.array(orders)
  same = [(arrays[i] == arrays[j]).sum() for i, j in ((0, 1), (0, 2), (1, 2))]
  assert all(sorted(order) == list(range(32)) for order in orders)
  # Two random permutations agree in k places with a chance of about 1/(e k!): in more than 8 with
  # one of a million.
  assert max(same) <= 8
  expected = grain.MapDataset.range(32).shuffle(7)
  assert orders[0] == [expected[i] for i in range(32)]
