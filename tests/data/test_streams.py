"""Global batches do not depend on the processes; what shards read, keep open and share."""

import itertools
import json
from concurrent.futures import Future

import grain
import numpy as np
import pytest
from numbered_images import WRITERS, Counted, batches, number, read_numbers, write_tars

from lavit_jax.data import open_units, streams
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


@pytest.fixture(scope='module', params=[*SEQUENTIAL, 'arrayrecord', 'mix'])
def uninterrupted(written, request):
  """(sources, 12 global batches of one process).

  Of the formats whose records have an index, one is enough: to the shards all are alike.
  """
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
