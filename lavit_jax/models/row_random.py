"""Random numbers of the rows of a batch, independent of which rows share the batch."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array


def draw_rows(draw: Callable[..., Array], key: Array, shape: Sequence[int]) -> Array:
  """Draws random numbers of `shape` [B, ...].

  Args:
    draw: a function of jax.random, of (key, shape).
    key: one key for the batch, or typed keys [B] (`jax.random.key`), one for each row.
    shape: of the result.
  """
  has_row_keys = jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim > 0
  if not has_row_keys:
    return draw(key, shape)
  return jax.vmap(lambda row_key: draw(row_key, shape[1:]))(key)
