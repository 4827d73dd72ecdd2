"""What streams keep open and read ahead is bounded, and a store is asked once."""

import weakref

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile
from numbered_images import Counted, batches, read_numbers, write_tars

from lavit_jax.data import open_units, paths


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
