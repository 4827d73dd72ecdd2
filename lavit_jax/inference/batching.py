"""From rows to batches that the device works on, and back to the host while it works on."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

SHOW_AFTER = 2.0  # seconds of work, after which a bar shows how far it is


def batch_ranges(count: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
  """Covers range(count) by (n, rows): n rows that count, at most `size`, filled up to a power of two by repeating the last."""
  for start in range(0, count, size):
    n = min(size, count - start)
    yield n, start + np.minimum(np.arange(1 << (n - 1).bit_length()), n - 1)


def double_buffer(dispatched: Iterable) -> Iterator:
  """The same, each after the next has been asked for: so the device has more to do while the host waits for what it did."""
  before = []
  for each in dispatched:
    yield from before
    before = [each]
  yield from before


def fetch_batches(
  dispatched: Iterable[tuple[int, Any]], total: int, what: str
) -> list[tuple[int, Any]]:
  """(n, arrays) of each batch as they are dispatched -> the same as numpy arrays, with a bar of the n of `total` that are done."""
  out = []
  with _bar(total, what) as advance:
    for n, found in double_buffer(dispatched):
      out.append((n, jax.device_get(found)))
      advance(n)
  return out


@contextlib.contextmanager
def _bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
  """A bar on a terminal, once there has been work for SHOW_AFTER seconds; gives the function that moves it on."""
  if not sys.stderr.isatty():
    yield lambda count: None
    return
  bar = Progress(
    *Progress.get_default_columns(),
    TimeElapsedColumn(),
    console=Console(stderr=True),
    transient=True,
  )
  task = bar.add_task(what, total=total)

  def show():
    sys.stderr.write('\r\x1b[K')  # takes the place of the line that `batch` may have there
    bar.start()

  timer = threading.Timer(SHOW_AFTER, show)
  timer.daemon = True
  timer.start()
  try:
    yield lambda count: bar.advance(task, count)
  finally:
    timer.cancel()
    timer.join()
    bar.stop()
