"""Reads and writes files of gigabytes without filling the page cache.

The files of a model would displace what other programs keep in the page cache. On a virtual
machine, the first use of each page of it also costs the processor more time than the disk takes to
transfer the content.
"""

from __future__ import annotations

import concurrent.futures
import errno
import os
import pathlib
from collections.abc import Iterable

import numpy as np

SECTOR = 4096  # bytes; a direct read starts and ends at multiples of it, in the file and in memory
FLUSH_BYTES = 256 << 20  # bytes written before a flush to the disk starts


def read_bytes(path: pathlib.Path, start: int, size: int) -> np.ndarray:
  """Reads a range of a file, past the page cache where the file system supports it.

  Args:
    path: the file.
    start: the first byte.
    size: the number of bytes; a range that extends beyond the end of the file is cut there.

  Returns:
    u8[size] or shorter.

  Raises:
    OSError: the file cannot be read.
  """
  skip = start % SECTOR
  sectors = -(-(skip + size) // SECTOR)
  buffer = _aligned_buffer(sectors * SECTOR)
  try:
    count = _fill(path, getattr(os, 'O_DIRECT', 0), buffer, start - skip, skip + size)
  except OSError as error:
    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
      raise
    # The file system has no direct reads.
    count = _fill(path, 0, buffer, start - skip, skip + size)
  return buffer[skip : min(count, skip + size)]


def _aligned_buffer(size: int) -> np.ndarray:
  """u8[size] whose address is a multiple of SECTOR."""
  buffer = np.empty(size + SECTOR, np.uint8)
  offset = -buffer.ctypes.data % SECTOR
  return buffer[offset : offset + size]


def _fill(path: pathlib.Path, flags: int, buffer: np.ndarray, start: int, size: int) -> int:
  """Reads into `buffer` until it has `size` bytes or the file ends; returns the bytes read."""
  file = os.open(path, os.O_RDONLY | flags)
  total = 0
  try:
    while total < size:
      count = os.preadv(file, [buffer[total:].data], start + total)
      if not count:
        break
      total += count
  finally:
    os.close(file)
  return total


class Flusher:
  """Moves written files from the page cache to the disk, in its own thread."""

  def __init__(self):
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._last: concurrent.futures.Future | None = None

  def flush(self, files: Iterable[pathlib.Path]) -> None:
    """Starts to flush files, after those of the previous call have been flushed.

    The wait bounds how much has been written and is not on the disk yet.
    """
    self.wait()
    self._last = self._thread.submit(_flush, list(files))

  def wait(self) -> None:
    """Returns when everything is on the disk.

    Raises:
      OSError: a file could not be flushed.
    """
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


def disk_full(error: BaseException | None) -> bool:
  """Whether a full disk, or a full quota, is among the causes of an error."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      return True
    # TensorStore has no error class of its own for it.
    if 'No space left on device' in str(error) or 'Disk quota exceeded' in str(error):
      return True
    error = error.__cause__ or error.__context__
  return False
