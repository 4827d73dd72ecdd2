"""Images for people to look at: kept patches, features as colors, grids.

Axes: B images, N patches, D width of the features.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.models.quantizer import l2_normalize

# RGB at equal steps from 0 to 1: the CIE lightness rises by about a fifth of its range at each.
_HEAT = ((10, 8, 20), (82, 14, 96), (168, 38, 84), (228, 92, 46), (248, 168, 60), (252, 244, 190))


def shade_dropped_patches(images: Array | np.ndarray, keep: Array | np.ndarray) -> Array:
  """Bleaches the patches of an image that did not become visual tokens.

  Args:
    images: uint8[B, H, W, 3].
    keep: bool or f32[B, N], 1 where a patch became a token; N is a square.

  Returns:
    uint8[B, H, W, 3].
  """
  chex.assert_rank([images, keep], [4, 2])
  side = round(keep.shape[1] ** 0.5)
  mask = jnp.asarray(keep > 0).reshape(-1, side, side, 1)
  mask = mask.repeat(images.shape[1] // side, 1).repeat(images.shape[2] // side, 2)
  return jnp.where(mask, images, 235 + images // 16)


def similarity_cells(similarities: Array) -> Array:
  """Draws a matrix as gray cells of 8 x 8 pixels, black at 0 and below, white at 1.

  Args:
    similarities: f32[H, W].

  Returns:
    uint8[1, 8 * H, 8 * W, 3].
  """
  gray = (jnp.clip(similarities, 0, 1) * 255).astype(jnp.uint8)
  gray = gray.repeat(8, 0).repeat(8, 1)
  return jnp.stack([gray] * 3, -1)[None]


def probability_colors(probabilities: np.ndarray, size: int) -> np.ndarray:
  """Colors the probability of each patch, from black at 0 through red to pale yellow at 1.

  The lightness rises evenly, so that the order of the probabilities shows without color, too.

  Args:
    probabilities: f32[B, N] in 0..1; N is a square.
    size: the side of the images, in pixels, a multiple of the number of patches along a side.

  Returns:
    uint8[B, size, size, 3].
  """
  side = round(probabilities.shape[1] ** 0.5)
  squares = probabilities.reshape(-1, side, side)
  pixels = squares.repeat(size // side, 1).repeat(size // side, 2)
  return colors_of_scale(pixels)


def colors_of_scale(values: np.ndarray) -> np.ndarray:
  """Returns the colors uint8[..., 3] of values f32[...] in 0..1, as `probability_colors` does."""
  positions = np.linspace(0, 1, len(_HEAT))
  channels = [np.interp(values, positions, channel) for channel in zip(*_HEAT, strict=True)]
  return np.rint(np.stack(channels, -1)).astype(np.uint8)


def feature_colors(features: Array, reconstructed: Array, size: int) -> tuple[Array, Array]:
  """Colors features and their reconstruction by the same three directions.

  These are the first three principal axes of `features`. Lengths do not show, since the loss of
  the tokenizer does not see them.

  Args:
    features: f32[B, N, D].
    reconstructed: f32[B, N, D].
    size: the side of the images, in pixels.

  Returns:
    Two arrays uint8[B, size, size, 3].
  """
  chex.assert_rank(features, 3)
  chex.assert_equal_shape([features, reconstructed])
  directions = l2_normalize(features)
  center = directions.mean((0, 1))
  centered = (directions - center).reshape(-1, features.shape[-1])
  _, _, axes = jnp.linalg.svd(centered, full_matrices=False)
  projected = (directions - center) @ axes[:3].T
  scale = 2 * projected.std((0, 1))
  side = round(features.shape[1] ** 0.5)

  def colors(values: Array) -> Array:
    pixels = (127.5 + 127.5 * (values / scale).clip(-1, 1)).astype(jnp.uint8)
    pixels = pixels.reshape(-1, side, side, 3)
    return pixels.repeat(size // side, 1).repeat(size // side, 2)

  return colors(projected), colors((l2_normalize(reconstructed) - center) @ axes[:3].T)


def image_grid(*rows: np.ndarray) -> np.ndarray:
  """Rows of images uint8[n, H, W, 3] -> one image uint8[rows * H, n * W, 3]."""
  return np.concatenate([np.concatenate(list(np.asarray(row)), axis=1) for row in rows], axis=0)
