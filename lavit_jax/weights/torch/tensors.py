"""A tensor of a weight file that is read only when its numbers are needed."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike

from lavit_jax.errors import UserError


class ArraySpec(Protocol):
  """Anything with a shape and a dtype: an array, a `LazyTensor`, a `jax.ShapeDtypeStruct`."""

  @property
  def shape(self) -> tuple[int, ...]:
    """Sizes of the axes."""
    ...

  @property
  def dtype(self) -> DTypeLike:
    """Type of the numbers."""
    ...


class LazyTensor(NamedTuple):
  """One tensor of a file; `np.asarray(tensor)` reads it.

  Attributes:
    shape, dtype: as in the file.
    read: reads the numbers.
    file: the file that holds the tensor.
    offset: the first byte of the tensor in the file, where its bytes lie there unchanged.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]
  file: pathlib.Path
  offset: int | None = None

  def __array__(self, dtype=None, copy=None):
    return np.asarray(self.read(), dtype)


def nbytes(spec: ArraySpec) -> int:
  """Bytes of an array of this shape and dtype."""
  return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


def damaged_file(path: pathlib.Path, reason: object) -> UserError:
  """The error for a weight file that cannot be read."""
  return UserError(f'{path} is truncated or damaged ({reason}); download it again')
