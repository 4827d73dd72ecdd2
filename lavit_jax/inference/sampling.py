"""Logits to token ids: pure functions on f32[B, V] (specification, Inference).

A filter sets the logits of suppressed ids to -inf and keeps the others; `filter_logits` applies the
filters in the published order. Sampling is Gumbel-max with one key for each row, so that the sample
of a row does not depend on its batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def guided_log_probs(conditional: Array, unconditional: Array, scale: float | Array) -> Array:
  """Applies classifier-free guidance, before every filter.

  Args:
    conditional: logits f32[B, V].
    unconditional: logits f32[B, V].
    scale: 1 gives the conditional log-probabilities, 0 the unconditional ones.

  Returns:
    scale * (log p_cond - log p_uncond) + log p_uncond, f32[B, V], not normalized.
  """
  conditional = jax.nn.log_softmax(conditional)
  unconditional = jax.nn.log_softmax(unconditional)
  return scale * (conditional - unconditional) + unconditional


def penalize(logits: Array, used: Array, penalty: float | Array) -> Array:
  """Applies the repetition penalty (Keskar et al. 2019, arXiv 1909.05858, section 4.1).

  Args:
    logits: f32[B, V]; of used ids, positive ones are divided by the penalty, negative ones
      multiplied.
    used: bool[B, V], the ids that were generated before.
    penalty: above 1 makes used ids less probable.
  """
  penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
  return jnp.where(used, penalized, logits)


def suppress(logits: Array, suppressed: Array) -> Array:
  """Removes the ids where `suppressed`, bool[V] or bool[B, V], is true."""
  return jnp.where(suppressed, -jnp.inf, logits)


def keep_top_k(logits: Array, k: int) -> Array:
  """Keeps the k greatest logits of each row, and those equal to the last of them."""
  threshold = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
  return jnp.where(logits < threshold, -jnp.inf, logits)


def keep_top_p(logits: Array, p: float | Array) -> Array:
  """Keeps the fewest most probable ids of each row that together reach p; at least one."""
  ordered = jnp.sort(logits, axis=-1, descending=True)
  probs = jax.nn.softmax(ordered)
  kept = jnp.cumsum(probs, axis=-1) - probs < p  # the ids before it do not reach p
  last = jnp.maximum(kept.sum(-1, keepdims=True) - 1, 0)
  threshold = jnp.take_along_axis(ordered, last, axis=-1)
  return jnp.where(logits < threshold, -jnp.inf, logits)


def filter_logits(
  logits: Array,
  temperature: float | Array = 1.0,
  top_k: int | None = None,
  top_p: float | Array | None = None,
) -> Array:
  """Divides by the temperature, then keeps the top k, then the top p; None skips a filter."""
  logits = logits / temperature
  if top_k is not None:
    logits = keep_top_k(logits, top_k)
  if top_p is not None:
    logits = keep_top_p(logits, top_p)
  return logits


def row_keys(key: Array, batch: int) -> Array:
  """Returns keys[B]: those given, or one key folded with the index of each row."""
  return key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def sample(keys: Array, logits: Array) -> Array:
  """Samples an id i32[B] from the softmax of each row of f32[B, V], with keys[B]."""
  noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], logits.dtype))(keys)
  return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
