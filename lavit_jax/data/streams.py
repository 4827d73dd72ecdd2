"""Endless, seeded, sharded streams of records that stop and go on at any place, and the threads that make examples of them (grain).

A `Ticket` says how to get a record; the pictures of stores are read where they are decoded, in parallel. States are a few integers:
a stream's is the start of a window and a place in it, and going on reads that window again.
"""

from __future__ import annotations

import atexit
import collections
import functools
import logging
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import grain
import numpy as np

from lavit_jax.data.formats import Record, Skip
from lavit_jax.errors import UserError

_INLINE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
_LEAST = {'records': 1000, 'files': 20}  # seen before their share of skipped ones means something
_TOLD = 3  # of each reason, by name
_AHEAD = 64  # tickets in the threads at least
_alive = weakref.WeakSet()


class Ticket(NamedTuple):
  """A record to come. `key` is the same in every run, whatever the number of processes: it seeds what is random about the example."""

  key: tuple[int, ...]
  use: str
  read: Callable[[], Record | Skip]


class Skipped:
  """Counts what this process left out by reason, since it started, and names the first few."""

  def __init__(self):
    self.seen, self.skipped, self.reasons = collections.Counter(), collections.Counter(), collections.Counter()

  def add(self, made: dict | Skip, limit: float) -> None:
    """Counts an example, or a Skip. Raises UserError when more than the share `limit` was skipped.

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
    if self.seen[unit] >= _LEAST[unit] and self.skipped[unit] > limit * self.seen[unit]:
      reasons = ', '.join(f'{reason} {count}' for reason, count in self.reasons.most_common())
      raise UserError(f'{self.skipped[unit]} of {self.seen[unit]} {unit} were skipped ({reasons}), the last one {made.origin}; '
                      f'mend the data or raise data.max_skipped={limit}')

  def metrics(self) -> dict[str, int]:
    """{'data/skipped_corrupt_image': 3, ...}."""
    return {f'data/skipped_{reason.replace(" ", "_")}': count for reason, count in sorted(self.reasons.items())}


def store(records, number: int, use: str, seed: int | None, shard_index: int, shard_count: int) -> grain.IterDataset:
  """Tickets of a store (formats.py), shuffled anew each epoch (seed None: in order); a process takes every `shard_count`-th.

  So the order of all of them does not depend on the number of processes.
  """
  def ticket(position, index):
    return Ticket((number, position), use, functools.partial(records.read, index))

  indices = grain.MapDataset.range(len(records))
  indices = indices if seed is None else indices.shuffle(seed)
  return indices.repeat().map_with_index(ticket)[shard_index::shard_count].to_iter_dataset(_INLINE)


class Windows(grain.IterDataset):
  """Tickets of a stream (formats.py): its units in a new order each epoch, records shuffled within windows of `window` of them.

  Process s of S takes every S-th unit of that order, so no tar is read by two; if there are fewer units than processes, each reads
  them all and takes every S-th record. While one window is used up, the next one is read. `seed` None: in order.
  """

  def __init__(self, records, number: int, use: str, seed: int | None, shard_index: int, shard_count: int, window: int):
    super().__init__()
    self.records, self.number, self.use, self.seed, self.window = records, number, use, seed, window
    self.shard_index, self.shard_count = shard_index, shard_count
    self.by_unit = len(records) >= shard_count

  def __iter__(self):
    return _WindowsIterator(self)

  def order(self, epoch: int) -> np.ndarray:
    """The units of an epoch, for this process."""
    units = np.arange(len(self.records))
    if self.seed is not None:
      np.random.default_rng((self.seed, self.number, epoch)).shuffle(units)
    return units[self.shard_index::self.shard_count] if self.by_unit else units

  def read(self, epoch: int, place: int, start: int) -> tuple[list[Ticket], tuple[int, int, int]]:
    """The window that starts at `start` in the unit at `place` of the epoch's order, and where the next one starts.

    Raises UserError if a whole epoch holds nothing for this process.
    """
    order, tickets, count, here = self.order(epoch), [], 0, (epoch, place, start)
    first, step = (0, 1) if self.by_unit else (self.shard_index, self.shard_count)
    while place < len(order):
      unit = int(order[place])
      for start, end, record in self.records.read(unit, start):
        last = isinstance(record, Skip) and record.unit == 'files'
        if last or count % step == first:
          tickets.append(Ticket((self.number, epoch, unit, start), self.use, functools.partial(_same, record)))
        count += not last
        if count == self.window * step:
          return self._shuffled(tickets, here), (epoch, place, end)
      place, start = place + 1, 0
    if here[1:] == (0, 0) and all(isinstance(ticket.read(), Skip) for ticket in tickets):
      raise UserError(f'{len(order)} files have no record for process {self.shard_index} of {self.shard_count} '
                      f'({tickets[-1].read().reason or "read to its end"}: {tickets[-1].read().origin}); check the path, or give more')
    return self._shuffled(tickets, here), (epoch + 1, 0, 0)

  def _shuffled(self, tickets: list[Ticket], here: tuple[int, int, int]) -> list[Ticket]:
    if self.seed is None:
      return tickets
    return [tickets[i] for i in np.random.default_rng((self.seed, self.number, *here)).permutation(len(tickets))]


class _WindowsIterator(grain.DatasetIterator):

  def __init__(self, windows: Windows):
    super().__init__()
    self._windows, self._pool = windows, ThreadPoolExecutor(1)
    self.set_state({'window': [0, 0, 0], 'index': 0})

  def __next__(self) -> Ticket:
    while True:
      if self._tickets is None:
        self._tickets, self._after = (self._next or self._submit(self._start)).result()
        self._next = self._submit(self._after)
      if self._index < len(self._tickets):
        self._index += 1
        return self._tickets[self._index - 1]
      self._start, self._index, self._tickets = self._after, 0, None

  def get_state(self):
    return {'window': list(self._start), 'index': self._index}

  def set_state(self, state):
    self._start, self._index = tuple(state['window']), state['index']
    self._tickets = self._next = None

  def close(self):
    super().close()
    if self._next:
      self._next.cancel()
    self._pool.shutdown(wait=False)

  def _submit(self, start: tuple[int, int, int]) -> Future:
    return self._pool.submit(self._windows.read, *start)


class Made(grain.IterDataset):
  """What `make` makes of each ticket, in order, by `num_threads` threads (0: none); what it skips is counted in `skipped`.

  `of` says in the state what it is a state of (sources.mix): nothing goes on with other files, or with another number of processes.

  Raises UserError, as Skipped.add, when more than the share `limit` was skipped.
  """

  def __init__(self, tickets: grain.IterDataset, of: dict, make: Callable[[Ticket], dict | Skip], skipped: Skipped, limit: float,
               num_threads: int, ahead: int):
    super().__init__(tickets)
    self.of, self.make, self.skipped, self.limit = of, make, skipped, limit
    self.num_threads, self.ahead = num_threads, max(ahead, _AHEAD)

  def __iter__(self):
    return _MadeIterator(self._parent.__iter__(), self)


class _MadeIterator(grain.DatasetIterator):

  def __init__(self, tickets: grain.DatasetIterator, made: Made):
    super().__init__(tickets)
    self._made, self._waiting, self._state = made, collections.deque(), tickets.get_state()
    self._pool = ThreadPoolExecutor(made.num_threads) if made.num_threads else None

  def __next__(self) -> dict:
    while True:
      example, self._state = self._take()
      self._made.skipped.add(example, self._made.limit)
      if not isinstance(example, Skip):
        return example

  def _take(self) -> tuple[dict | Skip, dict]:
    """The next example, and the state of the tickets behind it."""
    if self._pool is None:
      return self._made.make(next(self._parent)), self._parent.get_state()
    while len(self._waiting) < self._made.ahead:
      ticket = next(self._parent)
      self._waiting.append((self._pool.submit(self._made.make, ticket), self._parent.get_state()))
    future, state = self._waiting.popleft()
    return future.result(), state

  def get_state(self):
    return {'tickets': self._state, 'of': self._made.of}

  def set_state(self, state):
    if changes := changed(state['of'], self._made.of):
      raise ValueError(f'changed are {", ".join(changes)}')
    self._drop()
    self._parent.set_state(state['tickets'])
    self._state = state['tickets']

  def close(self):
    super().close()
    self._drop()
    if self._pool:
      self._pool.shutdown(wait=False)

  def _drop(self):
    while self._waiting:
      self._waiting.pop()[0].cancel()


def changed(was: dict, now: dict) -> list[str]:
  """What differs between two accounts `of` data: 'sources[0].window 5 -> 7', 'seed 1 -> 2' ..."""
  if isinstance(was, list):  # as earlier versions had it: units of each source, and processes
    was = {'processes': was[-1], 'sources': [{'units': units} for units in was[:-1]]}
    now = {'processes': now['processes'], 'sources': [{'units': source['units']} for source in now['sources']]}
  was, now = _flat(was), _flat(now)
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


def _same(record):
  return record
