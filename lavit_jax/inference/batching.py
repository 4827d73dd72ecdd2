"""Batches of rows for the device, and their results on the host while the device goes on."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar('T')

MAX_BATCH = 16  # rows that are computed at once
SHOW_AFTER = 2.0  # seconds of work, after which a progress bar appears


def batch_ranges(count: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
  """Splits range(count) into batches whose sizes are powers of two, so that few shapes compile.

  Args:
    count: number of rows.
    size: most rows of a batch, a power of two.

  Yields:
    n and i32[2^k]: the indices of n <= size rows, padded with copies of the last.
  """
  for start in range(0, count, size):
    n = min(size, count - start)
    padded = 1 << (n - 1).bit_length()
    yield n, start + np.minimum(np.arange(padded), n - 1)


def double_buffer(dispatched: Iterable[T]) -> Iterator[T]:
  """Yields each item after the next has been dispatched.

  The device then has work while the host waits for the item.
  """
  previous: list[T] = []
  for item in dispatched:
    yield from previous
    previous = [item]
  yield from previous


def fetch_batches(
  dispatched: Iterable[tuple[int, Any]], total: int, label: str
) -> list[tuple[int, Any]]:
  """Copies the results of batches to the host, with a progress bar.

  Args:
    dispatched: (n, tree of device arrays) for each batch of n rows, as it is dispatched.
    total: number of rows.
    label: of the bar.

  Returns:
    (n, tree of numpy arrays) for each batch.
  """
  results = []
  with _progress_bar(total, label) as advance:
    for n, arrays in double_buffer(dispatched):
      results.append((n, jax.device_get(arrays)))
      advance(n)
  return results


@contextlib.contextmanager
def _progress_bar(total: int, label: str) -> Iterator[Callable[[int], None]]:
  """Shows a bar on a terminal after SHOW_AFTER seconds of work; yields its `advance(count)`."""
  if not sys.stderr.isatty():
    yield lambda count: None
    return
  from rich.console import Console
  from rich.progress import Progress, TimeElapsedColumn

  bar = Progress(
    *Progress.get_default_columns(),
    TimeElapsedColumn(),
    console=Console(stderr=True),
    transient=True,
  )
  task = bar.add_task(label, total=total)

  def show() -> None:
    sys.stderr.write('\r\x1b[K')  # clears the progress line of the batch commands
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
