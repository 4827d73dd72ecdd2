"""Rows of batches, made of the tickets of shards (streams.py) by threads; what no row can be made of is skipped, counted and told."""

from __future__ import annotations

import atexit
import collections
import logging
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor

import grain

from lavit_jax.data.formats import Skip
from lavit_jax.data.streams import OpenUnits, Shard, Ticket
from lavit_jax.errors import UserError

_LEAST = {'records': 1000, 'files': 20}  # seen before their share of skipped ones means something
_TOLD = 3  # of each reason, by name
_AHEAD = 64  # tickets in the threads at least
_READERS = 16  # threads that read windows
_alive = weakref.WeakSet()


class Skipped:
  """Counts what this process left out by reason, since it started, and names the first few."""

  def __init__(self):
    self.seen, self.skipped, self.reasons = collections.Counter(), collections.Counter(), collections.Counter()

  def add(self, made: dict | Skip, limit: float) -> None:
    """Counts an example, or a Skip. Raises UserError when more than the share `limit` was skipped, or all records, whatever the limit.

    Records and files (tars, row groups) are judged apart: a tar that breaks off takes an unknown number of records along.
    """
    unit = made.unit if isinstance(made, Skip) else 'records'
    self.seen[unit] += 1
    if not isinstance(made, Skip) or not made.reason:
      return
    self.skipped[unit] += 1
    self.reasons[made.reason] += 1
    if self.reasons[made.reason] <= _TOLD:
      logging.getLogger(__name__).warning('skipped: %s, %s', made.reason, made.origin)
    nothing = unit == 'records' and self.skipped[unit] == self.seen[unit]  # files without a record: streams.py
    if self.seen[unit] >= _LEAST[unit] and (nothing or self.skipped[unit] > limit * self.seen[unit]):
      reasons = ', '.join(f'{reason} {count}' for reason, count in self.reasons.most_common())
      raise UserError(f'{self.skipped[unit]} of {self.seen[unit]} {unit} were skipped ({reasons}), the last one {made.origin}; '
                      + (f'mend the data or raise data.max_skipped={limit}' if limit < 1 else 'there is no example in the data'))

  def metrics(self) -> dict[str, int]:
    """{'data/skipped_corrupt_image': 3, ...}."""
    return {f'data/skipped_{reason.replace(" ", "_")}': count for reason, count in sorted(self.reasons.items())}


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


class _MadeIterator(grain.DatasetIterator):

  def __init__(self, made: Made):
    super().__init__()
    self._made, self._reading = made, ThreadPoolExecutor(_READERS)
    self._pool = ThreadPoolExecutor(made.num_threads) if made.num_threads else None
    self._shards, self._open = made.deal(self._reading)
    self._order = [number for number in self._shards for _ in range(made.each)]
    self._ahead = max(made.each, -(-_AHEAD // len(self._shards)))  # tickets of each shard in the threads
    self._waiting = {number: collections.deque() for number in self._shards}
    self._given, self._begun = 0, False
    self._states = {number: shard.get_state() for number, shard in self._shards.items()}

  def __next__(self) -> dict:
    if not self._begun:  # all at once, not one when it is its turn
      self._begun = True
      for shard in self._shards.values():
        shard.begin()
      for number in self._shards:
        self._fill(number)
    number = self._order[self._given % len(self._order)]
    while True:
      example, self._states[number] = self._take(number)
      self._made.skipped.add(example, self._made.limit)
      if not isinstance(example, Skip):
        self._given += 1
        return example

  def _take(self, number: int) -> tuple[dict | Skip, dict]:
    """The next example of a shard, and the state of the shard behind it."""
    if self._pool is None:
      return self._made.make(next(self._shards[number])), self._shards[number].get_state()
    self._fill(number)
    future, state = self._waiting[number].popleft()
    return future.result(), state

  def _fill(self, number: int) -> None:
    shard, waiting = self._shards[number], self._waiting[number]
    while self._pool and len(waiting) < self._ahead:
      ticket = next(shard)
      waiting.append((self._pool.submit(self._made.make, ticket), shard.get_state()))

  def get_state(self):
    return {'of': self._made.of, 'shards': {str(number): state for number, state in self._states.items()}}

  def set_state(self, state):
    """`state` may have more shards than these. It is one between batches."""
    if changes := changed(state['of'], self._made.of):
      raise ValueError(f'changed are {", ".join(changes)}')
    self._drop()
    for number, shard in self._shards.items():
      self._states[number] = state['shards'][str(number)]
      shard.set_state(self._states[number])
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
    for waiting in self._waiting.values():
      while waiting:
        waiting.pop()[0].cancel()


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
