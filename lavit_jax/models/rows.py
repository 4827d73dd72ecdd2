"""What is random about the rows of a batch, drawn row by row, so that it does not depend on which rows come together."""

from collections.abc import Callable, Sequence

import jax
from jax import Array


def draw_rows(draw: Callable[..., Array], key: Array, shape: Sequence[int]) -> Array:
  """Random numbers [B, ...] of `shape`.

  Args:
    draw: a function of jax.random, of (key, shape).
    key: one key for all, or keys [B] (typed ones, of jax.random.key), by which each row is drawn on its own.
  """
  if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim == 0:
    return draw(key, shape)
  return jax.vmap(lambda key: draw(key, shape[1:]))(key)
