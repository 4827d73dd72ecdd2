"""Counts numbers that a change of dtype loses: NaN and infinity, overflow and underflow.

float16 ends at 65,504 and has nothing between 0 and 6e-8. A weight beyond that becomes infinite,
and a model with one infinite weight generates black images: that is an error. A number below
becomes zero. Beside larger ones in the same tensor this is no more than rounding (6e-8 is float16's
step below 1.2e-4), so it is counted in a note; where nothing else is left of the tensor, it is an
error.
bfloat16 has the range of float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from lavit_jax.errors import UserError

BLOCK = 1 << 20  # numbers counted at once
MAX_LISTED = 3  # tensors in a message


class _FloatBits(NamedTuple):
  """The bits of a floating dtype, as an unsigned integer of the same size."""

  integer: type[np.unsignedinteger]
  magnitude: int  # mask of all bits but the sign
  first_nonfinite: int  # the least magnitude that is infinite or NaN


_FLOAT_BITS = {
  'float16': _FloatBits(np.uint16, 0x7FFF, 0x7C00),
  'bfloat16': _FloatBits(np.uint16, 0x7FFF, 0x7F80),
  'float32': _FloatBits(np.uint32, 0x7FFFFFFF, 0x7F800000),
  'float64': _FloatBits(np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}


class Counts(NamedTuple):
  """What a conversion did to the numbers of one tensor.

  Attributes:
    nonfinite: numbers that were not finite before.
    overflow: numbers that became infinite.
    underflow: numbers that became zero.
    size: all numbers.
    lost: whether all numbers that were not zero became zero.
  """

  nonfinite: int
  overflow: int
  underflow: int
  size: int
  lost: bool = False


def count_nonfinite(array: np.ndarray) -> int:
  """How many numbers are NaN or infinite; 0 for integers.

  Compares bits, which takes a fraction of the time of np.isfinite for 16-bit dtypes.
  """
  bits = _FLOAT_BITS.get(array.dtype.name)
  if bits is None or not array.size:
    return 0
  count = 0
  for magnitudes in _magnitudes(array, bits):
    if magnitudes.max() >= bits.first_nonfinite:
      count += int(np.count_nonzero(magnitudes >= bits.first_nonfinite))
  return count


def compare(before: np.ndarray, after: np.ndarray) -> Counts:
  """What a conversion of `before` to the dtype of `after` did to the numbers."""
  nonfinite = count_nonfinite(before)
  if before.dtype == after.dtype:
    return Counts(nonfinite, 0, 0, before.size)
  overflow = count_nonfinite(after) - nonfinite
  if before.dtype.name not in _FLOAT_BITS or after.dtype != np.float16:
    return Counts(nonfinite, overflow, 0, before.size)
  remaining = _count_nonzero(after)
  underflow = _count_nonzero(before) - remaining
  lost = underflow > 0 and remaining == 0
  return Counts(nonfinite, overflow, underflow, before.size, lost)


def cast(array: np.ndarray, dtype: DTypeLike) -> tuple[np.ndarray, Counts]:
  """`array` in another dtype, and what that did to its numbers."""
  with np.errstate(over='ignore', under='ignore', invalid='ignore'):  # counted instead
    converted = array.astype(dtype, copy=False)
  return converted, compare(array, converted)


def convert(
  name: str, array: np.ndarray, dtype: DTypeLike, allow_nonfinite: bool = False
) -> np.ndarray:
  """`array` in another dtype.

  Args:
    name: of the array, for messages.
    array: any array.
    dtype: of the result.
    allow_nonfinite: keep NaN and infinity in `array`.

  Raises:
    UserError: as `FiniteLedger.check`.
  """
  converted, counts = cast(array, dtype)
  ledger = FiniteLedger()
  ledger.add(name, counts)
  ledger.check(np.dtype(dtype).name, allow_nonfinite)
  return converted


class FiniteLedger:
  """What the conversion of many tensors lost.

  Attributes:
    nonfinite, overflow, underflow: name -> `Counts` of the tensors with any such number.
  """

  def __init__(self):
    self.nonfinite: dict[str, Counts] = {}
    self.overflow: dict[str, Counts] = {}
    self.underflow: dict[str, Counts] = {}

  def add(self, name: str, counts: Counts) -> None:
    """Records a tensor."""
    if counts.nonfinite:
      self.nonfinite[name] = counts
    if counts.overflow:
      self.overflow[name] = counts
    if counts.underflow:
      self.underflow[name] = counts

  def check(self, dtype: str | None, allow_nonfinite: bool = False) -> None:
    """Raises UserError, with tensors, counts and remedy, if the result could not be used.

    Args:
      dtype: of the result; None keeps the dtypes.
      allow_nonfinite: keep NaN and infinity in the source.
    """
    if self.nonfinite and not allow_nonfinite:
      raise UserError(
        f'NaN or infinity in {_listed(self.nonfinite, "nonfinite")}; the file is damaged, or its '
        'training had diverged: use another one, or --allow-nonfinite (allow_nonfinite=True) to '
        'keep these numbers'
      )
    if self.overflow:
      raise UserError(
        f'numbers beyond the range of {dtype} in {_listed(self.overflow, "overflow")}; '
        'choose bfloat16 or float32'
      )
    lost = {name: counts for name, counts in self.underflow.items() if counts.lost}
    if lost:
      raise UserError(
        f'numbers too small for {dtype}, which would become zero, in '
        f'{_listed(lost, "underflow")}; choose bfloat16 or float32'
      )

  def notes(self) -> list[str]:
    """What was let through, a line each."""
    lines = []
    if self.nonfinite:
      lines.append(f'NaN or infinity kept in {_listed(self.nonfinite, "nonfinite")}')
    if self.underflow:
      lines.append(
        f'numbers too small for float16 became zero in {_listed(self.underflow, "underflow")}'
      )
    return lines


def _listed(tensors: dict[str, Counts], kind: Literal['nonfinite', 'overflow', 'underflow']) -> str:
  """Formats some tensors, as '3 tensors: a (2 of 64 numbers), ...'."""
  names = [
    f'{name} ({getattr(counts, kind):,} of {counts.size:,} numbers)'
    for name, counts in list(tensors.items())[:MAX_LISTED]
  ]
  plural = 's' if len(tensors) > 1 else ''
  hidden = len(tensors) - MAX_LISTED
  more = f' and {hidden} more' if hidden > 0 else ''
  return f'{len(tensors)} tensor{plural}: {", ".join(names)}{more}'


def _count_nonzero(array: np.ndarray) -> int:
  bits = _FLOAT_BITS[array.dtype.name]
  return sum(int(np.count_nonzero(block)) for block in _magnitudes(array, bits))


def _magnitudes(array: np.ndarray, bits: _FloatBits) -> Iterator[np.ndarray]:
  """The bits of all numbers less their signs, in blocks."""
  flat = array.reshape(-1) if array.flags.c_contiguous else np.ascontiguousarray(array).reshape(-1)
  for start in range(0, flat.size, BLOCK):
    block = flat[start : start + BLOCK]
    yield block.view(bits.integer) & bits.integer(bits.magnitude)
