"""Whether numbers survive a change of type: NaN and infinity in a source, overflow and underflow of a conversion.

float16 ends at 65,504 and has nothing between 0 and 6e-8. A weight beyond that becomes infinite, and a model with one infinite weight
draws black: that is refused. A number below becomes zero, which is counted and told, since beside larger ones in the same tensor it is no
more than rounding (6e-8 is float16's step below 1.2e-4); it is refused where nothing else is left of the tensor. bfloat16 has the range of float32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lavit_jax.errors import UserError

BLOCK = 1 << 20  # numbers looked at at once
LISTED = 3  # tensors named in a message

_BITS = {  # of a floating type: an integer of its size, what masks the sign, and the first pattern that is not finite
  'float16': (np.uint16, 0x7FFF, 0x7C00),
  'bfloat16': (np.uint16, 0x7FFF, 0x7F80),
  'float32': (np.uint32, 0x7FFFFFFF, 0x7F800000),
  'float64': (np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}


class Counts(NamedTuple):
  """What a conversion did to the numbers of one tensor."""

  nonfinite: int  # not finite before
  overflow: int  # finite before, and not after
  underflow: int  # not zero before, and zero after
  size: int  # all
  lost: bool = False  # all that were not zero became zero


def nonfinite(array: np.ndarray) -> int:
  """How many of the numbers are NaN or infinite; 0 for integers. Works on the bits: a fraction of the time of np.isfinite for 16-bit types."""
  kind = _BITS.get(array.dtype.name)
  if kind is None or not array.size:
    return 0
  number, mask, limit = kind
  count = 0
  for block in _blocks(array):
    bits = block.view(number) & number(mask)
    if bits.max() >= limit:
      count += int((bits >= limit).sum())
  return count


def compare(before: np.ndarray, after: np.ndarray) -> Counts:
  """What a conversion of `before` to the type of `after` did to the numbers."""
  bad = nonfinite(before)
  if before.dtype == after.dtype:
    return Counts(bad, 0, 0, before.size)
  over = nonfinite(after) - bad
  left = under = 0
  if before.dtype.name in _BITS and after.dtype == np.float16:
    left = _nonzero(after)
    under = _nonzero(before) - left
  return Counts(bad, over, under, before.size, lost=under > 0 and left == 0)


def cast(array: np.ndarray, dtype) -> tuple[np.ndarray, Counts]:
  """`array` in another type, and what that did to its numbers."""
  with np.errstate(over='ignore', under='ignore', invalid='ignore'):  # counted instead
    after = array.astype(dtype, copy=False)
  return after, compare(array, after)


def convert(name: str, array: np.ndarray, dtype, allow_nonfinite: bool = False) -> np.ndarray:
  """`array` in another type; UserError, which names it, if a number does not survive (`Ledger.check`)."""
  after, counts = cast(array, dtype)
  ledger = FiniteLedger()
  ledger.add(name, counts)
  ledger.check(np.dtype(dtype).name, allow_nonfinite)
  return after


class FiniteLedger:
  """What the conversion of many tensors lost.

  Attributes:
    nonfinite, overflow, underflow: name -> `Counts` of the tensors with any such number.
  """

  def __init__(self):
    self.nonfinite, self.overflow, self.underflow = {}, {}, {}

  def add(self, name: str, counts: Counts) -> None:
    """Enters a tensor."""
    for kind in ('nonfinite', 'overflow', 'underflow'):
      if getattr(counts, kind):
        getattr(self, kind)[name] = counts

  def check(self, dtype: str | None, allow_nonfinite: bool = False) -> None:
    """Raises UserError if the result could not be used: it names the tensors, the numbers and the remedy.

    Args:
      dtype: of the result; None keeps the types.
      allow_nonfinite: NaN and infinity of the source are taken along.
    """
    if self.nonfinite and not allow_nonfinite:
      raise UserError(
        f'NaN or infinity in {_listed(self.nonfinite, "nonfinite")}; the file is damaged, or its training had diverged: take '
        'another one, or --allow-nonfinite (allow_nonfinite=True) to keep these numbers'
      )
    if self.overflow:
      raise UserError(
        f'numbers beyond the range of {dtype} in {_listed(self.overflow, "overflow")}; choose bfloat16 or float32'
      )
    lost = {name: counts for name, counts in self.underflow.items() if counts.lost}
    if lost:
      raise UserError(
        f'numbers too small for {dtype}, which would become zero, in {_listed(lost, "underflow")}; choose bfloat16 or float32'
      )

  def notes(self) -> list[str]:
    """What was let through, to be told."""
    told = []
    if self.nonfinite:
      told.append(f'NaN or infinity kept in {_listed(self.nonfinite, "nonfinite")}')
    if self.underflow:
      told.append(
        f'numbers too small for float16 became zero in {_listed(self.underflow, "underflow")}'
      )
    return told


def _listed(tensors: dict[str, Counts], kind: str) -> str:
  """'3 tensors: a (2 of 64 numbers), ...'"""
  names = [
    f'{name} ({getattr(counts, kind):,} of {counts.size:,} numbers)'
    for name, counts in list(tensors.items())[:LISTED]
  ]
  more = f' and {len(tensors) - LISTED} more' if len(tensors) > LISTED else ''
  return f'{len(tensors)} tensor{"s" if len(tensors) > 1 else ""}: {", ".join(names)}{more}'


def _nonzero(array: np.ndarray) -> int:
  number, mask, _ = _BITS[array.dtype.name]
  return sum(int(np.count_nonzero(block.view(number) & number(mask))) for block in _blocks(array))


def _blocks(array: np.ndarray):
  flat = array.reshape(-1) if array.flags.c_contiguous else np.ascontiguousarray(array).reshape(-1)
  for start in range(0, flat.size, BLOCK):
    yield flat[start : start + BLOCK]
