"""Which patches become tokens: probabilities of keeping them, and the choice.

Source: specification, Selector. `keep` f32[B, N] is 1 where a patch becomes a token, and 0 where it
is dropped and merged.

Axes: B images, N patches, D feature width.
"""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.layers import LayerNorm, gelu
from lavit_jax.models.row_random import draw_rows


class Selector(nn.Module):
  """Log-probabilities of keeping (class 0) and dropping each patch.

  It runs in float32 throughout, also its products, which accelerators would compute from bfloat16
  pieces: decisions near a tie depend on it.
  """

  hidden_size: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Input x [B, N, D] -> f32[B, N, 2]."""
    half = self.hidden_size // 2
    dense = partial(nn.Dense, precision=jax.lax.Precision.HIGHEST)
    x = gelu(dense(self.hidden_size, name='fc_in')(LayerNorm(name='norm')(x)))
    local = x[..., :half]
    context = x[..., half:].mean(1, keepdims=True)
    context = jnp.broadcast_to(context, (*x.shape[:2], context.shape[-1]))
    x = jnp.concatenate([local, context], axis=-1)
    x = gelu(dense(half, name='fc1')(x))
    x = gelu(dense(self.hidden_size // 4, name='fc2')(x))
    return nn.log_softmax(dense(2, name='fc_out')(x))


def gumbel_keep(
  log_probs: Array,
  *,
  key: Array | None = None,
  noise: Array | None = None,
  temperature: float = 1.0,
) -> Array:
  """The patches to keep: hard 0/1 forward, soft gradient (specification, Selector).

  With `key` or `noise` it samples as published, by a straight-through Gumbel-softmax over
  {keep, drop}. With neither it is deterministic: it keeps the round(sum p) most probable patches,
  with the gradient of p. Every row keeps at least its most probable patch.

  Args:
    log_probs: [B, N, 2], log-probabilities or logits; class 0 is keep.
    key: draws the noise; one key, or keys [B], one for each row.
    noise: [B, N, 2], Gumbel noise in place of a key.
    temperature: of the softmax whose gradient is used; the forward decision does not depend on it.

  Returns:
    f32[B, N].

  Raises:
    ValueError: key and noise together.
  """
  if key is not None and noise is not None:
    raise ValueError('gumbel_keep takes a key or the noise, not both')
  chex.assert_shape(log_probs, (None, None, 2))
  logits = log_probs.astype(jnp.float32)
  p = jax.nn.softmax(logits)[..., 0]
  if key is not None:
    noise = gumbel(draw_rows(jax.random.uniform, key, logits.shape))
  if noise is None:
    soft = p
    hard = jax.vmap(most_probable)(p)
  else:
    chex.assert_equal_shape([logits, noise])
    noisy = logits + noise
    soft = jax.nn.softmax(noisy / temperature)[..., 0]
    hard = noisy[..., 0] >= noisy[..., 1]
  fallback = jax.nn.one_hot(p.argmax(-1), p.shape[-1], dtype=bool)
  hard = jnp.where(hard.any(-1, keepdims=True), hard, fallback)
  # In this order of operations the forward value is exactly 0 or 1.
  return hard + (soft - jax.lax.stop_gradient(soft))


def gumbel(u: Array) -> Array:
  """Standard Gumbel values -log(-log u) of uniform u f32[...] in [0, 1]; finite at both ends."""
  limits = jnp.finfo(jnp.float32)
  return -jnp.log(-jnp.log(jnp.clip(u, limits.tiny, 1 - limits.epsneg)))


def most_probable(p: Array) -> Array:
  """Marks the round(sum p) largest of p f32[N], lower index first among equals; bool[N]."""
  rank = jnp.argsort(jnp.argsort(-p, stable=True))
  return rank < jnp.round(p.sum())
