"""Finds NaN and infinity where they arise, so that no black image or empty caption looks valid.

On the device, and in the same pass as its result, a program finds the first module whose result for
a row is not finite (`first_fault`). The pipeline checks this when the result is on the host, and
raises `NotFinite`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.errors import InputError

# Module -> its name in messages. A fault is the position of a module here, from 1 on; 0 is none.
MODULES = {
  'vit': 'the image encoder',
  'tokenizer': 'the visual tokenizer',
  'understanding': 'the projection to the language model',
  'llama': 'the language model',
  'decoder': 'the decoder of visual tokens',
  'unet': 'the U-Net',
  'vae': 'the VAE',
  'highres_decoder': 'the decoder of visual tokens',
  'highres_unet': 'the U-Net',
  'highres_vae': 'the VAE',
  'safety_checker': 'the safety checker',
  'interface': 'the interface of images to the language model',
}
_FAULTS = {module: fault for fault, module in enumerate(MODULES, 1)}
_MAX_LISTED = 4  # rows in a message


class NotFinite(InputError):
  """NaN or infinity came out of a module for some rows of a batch.

  Attributes:
    rows: index of a row -> its message.
    results: of all rows, also of those with faults; None if there is no use for them.
  """

  def __init__(self, message: str, rows: Mapping[int, str] | None = None, results: Any = None):
    super().__init__(message)
    self.rows = dict(rows or {})
    self.results = results


def first_fault(*results: tuple[str, Array]) -> Array:
  """Finds the first module whose result is not finite.

  Args:
    *results: (module, its result [B, ...]) in the order of computation; a result may also be
      bool[B], whether it is finite.

  Returns:
    i32[B], the fault of each row; 0 for none.
  """
  fault = jnp.zeros(len(results[0][1]), jnp.int32)
  for module, result in reversed(results):
    is_finite = result if result.dtype == bool else finite(result)
    fault = jnp.where(is_finite, fault, _FAULTS[module])
  return fault


def finite(x: Array) -> Array:
  """Returns bool[B]: whether all numbers of each row of [B, ...] are finite."""
  return jnp.isfinite(x).all(tuple(range(1, x.ndim)))


def number(module: str) -> int:
  """Returns the fault of a module."""
  return _FAULTS[module]


def check(
  faults: np.ndarray, results: Any = None, rows: Sequence[int] | np.ndarray | None = None
) -> None:
  """Checks faults that are on the host.

  Args:
    faults: i32[B], as `first_fault` returns them.
    results: for the exception.
    rows: i32[B], the row of each fault, if a row has several; by default 0, 1, ...

  Raises:
    NotFinite: there is a fault.
  """
  indices = list(range(len(faults))) if rows is None else [int(row) for row in rows]
  modules = list(MODULES)
  messages: dict[int, str] = {}
  for row, fault in zip(indices, faults, strict=True):
    if fault:
      module = modules[fault - 1]
      messages.setdefault(row, f'NaN or infinity came out of {MODULES[module]} ({module})')
  if not messages:
    return
  raise NotFinite(
    f'{next(iter(messages.values()))}{_count_rows(messages, len(set(indices)))}; its weights are '
    'damaged or beyond the range of the compute dtype: convert the checkpoint again, and in '
    'float16 try bfloat16 or float32',
    messages,
    results,
  )


def _count_rows(messages: Mapping[int, str], count: int) -> str:
  if count == 1:
    return ''
  listed = ', '.join(str(row + 1) for row in list(messages)[:_MAX_LISTED])
  more = ', ...' if len(messages) > _MAX_LISTED else ''
  return f' for {len(messages)} of {count} inputs (number {listed}{more})'
