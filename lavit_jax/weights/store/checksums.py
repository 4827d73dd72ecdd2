"""Checksums of leaves, which are computed from pieces in any order."""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorstore as ts
import xxhash

from lavit_jax.weights.store.arrays import CHUNK_BYTES, DIRECT, open_leaves, prefetch


def checksum(array: np.ndarray, first_index: int = 0) -> int:
  """The checksum of a leaf, or the share of some of its slices in it.

  Each slice on axis 0 is hashed by XXH3-64, seeded with its index, and the hashes are combined by
  exclusive or. A checksum therefore is the exclusive or of those of its pieces.

  Args:
    array: a leaf, or consecutive slices on axis 0 of it.
    first_index: the index of the first slice.
  """
  slices = array if array.ndim else array[None]
  data = np.zeros((len(slices), 0), np.uint8)
  if slices.size:
    data = np.ascontiguousarray(slices).view(np.uint8).reshape(len(slices), -1)
  total = 0
  for index, content in enumerate(data, first_index):
    total ^= xxhash.xxh3_64_intdigest(content.data, index)
  return total


def checksums(folder: pathlib.Path, paths: Iterable[str]) -> Iterator[tuple[str, int, int]]:
  """Reads the leaves of a module from the disk, past the page cache, piece by piece.

  Args:
    folder: of the module.
    paths: of the leaves.

  Yields:
    (path, checksum, bytes) of a piece; `checksum` describes how pieces make the whole.
  """
  yield from prefetch(_piece_tasks(folder, paths))


def _piece_tasks(
  folder: pathlib.Path, paths: Iterable[str]
) -> Iterator[Callable[[], tuple[str, int, int]]]:
  """Tasks that each read about CHUNK_BYTES."""
  for path, array in open_leaves(folder, paths, DIRECT).items():
    length = array.shape[0] if array.ndim else 1
    size = math.prod(array.shape) * array.dtype.numpy_dtype.itemsize
    step = max(length * CHUNK_BYTES // max(size, 1), 1)
    for start in range(0, length, step):
      yield functools.partial(_read_piece, path, array, start, min(start + step, length))


def _read_piece(path: str, array: ts.TensorStore, start: int, stop: int) -> tuple[str, int, int]:
  piece = (array[start:stop] if array.ndim else array).read().result()
  return path, checksum(piece, start), piece.nbytes
