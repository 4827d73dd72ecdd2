"""Endless, seeded streams of records that stop and go on at any place, on any number of processes.

A stream of examples is dealt to `data.shards` shards, whatever the processes: shard v of V fills rows v * B / V to (v + 1) * B / V - 1 of
every global batch of B. A process runs the shards whose rows its devices hold, so the global batches are the same on any number of processes and
any mesh. States are a few integers a shard: a stream's is the start of a window and a place in it, and going on reads that window again.

A `Ticket` says how to get a record; the pictures of stores are read where they are decoded, in parallel.
"""

from __future__ import annotations

import contextlib
import functools
import resource
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import NamedTuple

import grain
import numpy as np

from lavit_jax.data import paths
from lavit_jax.data.formats import Record, Skip
from lavit_jax.data.skips import About
from lavit_jax.errors import UserError

_OPEN = min(512, max(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 128) // 2)  # tars that wait open, or an eighth of it row groups
_BARREN = 100  # units in a row without a record, or all there are, are taken for a wrong path
_GOLDEN = (5**0.5 - 1) / 2


class Ticket(NamedTuple):
  """A record to come. `key` is the same in every run, whatever the number of processes: it seeds what is random about the example."""

  key: tuple[int, ...]
  use: str
  read: Callable[[], Record | Skip]
  epoch: int = 0  # how many times the record has come before

  @property
  def unit(self) -> int:
    """The unit of a stream that it is of; 0 of a store."""
    return self.key[2] if len(self.key) > 2 else 0


# ---------------------------------------------------------------------------------------------------------------- shards

def shards_of(rows: Sequence[int], batch_size: int, shards: int) -> list[int]:
  """The shards that fill these `rows` of a global batch, ascending.

  Raises:
    UserError: the shards do not divide the batch, or some of them are of these rows in part.
  """
  if shards < 1 or batch_size % shards:
    raise UserError(f'batch_size={batch_size} must be a multiple of data.shards={shards}')
  each = batch_size // shards
  held = sorted({int(row) // each for row in rows})
  if len(held) * each != len(rows):
    raise UserError(f'data.shards={shards} cannot be dealt to processes that hold {len(rows)} of {batch_size} rows in this order; data.shards must be a '
                    'multiple of the pieces that the mesh makes of a batch (data x fsdp), or start fewer processes')
  return held


class Shard:
  """Shard `number` of `count`: its part of each source, and which source each of its rows is of.

  Which source that is goes by multiples of the golden ratio, which spread a shard's rows evenly, begun at another place in each shard, so that
  every batch has its part of every source. `abouts` (skips.About) are the sources for messages.
  """

  def __init__(self, number: int, count: int, sources: Sequence[Stored | Windows], weights: Sequence[float], abouts: Sequence[About]):
    self.sources, self.abouts = sources, abouts
    self._bounds, self._phase = np.cumsum(weights) / sum(weights), number / count
    self._bounds[-1] = 1.0
    self._rows = 0  # at the state that was set

  def begin(self) -> None:
    """Begins to read, and does not wait for it."""
    for source in self.sources:
      source.begin()

  def source_of(self, row: int) -> int:
    """Which of the sources the `row`-th row of the shard is of."""
    return int(np.searchsorted(self._bounds, (row * _GOLDEN + self._phase) % 1, side='right'))

  def get_state(self) -> dict:
    """The state that was set, or the first one."""
    return {'taken': self._rows, 'sources': [source.get_state() for source in self.sources]}

  def set_state(self, state: dict) -> None:
    self._rows = state['taken']
    for source, given in zip(self.sources, state['sources'], strict=True):
      source.set_state(given)


def turned(dealt: int, among: int) -> int:
  """Which of so many gets the `dealt`-th of what is dealt in rounds, of which each begins with another one.

  Were it always the same one, then of eight records in eight shards each shard would have one and the same for ever, and a
  shard whose only record is bad would have none.
  """
  turn, place = divmod(dealt, among)
  return (place + int(turn * _GOLDEN % 1 * among)) % among


class Stored:
  """Tickets of a store for a shard: one of each `count`, of all as `store` orders them."""

  def __init__(self, tickets: grain.MapDataset, number: int, count: int):
    self._tickets, self._number, self._count, self._taken = tickets, number, count, 0

  def begin(self) -> None:
    pass  # the threads that decode read it

  def __next__(self) -> Ticket:
    first = self._taken * self._count
    self._taken += 1
    return self._tickets[first + turned(first + self._number, self._count)]

  def get_state(self) -> int:
    return self._taken

  def set_state(self, state: int) -> None:
    self._taken = state


def store(records, number: int, use: str, seed: int | None) -> grain.MapDataset:
  """Tickets of a store (formats.py), shuffled anew each epoch (seed None: in order), endless."""
  def ticket(position, index):
    return Ticket((number, position), use, functools.partial(records.read, index), position // len(records))

  indices = grain.MapDataset.range(len(records))
  indices = indices if seed is None else indices.shuffle(_seed_of(seed, number))
  return indices.repeat().map_with_index(ticket)


def _seed_of(seed: int, number: int) -> int:
  """The seed of a source's order: sources of equal length must not have one order, or a picture meets itself in a batch. The first has the run's."""
  return int(np.random.SeedSequence((seed, number)).generate_state(1)[0]) if number else seed


# --------------------------------------------------------------------------------------------------------------- streams

class Stream(NamedTuple):
  """How a stream (formats.py) comes to the shards.

  Its units, in a new order each epoch (seed None: in order), are dealt one after the other to `readers`; each reader's records, one after the
  other, to `fan` shards, where they are shuffled within windows of `window`. Without need nothing is read by two: `fan` is 1 unless there are fewer
  units than shards.
  """

  records: object
  number: int  # of the source
  use: str
  seed: int | None
  window: int
  readers: int
  fan: int
  name: str = 'the data'  # for messages

  @classmethod
  def of(cls, records, number: int, use: str, seed: int | None, window: int, shards: int, name: str = 'the data') -> Stream:
    readers = max(n for n in range(1, min(len(records), shards) + 1) if shards % n == 0)
    return cls(records, number, use, seed, window, readers, shards // readers, name)

  def unit(self, reader: int, turn: int) -> tuple[int, int]:
    """(epoch, unit) that a reader has in its so-manieth turn."""
    epoch, place = divmod(turn * self.readers + reader, len(self.records))
    units = np.arange(len(self.records))
    if self.seed is not None:
      np.random.default_rng((self.seed, self.number, epoch)).shuffle(units)
    elif self.readers > 1:  # or a reader would have the same ones in every epoch, and maybe none with a record
      place = (place + int(epoch * _GOLDEN % 1 * len(units))) % len(units)
    return epoch, int(units[place])


class Reader:
  """One reader of a stream, for those of its shards that this process has (`held`, each below `fan`).

  A window starts at (turn, position in the unit, records that were dealt before) and ends with the epoch at the latest. Shards that are at the same one
  share it; it lives as long as one of them holds it.
  """

  def __init__(self, stream: Stream, index: int, held: Sequence[int], pool: Executor, open_units: OpenUnits):
    self.stream, self.index, self.held, self._pool, self._open = stream, index, held, pool, open_units
    self._windows = weakref.WeakValueDictionary()

  def window(self, start: tuple[int, int, int]) -> Future:
    """`read` of a window, in the background."""
    future = self._windows.get(start)
    if future is None:
      self._windows[start] = future = self._pool.submit(self.read, *start)
    return future

  def read(self, turn: int, start: int, dealt: int) -> tuple[dict[int, list[Ticket]], tuple[int, int, int]]:
    """The tickets of a window for each shard in `held`, and where the next window starts. What becomes of whole units is told the first shard.

    Raises UserError if there is no record in sight: in all units, or in a hundred in a row.
    """
    with self._open.room(self.stream.records.cost, (self.index, self.stream.number, turn, start)):
      return self._read(turn, start, dealt)

  def _read(self, turn: int, start: int, dealt: int) -> tuple[dict[int, list[Ticket]], tuple[int, int, int]]:
    stream, here, count, barren = self.stream, (turn, start, dealt), 0, set()
    found, files = {shard: [] for shard in self.held}, []
    epoch, unit = stream.unit(self.index, turn)
    while True:
      rows = self._open.take((self.index, stream.number, turn, start)) or stream.records.read(unit, start, ahead=self._open.ahead)
      before, whole = count, start == 0
      for start, end, record in rows:
        ticket = Ticket((stream.number, epoch, unit, start), stream.use, functools.partial(_same, record), epoch)
        if isinstance(record, Skip) and record.unit != 'records':
          files.append(ticket)
          continue
        shard = turned(dealt, stream.fan)
        if shard in found:
          found[shard].append(ticket)
        count, dealt = count + 1, dealt + 1
        if count == stream.window * stream.fan:
          self._open.keep((self.index, stream.number, turn, end), rows, stream.records.cost)
          return self._shuffled(found, files, here), (turn, end, dealt)
      if whole and count == before:
        barren.add(unit)
      if not count and len(barren) >= min(len(stream.records), _BARREN):
        last = files[-1].read()
        raise UserError(f'{stream.name}: {len(barren)} files in a row have no record ({last.reason or "read to its end"}: {last.origin}); '
                        'check the path, or give more')
      turn, start = turn + 1, 0
      before, (epoch, unit) = epoch, stream.unit(self.index, turn)
      if count and epoch != before:
        return self._shuffled(found, files, here), (turn, 0, dealt)

  def _shuffled(self, found: dict[int, list[Ticket]], files: list[Ticket], here: tuple[int, int, int]) -> dict[int, list[Ticket]]:
    if self.stream.seed is not None:
      for shard, tickets in found.items():
        rng = np.random.default_rng((self.stream.seed, self.stream.number, self.index, shard, *here))
        found[shard] = [tickets[i] for i in rng.permutation(len(tickets))]
    if 0 in found:
      found[0] += files
    return found


class OpenUnits:
  """Units that `readers` read in turn, for whoever reads on where another stopped.

  Of those of a process that wait longest the files are closed. What the open ones have read ahead (`ahead` bytes each) is, with their
  buffers, about half a gigabyte at most; to which Parquet adds a gigabyte of pages at most, of all that wait and all that are read.
  """

  _all, _lock = weakref.WeakSet(), threading.RLock()  # an iterator may be collected, and close, while its thread has the lock
  _room = threading.Condition(_lock)
  _busy = [0]  # the cost of what is being read, in all of them

  def __init__(self, readers: int = 1):
    self.ahead, self._rows, self._cost, self._closed = paths.ahead_of(readers), {}, 0, False
    with self._lock:
      self._all.add(self)

  @contextlib.contextmanager
  def room(self, cost: int, place: tuple) -> Iterator[None]:
    """Waits until a unit of such a cost may be read beside those that are; what waits makes room, but for what waits at `place`."""
    with self._room:
      while self._busy[0] and self._busy[0] + cost > _OPEN:
        self._room.wait()
      self._busy[0] += cost
      mine = [other for other in self._rows if other != place]
      while mine and self._busy[0] + sum(units._cost for units in self._all) > _OPEN:
        self.take(mine.pop(0)).close()
    try:
      yield
    finally:
      with self._room:
        self._busy[0] -= cost
        self._room.notify_all()

  def take(self, place: tuple) -> Iterator | None:
    with self._lock:
      rows, cost = self._rows.pop(place, (None, 0))
      self._cost -= cost
      return rows

  def keep(self, place: tuple, rows: Iterator, cost: int) -> None:
    with self._lock:
      self.take(place)  # of another shard that has read the same
      self._rows[place], self._cost = (rows, cost), self._cost + cost
      while self._rows and (self._closed or sum(units._cost for units in self._all) > _OPEN):
        self.take(next(iter(self._rows))).close()

  def close(self) -> None:
    with self._lock:
      self._closed = True
      while self._rows:
        self.take(next(iter(self._rows))).close()


class Windows:
  """Tickets of a stream for the shard `shard` of a reader's; while one window is used up, the next one is read."""

  def __init__(self, reader: Reader, shard: int):
    self._reader, self._shard = reader, shard
    self.set_state([0, 0, 0, 0])

  def begin(self) -> None:
    self._now = self._now or self._reader.window(self._start)

  def __next__(self) -> Ticket:
    while True:
      self.begin()
      found, after = self._now.result()
      self._next = self._next or self._reader.window(after)
      if self._index < len(found[self._shard]):
        self._index += 1
        return found[self._shard][self._index - 1]
      self._start, self._index, self._now, self._next = after, 0, self._next, None

  def get_state(self) -> list[int]:
    return [*self._start, self._index]

  def set_state(self, state: Sequence[int]) -> None:
    *start, self._index = state
    self._start, self._now, self._next = tuple(start), None, None


def _same(record):
  return record
