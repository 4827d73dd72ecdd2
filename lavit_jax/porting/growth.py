"""Rows for [IMG], [/IMG] and the codes, of a language model that has the text's only."""

from __future__ import annotations

import jax
import numpy as np

RULE = "new rows: the mean of the text's rows, plus 0.1 of their standard deviation times numpy's default_rng(0).standard_normal"


def grown(path: str, struct, rows: int | None) -> jax.ShapeDtypeStruct:
  """Shape and type of the language model's leaf at `path` when its vocabulary has `rows`; None leaves it as it is."""
  if rows is None or path not in ('embedding', 'head'):
    return struct
  width = struct.shape[path == 'embedding']
  return jax.ShapeDtypeStruct((rows, width) if path == 'embedding' else (width, rows), struct.dtype)


def grow(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """An embedding [V, H] or a head [H, V] with more rows (columns), by `RULE`; any other array, or one of this shape already, as it is."""
  if array.shape == tuple(shape):
    return array
  axis = next(axis for axis, (have, want) in enumerate(zip(array.shape, shape)) if have != want)
  known = np.moveaxis(array, axis, 0).astype(np.float32, order='C')  # sums of one order: a head tied to the embedding stays it
  noise = np.random.default_rng(0).standard_normal((shape[axis] - len(known), known.shape[1]), np.float32)
  new = known.mean(0) + 0.1 * known.std(0) * noise
  return np.concatenate([array, np.moveaxis(new, 0, axis).astype(array.dtype)], axis)
