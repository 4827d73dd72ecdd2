"""Images -> which of them should not be shown: Stable Diffusion's safety checker.

It is a CLIP ViT, and the embeddings of the concepts that it detects. Source: Radford et al. 2021
(CLIP), section 2.4; the rule is that of diffusers (`StableDiffusionSafetyChecker`).

Axes: B images, N patches, D width, P width of CLIP's common space, C concepts.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.models.attention import CrossAttention
from lavit_jax.models.layers import Dtype, LayerNorm, Mlp
from lavit_jax.models.remat import scan_blocks
from lavit_jax.sharding import constrain_batch

SPECIAL_CARE = 0.01  # by how much a special concept lowers the thresholds of all others


def quick_gelu(x: Array) -> Array:
  """CLIP's approximation of GELU."""
  return x * jax.nn.sigmoid(1.702 * x)


class ClipBlock(nn.Module):
  """Pre-norm self-attention and MLP."""

  num_heads: int
  mlp_dim: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, None]:
    """[B, N, D] -> (dtype[B, N, D], None)."""
    x = constrain_batch(x)
    y = LayerNorm(dtype=self.dtype, name='norm1')(x)
    x = x + CrossAttention(self.num_heads, self.dtype, name='attn')(y, y)
    y = LayerNorm(dtype=self.dtype, name='norm2')(x)
    return x + Mlp(self.mlp_dim, self.dtype, quick_gelu, name='mlp')(y), None


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

  @nn.compact
  def __call__(self, images: Array) -> tuple[Array, Array]:
    """Scores images.

    Args:
      images: f32[B, H, W, 3], cropped by `center_square` and normalized by `vit.preprocess`.

    Returns:
      unsafe bool[B], and scores f32[B, C]. A score is the cosine to a concept less its threshold,
      rounded to three places; an image with one above zero is unsafe.
    """
    chex.assert_shape(images, (None, self.image_size, self.image_size, 3))
    embeddings = self._embed(images)
    special = jnp.round(self._scores(embeddings, 'special', self.num_special), 3)
    needs_care = (special > 0).any(-1, keepdims=True)
    concepts = self._scores(embeddings, 'concepts', self.num_concepts)
    scores = jnp.round(concepts + SPECIAL_CARE * needs_care, 3)
    return (scores > 0).any(-1), scores

  def _embed(self, images: Array) -> Array:
    """Unit vectors f32[B, P] in CLIP's common space."""
    batch = images.shape[0]
    table = nn.initializers.normal(0.02)
    patch = (self.patch_size, self.patch_size)
    patch_embed = nn.Conv(
      self.hidden_size,
      patch,
      patch,
      padding='VALID',
      use_bias=False,
      dtype=self.dtype,
      name='patch_embed',
    )
    x = patch_embed(images).reshape(batch, -1, self.hidden_size)
    cls = self.param('cls_token', table, (self.hidden_size,)).astype(x.dtype)
    x = jnp.concatenate([jnp.broadcast_to(cls, (batch, 1, self.hidden_size)), x], 1)
    x = x + self.param('pos_embed', table, x.shape[1:]).astype(x.dtype)
    x = LayerNorm(dtype=self.dtype, name='norm_in')(x)
    make_blocks = scan_blocks(ClipBlock, self.num_layers, self.remat)
    x, _ = make_blocks(self.num_heads, self.mlp_dim, self.dtype, name='blocks')(x)
    x = LayerNorm(dtype=self.dtype, name='norm')(x[:, 0])
    x = nn.Dense(self.output_dim, use_bias=False, dtype=self.dtype, name='proj')(x)
    return _unit(x.astype(jnp.float32))

  def _scores(self, embeddings: Array, name: str, count: int) -> Array:
    """Cosines f32[B, count] to the concepts `name`, less their thresholds."""
    concepts = self.param(name, nn.initializers.ones, (count, self.output_dim))
    thresholds = self.param(f'{name}_thresholds', nn.initializers.ones, (count,))
    return embeddings @ _unit(concepts).T - thresholds


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
