"""NaN and infinity in what the modules compute: found where they arise, so that nobody takes a black picture or an empty caption for a result.

A program counts with `first`, on the device and in the same pass as its result, which part of the model was the first whose result for a
row was not finite. The pipeline looks at that number when the result has come to the host, and raises `NotFinite`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.errors import InputError

MODULES = {  # part -> what it is called; the number of a fault is a part's place in it, from 1 on, and 0 is none
    'vit': 'the image encoder', 'tokenizer': 'the visual tokenizer', 'understanding': 'the projection to the language model',
    'llama': 'the language model', 'decoder': 'the decoder of visual tokens', 'unet': 'the U-Net', 'vae': 'the VAE',
    'highres_decoder': 'the decoder of visual tokens', 'highres_unet': 'the U-Net', 'highres_vae': 'the VAE',
    'safety_checker': 'the safety checker',
}
_NUMBERS = {part: number for number, part in enumerate(MODULES, 1)}


class NotFinite(InputError):
  """NaN or infinity came out of a module, for some rows of a batch.

  Attributes:
    rows: place in the batch -> message of that row.
    results: what was computed of all rows, those at fault among them; None where nothing can be made of it.
  """

  def __init__(self, message: str, rows: Mapping[int, str] | None = None, results=None):
    super().__init__(message)
    self.rows, self.results = dict(rows or {}), results


def first(*results: tuple[str, Array]) -> Array:
  """i32[B]: the number of the first part, of (part, its result [B, ...]) in the order of computation, that is not finite in a row, or 0.

  A result may also be bool[B]: whether the row is sound.
  """
  fault = jnp.zeros(len(results[0][1]), jnp.int32)
  for part, result in reversed(results):
    sound = result if result.dtype == bool else finite(result)
    fault = jnp.where(sound, fault, _NUMBERS[part])
  return fault


def finite(x: Array) -> Array:
  """bool[B]: whether the numbers of each row of [B, ...] are all finite."""
  return jnp.isfinite(x).all(tuple(range(1, x.ndim)))


def number(part: str) -> int:
  """The number of a fault of this part."""
  return _NUMBERS[part]


def check(faults: np.ndarray, results=None, rows: Sequence[int] | None = None) -> None:
  """Raises NotFinite if any of the faults i32[B] is one.

  Args:
    faults: numbers as `first` gives them.
    results: for the exception.
    rows: the row of the batch that each fault is of, where a row has several; by default they are in order.
  """
  rows = range(len(faults)) if rows is None else rows
  parts, messages = list(MODULES), {}
  for row, fault in zip(rows, faults):
    if fault:
      part = parts[fault - 1]
      messages.setdefault(int(row), f'NaN or infinity came out of {MODULES[part]} ({part})')
  if not messages:
    return
  count = len(set(map(int, rows)))
  places = ', '.join(str(row + 1) for row in list(messages)[:4]) + (', ...' if len(messages) > 4 else '')
  counted = f' for {len(messages)} of {count} inputs (number {places})' if count > 1 else ''
  raise NotFinite(f'{next(iter(messages.values()))}{counted}; its weights are damaged or beyond the range of the compute dtype: convert the '
                  'checkpoint again, and in float16 try bfloat16 or float32', messages, results)
