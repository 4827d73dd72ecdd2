"""The three losses of the Q-Former's first stage, as pure functions of a whole batch.

The negatives are those of the batch, on whatever devices its rows lie: under `jit` with a mesh, the
similarities f32[B, B] need the rows of all devices, and XLA gathers the projected features for
them.

Source: Li et al. 2023, BLIP-2, section 3.2; the shares of smoothing and of the uniform choice are
those of the published code.

Axes: B pairs, Q queries, P width of the common space, T text slots, V vocabulary.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array

LABEL_SMOOTHING = 0.1
UNIFORM_SHARE = 1e-4  # added to the probability of each negative


def similarities(images: Array, texts: Array) -> Array:
  """The largest cosine of a text to the queries of an image, for all pairs of the batch.

  Args:
    images: f32[B, Q, P] of unit length.
    texts: f32[B, P] of unit length.

  Returns:
    f32[B, B]: images down, texts across.
  """
  return jnp.einsum('iqp,tp->itq', images, texts).max(-1)


def contrastive_loss(cosines: Array, temperature: Array) -> Array:
  """ITC: which text belongs to an image, and which image to a text, f32[].

  Args:
    cosines: f32[B, B], see `similarities`; pairs are on the diagonal.
    temperature: f32[], learned.
  """
  logits = cosines / temperature
  own = jnp.arange(len(logits))
  to_text = smoothed_cross_entropy(logits, own)
  to_image = smoothed_cross_entropy(logits.T, own)
  return (to_text.mean() + to_image.mean()) / 2


def smoothed_cross_entropy(logits: Array, labels: Array) -> Array:
  """Cross-entropy with `LABEL_SMOOTHING`: f32[..., V] and i32[...] -> f32[...]."""
  targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), LABEL_SMOOTHING)
  return optax.softmax_cross_entropy(logits, targets)


def hard_negatives(cosines: Array, temperature: Array, keys: Array) -> Array:
  """Another column for each row, the more probable the more similar it is.

  Args:
    cosines: f32[B, B] of rows to columns, B > 1.
    temperature: f32[].
    keys: typed keys [B], one for each row.

  Returns:
    i32[B], never the row's own index.
  """
  cosines = jax.lax.stop_gradient(cosines / temperature)
  weights = jax.nn.softmax(cosines) + UNIFORM_SHARE
  others = ~jnp.eye(len(weights), dtype=bool)
  log_weights = jnp.where(others, jnp.log(weights), -jnp.inf)
  return jax.vmap(jax.random.categorical)(keys, log_weights)


def matching_loss(logits: Array, is_pair: Array) -> Array:
  """ITM: whether image and text belong together, f32[].

  Args:
    logits: f32[..., 2]; class 1 is a pair.
    is_pair: bool[...].
  """
  labels = is_pair.astype(jnp.int32)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def captioning_loss(logits: Array, text: Array, text_mask: Array) -> Array:
  """ITG: the next word of the caption, f32[], averaged over the words of the batch.

  Args:
    logits: f32[B, T, V].
    text: ids i32[B, T]; the first is that of decoding.
    text_mask: bool[B, T], False in padding.
  """
  losses = smoothed_cross_entropy(logits[:, :-1], text[:, 1:])
  weights = text_mask[:, 1:].astype(jnp.float32)
  return (losses * weights).sum() / jnp.maximum(weights.sum(), 1)
