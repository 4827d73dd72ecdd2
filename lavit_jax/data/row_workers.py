"""The rows of batches, made by threads from the tickets of shards (shards.py).

Records of which no row can be made are skipped and counted.
"""

from __future__ import annotations

import atexit
import collections
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import grain

from lavit_jax.data.open_units import OpenUnits
from lavit_jax.data.record import Skip
from lavit_jax.data.shards import Shard, Ticket
from lavit_jax.data.skips import SkipCounter
from lavit_jax.data.text_fields import NOTES

Row = dict[str, Any]
OpenShards = Callable[[Executor], tuple[Mapping[int, Shard], OpenUnits]]
_MIN_AHEAD = 64  # tickets that the threads work on, at least
_READERS = 16  # threads that read windows
_Key = tuple[Any, ...]
_LATER_KEYS = ('contents',)  # of a source's identity; earlier versions did not save them
_alive: weakref.WeakSet[grain.DatasetIterator] = weakref.WeakSet()


class RowDataset(grain.IterDataset):
  """The rows made of the tickets of shards: `rows_per_shard` of one shard, then of the next.

  Args:
    open_shards: (pool that reads for them) -> the shards by number, and their open units.
    identity: distinguishes the data in a state (sources.mix_sources): a state of other files, or
      of another number of shards, is refused.
    make_row: a ticket -> the row, or why there is none.
    skipped: counts the skips.
    limit: the share of a source that may be skipped.
    num_threads: threads that make rows; 0: none.
    rows_per_shard: rows of each shard in a global batch.

  Raises:
    UserError: when iterated, as SkipCounter.add.
  """

  def __init__(
    self,
    open_shards: OpenShards,
    identity: dict[str, Any],
    make_row: Callable[[Ticket], Row | Skip],
    skipped: SkipCounter,
    limit: float,
    num_threads: int,
    rows_per_shard: int,
  ):
    super().__init__()
    self.open_shards = open_shards
    self.identity = identity
    self.make_row = make_row
    self.skipped = skipped
    self.limit = limit
    self.num_threads = num_threads
    self.rows_per_shard = rows_per_shard

  def __iter__(self) -> grain.DatasetIterator:
    return _RowIterator(self)


class _Pending(NamedTuple):
  """A ticket in the threads, with the state of its source after it."""

  ticket: Ticket
  future: Future | None
  source_state: Any


class _ShardRows:
  """The rows of one shard, in order.

  The source of a row depends on the row's number alone. The row is made of the next record of that
  source: a skipped record is replaced by one of the same source, so that the weights are those of
  the rows.

  Attributes:
    state: {'taken': rows so far, 'sources': the state of each}.
  """

  def __init__(
    self,
    shard: Shard,
    make_row: Callable[[Ticket], Row | Skip],
    pool: Executor | None,
    ahead: int,
  ):
    self.shard = shard
    self.state = shard.get_state()
    self._make_row = make_row
    self._pool = pool
    self._ahead = ahead if pool else 0
    self._pending: list[collections.deque[_Pending]] = []  # of each source, in order
    for _ in shard.sources:
      self._pending.append(collections.deque())
    self._planned = self.state['taken']  # rows that have a ticket

  def set_state(self, state: dict[str, Any]) -> None:
    self.cancel()
    self.shard.set_state(state)
    self.state = self.shard.get_state()
    self._planned = state['taken']

  def fill(self) -> None:
    """Draws a ticket for each row that is made ahead of time."""
    while self._planned < self.state['taken'] + self._ahead:
      self._draw(self.shard.source_of(self._planned))
      self._planned += 1

  def take(self) -> tuple[Row | Skip, int, Ticket]:
    """(row or skip, number of the source, ticket) of the next ticket for the current row.

    A row ends with the first ticket that is not skipped.
    """
    self.fill()
    row = self.state['taken']
    number = self.shard.source_of(row)
    if not self._pending[number]:
      self._draw(number)
      self._planned = max(self._planned, row + 1)
    ticket, future, source_state = self._pending[number].popleft()
    outcome = future.result() if future else self._make_row(ticket)
    self.state['sources'][number] = source_state
    if not isinstance(outcome, Skip):
      self.state['taken'] = row + 1
    elif self._pool:
      self._draw(number)
    return outcome, number, ticket

  def cancel(self) -> None:
    """Drops all tickets in the threads."""
    for pending in self._pending:
      while pending:
        future = pending.pop().future
        if future:
          future.cancel()

  def _draw(self, number: int) -> None:
    source = self.shard.sources[number]
    ticket = next(source)
    future = self._pool.submit(self._make_row, ticket) if self._pool else None
    self._pending[number].append(_Pending(ticket, future, source.get_state()))


class _RowIterator(grain.DatasetIterator):
  """The iterator of a RowDataset."""

  def __init__(self, dataset: RowDataset):
    super().__init__()
    self._dataset = dataset
    self._reading = ThreadPoolExecutor(_READERS)
    self._pool = ThreadPoolExecutor(dataset.num_threads) if dataset.num_threads else None
    shards, self._open_units = dataset.open_shards(self._reading)
    self._order: list[int] = []  # the shard of each row, again and again
    for number in shards:
      self._order += [number] * dataset.rows_per_shard
    ahead = max(dataset.rows_per_shard, -(-_MIN_AHEAD // len(shards)))
    self._shards = {
      number: _ShardRows(shard, dataset.make_row, self._pool, ahead)
      for number, shard in shards.items()
    }
    self._count = 0
    self._begun = False

  def __next__(self) -> Row:
    if not self._begun:
      self._begin()
    dataset = self._dataset
    rows = self._shards[self._order[self._count % len(self._order)]]
    while True:
      outcome, source, ticket = rows.take()
      info = rows.shard.infos[source]
      dataset.skipped.add(outcome, dataset.limit, source, info, ticket.unit, ticket.position)
      if not isinstance(outcome, Skip):
        for note in outcome.pop(NOTES, ()):
          left_out = Skip(note, f'{info.name}: record {ticket.position}', 'members')
          dataset.skipped.add(left_out, dataset.limit, source, info)
        self._count += 1
        return outcome

  def _begin(self) -> None:
    """Starts all shards together, so that none waits for its first turn to begin to read."""
    self._begun = True
    for rows in self._shards.values():
      rows.shard.begin()
    for rows in self._shards.values():
      rows.fill()

  def get_state(self) -> dict[str, Any]:
    shards = {
      str(number): {'taken': rows.state['taken'], 'sources': list(rows.state['sources'])}
      for number, rows in self._shards.items()
    }
    return {'of': self._dataset.identity, 'shards': shards}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a state between two batches, which may have more shards than this iterator."""
    changes = list_changes(state['of'], self._dataset.identity)
    if changes:
      raise ValueError(f'changed are {", ".join(changes)}')
    for number, rows in self._shards.items():
      rows.set_state(state['shards'][str(number)])
    self._count = 0
    self._begun = False

  def close(self) -> None:
    if self._closed:
      return
    super().close()
    for rows in self._shards.values():
      rows.cancel()
    for pool in (self._pool, self._reading):
      if pool:
        pool.shutdown(wait=False, cancel_futures=True)
    self._open_units.close()


def list_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """The differences of two identities of data: 'sources[0].window 5 -> 7', 'seed 1 -> 2' ..."""
  old = _flatten(before)
  new = _flatten(now)
  changes = []
  for key in {**old, **new}:
    not_saved = key[-1] in _LATER_KEYS and key not in old
    if old.get(key) != new.get(key) and not not_saved:
      name = f'sources[{key[1]}].{key[2]}' if key[0] == 'sources' else key[0]
      changes.append(f'{name} {old.get(key, "(none)")} -> {new.get(key, "(none)")}')
  return changes


def _flatten(identity: dict[str, Any]) -> dict[_Key, Any]:
  """{(key,): value, ('sources', number, key): value}."""
  flat: dict[_Key, Any] = {}
  for key, value in identity.items():
    if key != 'sources':
      flat[(key,)] = value
  for number, source in enumerate(identity['sources']):
    for key, value in source.items():
      flat['sources', number, key] = value
  return flat


def closed_at_exit(iterator: grain.DatasetIterator) -> grain.DatasetIterator:
  """The iterator itself, whose threads will end before the interpreter does.

  Threads of grain are daemons, which would be torn out of native code.
  """
  _alive.add(iterator)
  return iterator


@atexit.register
def _close_all() -> None:
  for iterator in list(_alive):
    iterator.close()
    iterator.close = _do_nothing  # __del__ calls it again when the modules it needs are gone


def _do_nothing() -> None:
  pass
