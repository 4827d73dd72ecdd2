"""The records of streams, as seeded, endless tickets of shards (shards.py).

The state of a shard's stream is where its window starts, and an index in it; to resume is to read
that window again.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import NamedTuple

import numpy as np

from lavit_jax.data.formats import StreamFormat
from lavit_jax.data.open_units import OpenUnits
from lavit_jax.data.record import Record, Skip
from lavit_jax.data.shards import GOLDEN, Ticket, rotate_index
from lavit_jax.errors import UserError

_BARREN = 100  # consecutive units without a record, or all units: the path is taken to be wrong


@dataclasses.dataclass(frozen=True)
class Stream:
  """How the records of a stream come to the shards.

  The units, in a new order each epoch, are dealt one by one to `readers`. The records of a reader
  are dealt one by one to its `fan` shards, which shuffle them within windows. No unit is read by
  two readers; `fan` is more than 1 only if there are fewer units than shards.

  Attributes:
    records: the stream.
    number: of the source.
    use: of the source.
    seed: of the run; None: units and records in order.
    window: the number of a shard's records that are shuffled together.
    readers: the number of readers.
    fan: the number of shards of a reader.
    name: of the source, for messages.
  """

  records: StreamFormat
  number: int
  use: str
  seed: int | None
  window: int
  readers: int
  fan: int
  name: str = 'the data'

  @classmethod
  def of(
    cls,
    records: StreamFormat,
    number: int,
    use: str,
    seed: int | None,
    window: int,
    shards: int,
    name: str = 'the data',
  ) -> Stream:
    """The stream for this many shards, with as many readers as units and shards allow."""
    most = min(len(records), shards)
    readers = max(count for count in range(1, most + 1) if shards % count == 0)
    return cls(records, number, use, seed, window, readers, shards // readers, name)

  def unit(self, reader: int, turn: int) -> tuple[int, int]:
    """(epoch, unit) of a reader's unit number `turn`."""
    epoch, place = divmod(turn * self.readers + reader, len(self.records))
    units = np.arange(len(self.records))
    if self.seed is not None:
      np.random.default_rng((self.seed, self.number, epoch)).shuffle(units)
    elif self.readers > 1:
      # otherwise a reader has the same units in every epoch, and maybe none with a record
      place = (place + int(epoch * GOLDEN % 1 * len(units))) % len(units)
    return epoch, int(units[place])


class _Start(NamedTuple):
  """Where a window starts: the unit's turn, the position in it, the records dealt before."""

  turn: int
  position: int
  dealt: int


class _Window:
  """The tickets of a window as they are collected, for the shards of this process."""

  def __init__(self, shards: Sequence[int]):
    self.tickets: dict[int, list[Ticket]] = {shard: [] for shard in shards}
    self.files: list[Ticket] = []  # what became of whole files and of members
    self.count = 0  # records, those of other processes' shards too

  def add(self, ticket: Ticket, shard: int) -> None:
    self.count += 1
    if shard in self.tickets:
      self.tickets[shard].append(ticket)


class Reader:
  """One reader of a stream, for those of its shards that this process has.

  A window ends with the epoch at the latest. Shards at the same window share it; it lives as long
  as one of them refers to it.

  Args:
    stream: the stream.
    index: of the reader.
    shards: those of this process, each below `stream.fan`.
    pool: reads windows.
    open_units: the open units of this process.
  """

  def __init__(
    self,
    stream: Stream,
    index: int,
    shards: Sequence[int],
    pool: Executor,
    open_units: OpenUnits,
  ):
    self.stream = stream
    self.index = index
    self.shards = shards
    self._pool = pool
    self._open = open_units
    self._windows: weakref.WeakValueDictionary[tuple, Future] = weakref.WeakValueDictionary()

  def window(self, start: tuple[int, int, int]) -> Future:
    """`read` of a window, in the background."""
    future = self._windows.get(start)
    if future is None:
      future = self._pool.submit(self.read, *start)
      self._windows[start] = future
    return future

  def read(
    self, turn: int, position: int, dealt: int
  ) -> tuple[dict[int, list[Ticket]], tuple[int, int, int]]:
    """Reads a window.

    Args:
      turn: the number of the unit, among those of this reader.
      position: in the unit.
      dealt: how many records the reader has dealt before.

    Returns:
      The tickets for each of `shards`, and where the next window starts. The first shard also has
      tickets for what became of whole files.

    Raises:
      UserError: there is no record in all units, or in a hundred consecutive ones.
    """
    start = _Start(turn, position, dealt)
    with self._open.reserve(self.stream.records.cost, self._place(turn, position)):
      return self._read(start)

  def _read(self, start: _Start) -> tuple[dict[int, list[Ticket]], tuple[int, int, int]]:
    stream = self.stream
    window = _Window(self.shards)
    barren: set[int] = set()  # units without a record
    turn, position, dealt = start
    epoch, unit = stream.unit(self.index, turn)
    while True:
      count_before = window.count
      from_start = position == 0
      records = self._records(turn, unit, position)
      for position, end, record in records:
        ticket = self._ticket(epoch, unit, position, record)
        if isinstance(record, Skip) and record.unit != 'records':
          window.files.append(ticket)
          continue
        window.add(ticket, rotate_index(dealt, stream.fan))
        dealt += 1
        if window.count == stream.window * stream.fan:
          self._open.keep(self._place(turn, end), records, stream.records.cost)
          return self._shuffle(window, start), (turn, end, dealt)
      if from_start and window.count == count_before:
        barren.add(unit)
      if not window.count and len(barren) >= min(len(stream.records), _BARREN):
        raise UserError(self._describe_barren(len(barren), window.files[-1]))
      last_epoch = epoch
      turn += 1
      position = 0
      epoch, unit = stream.unit(self.index, turn)
      if window.count and epoch != last_epoch:
        return self._shuffle(window, start), (turn, 0, dealt)

  def _records(
    self, turn: int, unit: int, position: int
  ) -> Iterator[tuple[int, int, Record | Skip]]:
    """The records of a unit from a position on; of an iterator that waits there if there is one."""
    waiting = self._open.take(self._place(turn, position))
    return waiting or self.stream.records.read(unit, position, ahead=self._open.ahead)

  def _place(self, turn: int, position: int) -> tuple[int, int, int, int]:
    """A position in a unit, among all streams of the process."""
    return self.index, self.stream.number, turn, position

  def _ticket(self, epoch: int, unit: int, position: int, record: Record | Skip) -> Ticket:
    return Ticket(
      key=(self.stream.number, epoch, unit, position),
      use=self.stream.use,
      read=functools.partial(_identity, record),
      epoch=epoch,
      unit=unit,
      position=position,
    )

  def _describe_barren(self, count: int, last_file: Ticket) -> str:
    last = last_file.read()
    reason = last.reason if isinstance(last, Skip) else ''
    return (
      f'{self.stream.name}: {count} files in a row have no record '
      f'({reason or "read to its end"}: {last.origin}); check the path, or give more'
    )

  def _shuffle(self, window: _Window, start: _Start) -> dict[int, list[Ticket]]:
    """The tickets of a window, each shard's in its own order; files last."""
    tickets = window.tickets
    if self.stream.seed is not None:
      for shard, in_order in tickets.items():
        seed = (self.stream.seed, self.stream.number, self.index, shard, *start)
        order = np.random.default_rng(seed).permutation(len(in_order))
        tickets[shard] = [in_order[i] for i in order]
    if 0 in tickets:
      tickets[0] += window.files
    return tickets


class StreamShard:
  """A shard's tickets of a stream; while one window is used up, the next one is read.

  Args:
    reader: the reader of the shard.
    shard: the number of the shard, among those of the reader.
  """

  def __init__(self, reader: Reader, shard: int):
    self._reader = reader
    self._shard = shard
    self._start = (0, 0, 0)
    self._index = 0
    self._current: Future | None = None
    self._next: Future | None = None

  def begin(self) -> None:
    """Begins to read the current window, and does not wait for it."""
    self._window()

  def _window(self) -> Future:
    if self._current is None:
      self._current = self._reader.window(self._start)
    return self._current

  def __next__(self) -> Ticket:
    while True:
      tickets, next_start = self._window().result()
      if self._next is None:
        self._next = self._reader.window(next_start)
      if self._index < len(tickets[self._shard]):
        self._index += 1
        return tickets[self._shard][self._index - 1]
      self._start = next_start
      self._index = 0
      self._current = self._next
      self._next = None

  def get_state(self) -> list[int]:
    """[turn, position, dealt] of the window, and the index in it."""
    return [*self._start, self._index]

  def set_state(self, state: Sequence[int]) -> None:
    """Goes to a state."""
    turn, position, dealt, self._index = state
    self._start = (turn, position, dealt)
    self._current = None
    self._next = None


def _identity(record: Record | Skip) -> Record | Skip:
  return record
