"""Adds the rows of [IMG], [/IMG] and the codes to a language model that has the text's only."""

from __future__ import annotations

import jax
import numpy as np

from lavit_jax.weights.torch.tensors import ArraySpec

RULE = (  # recorded in the metadata of checkpoints
  "new rows: the mean of the text's rows, plus 0.1 of their standard deviation times numpy's "
  'default_rng(0).standard_normal'
)


def grown_struct(path: str, spec: ArraySpec, vocab_size: int | None) -> jax.ShapeDtypeStruct:
  """Shape and dtype of a leaf of the language model once its vocabulary has `vocab_size` rows.

  Args:
    path: of the leaf; all but 'embedding' [V, H] and 'head' [H, V] stay as they are.
    spec: its shape and dtype in the file.
    vocab_size: None leaves every leaf as it is.
  """
  shape = tuple(spec.shape)
  if vocab_size is not None and path == 'embedding':
    shape = (vocab_size, shape[1])
  elif vocab_size is not None and path == 'head':
    shape = (shape[0], vocab_size)
  return jax.ShapeDtypeStruct(shape, spec.dtype)


def grow_rows(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """An embedding [V, H] or a head [H, V] with more rows (columns), by `RULE`.

  An array that has this shape is returned as it is.
  """
  if array.shape == tuple(shape):
    return array
  differs = [size != target for size, target in zip(array.shape, shape, strict=True)]
  axis = differs.index(True)
  # In C order, so that sums have one order and a head tied to the embedding stays equal to it.
  text_rows = np.moveaxis(array, axis, 0).astype(np.float32, order='C')
  noise = np.random.default_rng(0).standard_normal(
    (shape[axis] - len(text_rows), text_rows.shape[1]), np.float32
  )
  new_rows = text_rows.mean(0) + 0.1 * text_rows.std(0) * noise
  return np.concatenate([array, np.moveaxis(new_rows, 0, axis).astype(array.dtype)], axis)
