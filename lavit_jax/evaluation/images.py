"""Judges of generated images that are independent of the model: a classifier, and the background.

Axes: B images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from PIL import Image

from lavit_jax.data.emoji import colors

CLASSIFIER_SIZE = 16  # pixels a side


class Classifier(nn.Module):
  """A small convolutional classifier: [B, 16, 16, 3] -> logits f32[B, K]."""

  num_classes: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Returns the logits."""
    for width in (32, 64):
      x = nn.max_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
    x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
    return nn.Dense(self.num_classes)(x)


def shrink(images: np.ndarray) -> np.ndarray:
  """Shrinks images for the classifier; each pixel is the mean of those that it covers.

  Args:
    images: uint8[B, H, W, 3].

  Returns:
    f32[B, 16, 16, 3] in [-1, 1].
  """
  size = (CLASSIFIER_SIZE, CLASSIFIER_SIZE)
  small = [
    np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in images
  ]
  return np.stack(small).astype(np.float32) / 127.5 - 1


def train_classifier(
  images: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  *,
  epochs: int = 12,
  batch_size: int = 128,
  seed: int = 0,
) -> Callable[[np.ndarray], np.ndarray]:
  """Trains a classifier on real images.

  It never sees a generated image, nor a feature of the model that it judges.

  Args:
    images: uint8[B, H, W, 3].
    labels: i32[B], below `num_classes`.
    num_classes: K.
    epochs: passes over the images.
    batch_size: images of a step.
    seed: of the parameters and the order of the images.

  Returns:
    A function from images uint8[B, H, W, 3] to labels i32[B].
  """
  inputs = shrink(images)
  labels = np.asarray(labels, np.int32)
  steps_per_epoch = len(inputs) // batch_size
  classifier = Classifier(num_classes)
  schedule = optax.cosine_decay_schedule(2e-3, epochs * steps_per_epoch)
  optimizer = optax.adamw(schedule, weight_decay=1e-2)
  params = classifier.init(jax.random.key(seed), inputs[:1])
  opt_state = optimizer.init(params)

  def loss_fn(params, x: Array, y: Array) -> Array:
    logits = jnp.asarray(classifier.apply(params, x))
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  @jax.jit
  def train_step(params, opt_state, x: Array, y: Array):
    updates, opt_state = optimizer.update(jax.grad(loss_fn)(params, x, y), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  rng = np.random.default_rng(seed)
  for _ in range(epochs):
    order = rng.permutation(len(inputs))[: steps_per_epoch * batch_size]
    for batch in order.reshape(-1, batch_size):
      params, opt_state = train_step(params, opt_state, inputs[batch], labels[batch])

  @jax.jit
  def predict(x: Array) -> Array:
    return jnp.asarray(classifier.apply(params, x)).argmax(-1)

  return lambda images: np.asarray(predict(shrink(images)))


def background_color(image: np.ndarray) -> str:
  """Returns the background color that is nearest to most of the border of uint8[H, W, 3]."""
  border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]).astype(np.float32)
  names = list(colors.BACKGROUNDS)
  candidates = np.array(list(colors.BACKGROUNDS.values()), np.float32)
  distances = np.square(border[:, None] - candidates).sum(-1)
  votes = np.bincount(distances.argmin(-1), minlength=len(names))
  return names[votes.argmax()]
