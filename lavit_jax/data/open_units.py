"""Units of streams that stay open between windows, within a bound on files and memory."""

from __future__ import annotations

import contextlib
import resource
import threading
import weakref
from collections.abc import Generator, Hashable, Iterator
from typing import Any

from lavit_jax.data import paths


def _max_open() -> int:
  """Tars that may wait open in a process, as far as it may open files."""
  files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
  return min(512, max(files, 128) // 2)


_MAX_OPEN = _max_open()  # in tars; an open row group costs 8 of them or more (parquets.py)


class OpenUnits:
  """Iterators of units that `readers` read in turn, by the position where each one stopped.

  What waits longest is closed when there is too much of it in the process. What the open files
  have read ahead (`ahead` bytes each) is, with their buffers, about half a gigabyte at most; to
  which Parquet adds a gigabyte of pages at most, over everything that waits and is being read.

  Args:
    readers: how many units are read in turn.
  """

  _instances: weakref.WeakSet[OpenUnits] = weakref.WeakSet()
  # reentrant: a garbage-collected iterator may close files while its thread has the lock
  _lock = threading.RLock()
  _changed = threading.Condition(_lock)
  _busy = [0]  # the cost of what is being read, over all instances

  def __init__(self, readers: int = 1):
    self.ahead = paths.read_ahead_size(readers)
    self._waiting: dict[Hashable, tuple[Any, int]] = {}  # position -> (iterator, cost)
    self._cost = 0
    self._closed = False
    with self._lock:
      self._instances.add(self)

  @contextlib.contextmanager
  def reserve(self, cost: int, position: Hashable) -> Generator[None]:
    """Waits until a unit of this cost may be read beside those that are being read.

    Units that wait are closed to make room, except the one that waits at `position`.
    """
    with self._changed:
      while self._busy[0] and self._busy[0] + cost > _MAX_OPEN:
        self._changed.wait()
      self._busy[0] += cost
      others = [other for other in self._waiting if other != position]
      while others and self._busy[0] + self._total_cost() > _MAX_OPEN:
        self._close(others.pop(0))
    try:
      yield
    finally:
      with self._changed:
        self._busy[0] -= cost
        self._changed.notify_all()

  def take(self, position: Hashable) -> Iterator | None:
    """The iterator that waits at a position, which is removed; None if there is none."""
    with self._lock:
      records, cost = self._waiting.pop(position, (None, 0))
      self._cost -= cost
      return records

  def keep(self, position: Hashable, records: Iterator, cost: int) -> None:
    """Lets an iterator of a unit wait at a position, in place of one that waits there."""
    with self._lock:
      self.take(position)
      self._waiting[position] = (records, cost)
      self._cost += cost
      while self._waiting and (self._closed or self._total_cost() > _MAX_OPEN):
        self._close(next(iter(self._waiting)))

  def close(self) -> None:
    """Closes all that wait, and whatever is kept from now on."""
    with self._lock:
      self._closed = True
      while self._waiting:
        self._close(next(iter(self._waiting)))

  def _close(self, position: Hashable) -> None:
    records: Any = self.take(position)
    records.close()

  @classmethod
  def _total_cost(cls) -> int:
    return sum(units._cost for units in cls._instances)
