"""How good visual tokens and drawn pictures are, by means that the model had no part in where that matters.

Axes: B images, N patches, D feature width, K kinds.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from PIL import Image

from lavit_jax.data.emoji import colors
from lavit_jax.data.images import read_images
from lavit_jax.inference.pipeline import Lavit, VisualTokens
from lavit_jax.models import lavit, vit
from lavit_jax.models.tokenizer import l2_normalize

SIDE = 16  # pixels of what the classifier sees


# ------------------------------------------------------------------------------------------------------------------ tokens


def usage(tokens: VisualTokens, codebook_size: int) -> dict[str, float]:
  """tokens: how many an image has; codes, code_share: how many of the codebook are in use; perplexity: of their frequencies."""
  counts = np.bincount(np.concatenate(tokens.ids), minlength=codebook_size)
  p = counts[counts > 0] / counts.sum()
  return dict(
    tokens=float(tokens.counts.mean()),
    codes=int(len(p)),
    code_share=len(p) / codebook_size,
    perplexity=float(np.exp(-(p * np.log(p)).sum())),
  )


def features(model: Lavit, images: np.ndarray) -> np.ndarray:
  """Patch features f32[B, N, D] of pictures uint8[B, H, W, 3]."""
  return model.in_batches(_features, ('vit',), read_images(images, model.model.image_size))


def rebuilt_features(model: Lavit, tokens: VisualTokens) -> np.ndarray:
  """Features f32[B, N, D] that the decoder makes of the tokens alone."""
  return model.in_batches(_rebuilt, ('tokenizer', 'decoder'), *model.in_slots(tokens.ids))


def cosine(x: np.ndarray, y: np.ndarray) -> float:
  """Mean cosine similarity of rows; [..., D], y may broadcast."""
  return float((l2_normalize(jnp.asarray(x)) * l2_normalize(jnp.asarray(y))).sum(-1).mean())


def mean_direction(x: np.ndarray, axis: int) -> np.ndarray:
  """The mean of x f32[B, N, D] as unit vectors over `axis`, which stays with length 1: the constant with the highest mean cosine."""
  return np.asarray(l2_normalize(jnp.asarray(x))).mean(axis, keepdims=True)


@functools.partial(jax.jit, static_argnums=0)
def _features(model: lavit.LavitModules, parts: dict, images: Array) -> Array:
  return model.vit.apply({'params': parts['vit']}, vit.preprocess(images))[:, 1:].astype(
    jnp.float32
  )


@functools.partial(jax.jit, static_argnums=0)
def _rebuilt(model: lavit.LavitModules, parts: dict, ids: Array, mask: Array) -> Array:
  codes = model.tokenizer.apply({'params': parts['tokenizer']}, ids, method='lookup')
  return model.decoder.apply({'params': parts['decoder']}, codes, mask).astype(jnp.float32)


# ------------------------------------------------------------------------------------------- an independent classifier


class Classifier(nn.Module):
  """A small convolutional classifier of 16 x 16 pixels; [B, 16, 16, 3] -> logits f32[B, K]."""

  num_kinds: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    for width in (32, 64):
      x = nn.max_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
    x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
    return nn.Dense(self.num_kinds)(x)


def shrink(images: np.ndarray) -> np.ndarray:
  """uint8[B, H, W, 3] -> f32[B, 16, 16, 3] in -1..1, each pixel the mean of those it covers."""
  small = [
    np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX))
    for image in images
  ]
  return np.stack(small).astype(np.float32) / 127.5 - 1


def train_classifier(
  images: np.ndarray,
  kinds: np.ndarray,
  num_kinds: int,
  *,
  epochs: int = 12,
  batch_size: int = 128,
  seed: int = 0,
):
  """Learns to tell the kinds i32[B] of real training pictures uint8[B, H, W, 3]; returns classify(images) -> i32[B].

  It never sees a drawn picture, nor any feature of the model that it judges.
  """
  x, kinds = shrink(images), np.asarray(kinds, np.int32)
  steps = epochs * (len(x) // batch_size)
  module, tx = (
    Classifier(num_kinds),
    optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-2),
  )
  params = module.init(jax.random.key(seed), x[:1])

  def loss(params, x, kinds):
    return optax.softmax_cross_entropy_with_integer_labels(module.apply(params, x), kinds).mean()

  @jax.jit
  def step(params, opt_state, x, kinds):
    updates, opt_state = tx.update(jax.grad(loss)(params, x, kinds), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  opt_state, rng = tx.init(params), np.random.default_rng(seed)
  for _ in range(epochs):
    for rows in rng.permutation(len(x))[: len(x) // batch_size * batch_size].reshape(
      -1, batch_size
    ):
      params, opt_state = step(params, opt_state, x[rows], kinds[rows])
  predict = jax.jit(lambda x: module.apply(params, x).argmax(-1))
  return lambda images: np.asarray(predict(shrink(images)))


def background(image: np.ndarray) -> str:
  """The name of the background colour that is nearest to most of the border of a picture uint8[H, W, 3]."""
  border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]).astype(np.float32)
  names = list(colors.BACKGROUNDS)
  distance = np.square(
    border[:, None] - np.array(list(colors.BACKGROUNDS.values()), np.float32)
  ).sum(-1)
  return names[np.bincount(distance.argmin(-1), minlength=len(names)).argmax()]
