"""Rows of batches, made of the tickets of shards (streams.py) by threads; what no row can be made of is skipped, counted and told."""

from __future__ import annotations

import atexit
import collections
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor

import grain

from lavit_jax.data.formats import Skip
from lavit_jax.data.skips import Skipped
from lavit_jax.data.streams import OpenUnits, Shard, Ticket

_AHEAD = 64  # tickets in the threads at least
_READERS = 16  # threads that read windows
_alive = weakref.WeakSet()


class Made(grain.IterDataset):
  """What `make` makes of the tickets of shards, by `num_threads` threads (0: none): `each` of a shard, then of the next, and again.

  `deal(pool)` gives the shards by number, and what they keep open; the pool reads for them. `of` says in the state what it is a state of
  (sources.mix): nothing goes on with other files, or with another number of shards. What `make` skips is counted in `skipped`.

  Raises UserError, as Skipped.add, when more than the share `limit` was skipped.
  """

  def __init__(self, deal: Callable[[Executor], tuple[Mapping[int, Shard], OpenUnits]], of: dict, make: Callable[[Ticket], dict | Skip],
               skipped: Skipped, limit: float, num_threads: int, each: int):
    super().__init__()
    self.deal, self.of, self.make, self.skipped, self.limit, self.num_threads, self.each = deal, of, make, skipped, limit, num_threads, each

  def __iter__(self):
    return _MadeIterator(self)


class _ShardRows:
  """The examples of one shard, row after row.

  Which source a row is of depends on the row's number alone. It gets the next example of that
  source: what is skipped is replaced by the same source, so that the weights are those of the rows.
  """

  def __init__(self, shard: Shard, make: Callable[[Ticket], dict | Skip], pool: Executor | None, ahead: int):
    self.shard, self._make, self._pool = shard, make, pool
    self._ahead = ahead if pool else 0
    self._drawn = [collections.deque() for _ in shard.sources]  # per source, in order
    self.state = shard.get_state()
    self._planned = self.state['taken']  # rows that have a ticket

  def set_state(self, state: dict) -> None:
    self.drop()
    self.shard.set_state(state)
    self.state = self.shard.get_state()
    self._planned = state['taken']

  def fill(self) -> None:
    """Draws a ticket for each row that is ahead."""
    while self._planned < self.state['taken'] + self._ahead:
      self._draw(self.shard.source_of(self._planned))
      self._planned += 1

  def take(self) -> tuple[dict | Skip, int, Ticket]:
    """What became of the next ticket of the row's source, which source that is, and the ticket. An example ends the row."""
    self.fill()
    row = self.state['taken']
    number = self.shard.source_of(row)
    if not self._drawn[number]:
      self._draw(number)
      self._planned = max(self._planned, row + 1)
    ticket, future, state = self._drawn[number].popleft()
    made = future.result() if future else self._make(ticket)
    self.state['sources'][number] = state
    if not isinstance(made, Skip):
      self.state['taken'] = row + 1
    elif self._pool:
      self._draw(number)
    return made, number, ticket

  def drop(self) -> None:
    for drawn in self._drawn:
      while drawn:
        _, future, _ = drawn.pop()
        if future:
          future.cancel()

  def _draw(self, number: int) -> None:
    source = self.shard.sources[number]
    ticket = next(source)
    future = self._pool.submit(self._make, ticket) if self._pool else None
    self._drawn[number].append((ticket, future, source.get_state()))


class _MadeIterator(grain.DatasetIterator):

  def __init__(self, made: Made):
    super().__init__()
    self._made, self._reading = made, ThreadPoolExecutor(_READERS)
    self._pool = ThreadPoolExecutor(made.num_threads) if made.num_threads else None
    shards, self._open = made.deal(self._reading)
    self._order = [number for number in shards for _ in range(made.each)]
    ahead = max(made.each, -(-_AHEAD // len(shards)))  # tickets of each shard in the threads
    self._rows = {number: _ShardRows(shard, made.make, self._pool, ahead) for number, shard in shards.items()}
    self._given, self._begun = 0, False

  def __next__(self) -> dict:
    if not self._begun:  # all at once, not one when it is its turn
      self._begun = True
      for rows in self._rows.values():
        rows.shard.begin()
      for rows in self._rows.values():
        rows.fill()
    rows = self._rows[self._order[self._given % len(self._order)]]
    while True:
      example, source, ticket = rows.take()
      about = rows.shard.abouts[source]
      self._made.skipped.add(example, self._made.limit, source, about, ticket.unit)
      if not isinstance(example, Skip):
        self._given += 1
        return example

  def get_state(self):
    return {'of': self._made.of, 'shards': {str(number): _copy(rows.state) for number, rows in self._rows.items()}}

  def set_state(self, state):
    """`state` may have more shards than these. It is one between batches."""
    if changes := changed(state['of'], self._made.of):
      raise ValueError(f'changed are {", ".join(changes)}')
    for number, rows in self._rows.items():
      rows.set_state(state['shards'][str(number)])
    self._given, self._begun = 0, False

  def close(self):
    if self._closed:
      return
    super().close()
    self._drop()
    for pool in filter(None, (self._pool, self._reading)):
      pool.shutdown(wait=False, cancel_futures=True)
    self._open.close()

  def _drop(self):
    for rows in self._rows.values():
      rows.drop()


def _copy(state: dict) -> dict:
  return {'taken': state['taken'], 'sources': list(state['sources'])}


def changed(was: dict, now: dict) -> list[str]:
  """What differs between two accounts `of` data: 'sources[0].window 5 -> 7', 'seed 1 -> 2' ..."""
  was, now = _flat(was), _flat(now)
  for key in [key for key in now if key.endswith('.contents') and key not in was]:
    del now[key]  # an earlier version did not write it
  return [f'{key} {was.get(key, "(none)")} -> {now.get(key, "(none)")}' for key in {**was, **now} if was.get(key) != now.get(key)]


def _flat(of: dict) -> dict:
  rest = {key: value for key, value in of.items() if key != 'sources'}
  return rest | {f'sources[{i}].{key}': value for i, source in enumerate(of['sources']) for key, value in source.items()}


def closed_at_exit(iterator: grain.DatasetIterator) -> grain.DatasetIterator:
  """The iterator itself, whose thread ends before the interpreter does; grain's is a daemon, which would be torn out of native code."""
  _alive.add(iterator)
  return iterator


@atexit.register
def _close():
  for iterator in list(_alive):
    iterator.close()
    iterator.close = lambda: None  # which __del__ calls once more, when the modules that it needs are gone
