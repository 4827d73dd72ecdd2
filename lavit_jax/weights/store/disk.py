"""Files of gigabytes, read once or written once: past the page cache, or through little of it.

A model's files fill the page cache and push out what others keep there; and on a virtual machine the first use of each page of it costs
the processor more than the disk takes for its content.
"""

from __future__ import annotations

import concurrent.futures
import errno
import os
import pathlib
from collections.abc import Iterable

import numpy as np

SECTOR = 4096  # bytes; a read past the page cache begins and ends at multiples of it, in memory too
FLUSH_BYTES = 256 << 20  # what may be written before the disk is to have it


def read_bytes(path: pathlib.Path, start: int, size: int) -> np.ndarray:
  """A stretch of a file, u8[size], or up to the end of the file; past the page cache where the file system allows it.

  Raises:
    OSError: the file cannot be read.
  """
  skip = start % SECTOR
  room = np.empty(skip + size + 2 * SECTOR, np.uint8)
  room = room[-room.ctypes.data % SECTOR :][: -(-(skip + size) // SECTOR) * SECTOR]
  try:
    got = _fill(path, getattr(os, 'O_DIRECT', 0), room, start - skip, skip + size)
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
      raise
    got = _fill(path, 0, room, start - skip, skip + size)
  return room[skip : min(got, skip + size)]


def _fill(path: pathlib.Path, flags: int, room: np.ndarray, start: int, size: int) -> int:
  file, got = os.open(path, os.O_RDONLY | flags), 0
  try:
    while got < size and (count := os.preadv(file, [room[got:]], start + got)):
      got += count
  finally:
    os.close(file)
  return got


class Flusher:
  """Sees written files onto the disk and out of the page cache, in a thread of its own."""

  def __init__(self):
    self._thread, self._last = concurrent.futures.ThreadPoolExecutor(1), None

  def flush(self, files: Iterable[pathlib.Path]) -> None:
    """Begins with these files, when those of the last call are done: what has not reached the disk is bounded so."""
    self.wait()
    self._last = self._thread.submit(_flush, list(files))

  def wait(self) -> None:
    """Returns when all is on the disk; raises what went wrong."""
    if self._last is not None:
      self._last.result()


def _flush(files: list[pathlib.Path]) -> None:
  for path in files:
    file = os.open(path, os.O_RDONLY)
    try:
      os.fsync(file)
      if hasattr(os, 'posix_fadvise'):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
      os.close(file)
