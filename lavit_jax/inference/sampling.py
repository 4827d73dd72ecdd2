"""From logits to a choice: pure functions on f32[B, V] (specification, Inference).

A filter sets what it forbids to -inf and leaves the rest as it was; `filter_logits` is their published order. Sampling is
Gumbel-max with a key a row, so that a row's draw does not depend on the batch it travels in.
"""

import jax
import jax.numpy as jnp
from jax import Array


def suppress(logits: Array, suppressed: Array) -> Array:
  """Forbids the ids where `suppressed`, bool broadcastable to [B, V], is true."""
  return jnp.where(suppressed, -jnp.inf, logits)


def guided_log_probs(conditional: Array, unconditional: Array, scale: float | Array) -> Array:
  """Classifier-free guidance, `scale (log p_cond - log p_uncond) + log p_uncond`; comes before every other filter.

  At scale 1 this is log p_cond, at 0 log p_uncond. The result is not normalised.
  """
  conditional, unconditional = jax.nn.log_softmax(conditional), jax.nn.log_softmax(unconditional)
  return scale * (conditional - unconditional) + unconditional


def penalize(logits: Array, used: Array, penalty: float | Array) -> Array:
  """Repetition penalty: makes the ids where `used`, bool[B, V], is true less probable, if `penalty` > 1.

  Positive logits are divided by it and negative ones multiplied (Keskar et al. 2019, arXiv 1909.05858, section 4.1).
  """
  return jnp.where(used, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Array, k: int) -> Array:
  """Keeps the k greatest of each row, all of them if V <= k, and whatever ties with the last."""
  threshold = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
  return jnp.where(logits < threshold, -jnp.inf, logits)


def keep_top_p(logits: Array, p: float | Array) -> Array:
  """Keeps the fewest ids that together reach probability p, at least one: each whose betters sum to less than p."""
  ordered = jnp.sort(logits, axis=-1, descending=True)
  probs = jax.nn.softmax(ordered)
  kept = jnp.cumsum(probs, axis=-1) - probs < p
  threshold = jnp.take_along_axis(ordered, jnp.maximum(kept.sum(-1, keepdims=True) - 1, 0), axis=-1)
  return jnp.where(logits < threshold, -jnp.inf, logits)


def filter_logits(
  logits: Array,
  temperature: float | Array = 1.0,
  top_k: int | None = None,
  top_p: float | Array | None = None,
) -> Array:
  """Temperature, then top-k, then top-p; None leaves a filter out."""
  logits = logits / temperature
  if top_k is not None:
    logits = keep_top_k(logits, top_k)
  if top_p is not None:
    logits = keep_top_p(logits, top_p)
  return logits


def row_keys(key: Array, batch: int) -> Array:
  """One key a row: a single key is folded with the row's number, keys [B] are taken as they are."""
  return key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def sample(keys: Array, logits: Array) -> Array:
  """Draws an id i32[B] from the softmax of each row of f32[B, V] with its own key, keys[B]."""
  noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], logits.dtype))(keys)
  return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
