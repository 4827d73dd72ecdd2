"""Images -> which of them should not be shown: Stable Diffusion's safety checker.

It is a CLIP ViT, and the embeddings of the concepts that it detects. Source: Radford et al. 2021
(CLIP), section 2.4; the rule is that of diffusers (`StableDiffusionSafetyChecker`).

Axes: B images, P width of CLIP's common space, C concepts.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.models.clip_vit import ClipViT
from lavit_jax.models.layers import Dtype

SPECIAL_CARE = 0.01  # by how much a special concept lowers the thresholds of all others


class SafetyChecker(nn.Module):
  """CLIP's image encoder, and thresholds of the cosines to concepts.

  The published one is CLIP ViT-L/14, (224, 14, 1024, 24, 16, 4096, 768), with 17 concepts and 3
  special ones.
  """

  image_size: int
  patch_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  output_dim: int
  num_concepts: int = 17
  num_special: int = 3
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  def setup(self):
    """Makes the parameters and submodules."""
    self.encoder = ClipViT(
      self.image_size,
      self.patch_size,
      self.hidden_size,
      self.num_layers,
      self.num_heads,
      self.mlp_dim,
      self.dtype,
      self.remat,
    )
    nn.share_scope(self, self.encoder)  # its parameters lie beside those of the checker
    self.proj = nn.Dense(self.output_dim, use_bias=False, dtype=self.dtype)
    for name, count in (('special', self.num_special), ('concepts', self.num_concepts)):
      self.param(name, nn.initializers.ones, (count, self.output_dim))
      self.param(f'{name}_thresholds', nn.initializers.ones, (count,))

  def __call__(self, images: Array) -> tuple[Array, Array]:
    """Scores images.

    Args:
      images: f32[B, H, W, 3], cropped by `center_square` and normalized by `vit.preprocess`.

    Returns:
      unsafe bool[B], and scores f32[B, C]. A score is the cosine to a concept less its threshold,
      rounded to three places; an image with one above zero is unsafe.
    """
    cls = self.encoder.final_norm(self.encoder(images)[:, 0])
    embeddings = _unit(self.proj(cls).astype(jnp.float32))
    special = jnp.round(self._scores(embeddings, 'special'), 3)
    needs_care = (special > 0).any(-1, keepdims=True)
    concepts = self._scores(embeddings, 'concepts')
    scores = jnp.round(concepts + SPECIAL_CARE * needs_care, 3)
    return (scores > 0).any(-1), scores

  def _scores(self, embeddings: Array, name: str) -> Array:
    """Cosines f32[B, C] of f32[B, P] to the concepts `name`, less their thresholds."""
    concepts = self.get_variable('params', name)
    return embeddings @ _unit(concepts).T - self.get_variable('params', f'{name}_thresholds')


def _unit(x: Array) -> Array:
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def center_square(images: Array, size: int) -> Array:
  """Scales the shorter side to `size` (bicubic), and crops the longer side to its center.

  As transformers' CLIPImageProcessor does it by Pillow, which rounds to bytes after each of the two
  axes. It runs on the device.

  Args:
    images: uint8[B, H, W, 3].
    size: of the result.

  Returns:
    uint8[B, size, size, 3].
  """
  chex.assert_shape(images, (None, None, None, 3))
  height, width = images.shape[1:3]
  shorter = min(height, width)

  def axis_weights(length: int) -> np.ndarray:
    scaled = int(size * length / shorter)
    first = (scaled - size) // 2
    return _bicubic(length, scaled)[first : first + size]

  images = _resample(images, 'bhwc,nw->bhnc', axis_weights(width))
  return _resample(images, 'bhwc,nh->bnwc', axis_weights(height))


def _resample(images: Array, axes: str, weights: np.ndarray) -> Array:
  highest = jax.lax.Precision.HIGHEST
  x = jnp.einsum(axes, images.astype(jnp.float32), weights, precision=highest)
  return jnp.floor(jnp.clip(x, 0, 255) + 0.5).astype(jnp.uint8)


def _bicubic(length: int, new_length: int) -> np.ndarray:
  """The share of each old pixel in each new one, f32[new_length, length].

  By Keys' cubic (a = -1/2), widened where it shrinks.
  """
  scale = length / new_length
  middle = (np.arange(new_length)[:, None] + 0.5) * scale
  x = np.abs(np.arange(length) + 0.5 - middle) / max(scale, 1)
  near = (1.5 * x - 2.5) * x**2 + 1
  far = ((-0.5 * x + 2.5) * x - 4) * x + 2
  weights = np.where(x < 1, near, np.where(x < 2, far, 0))
  return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
