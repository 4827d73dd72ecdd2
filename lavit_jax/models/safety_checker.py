"""Pictures -> which of them should not be shown: Stable Diffusion's safety checker, a CLIP ViT and the embeddings of what it looks for.

Source: Radford et al. 2021 (CLIP), section 2.4; the checker's rule as diffusers has it (`StableDiffusionSafetyChecker`).
Axes: B pictures, N patches, D width, P width of CLIP's common space, C concepts.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.models.layers import (
  CrossAttention,
  Dtype,
  LayerNorm,
  Mlp,
  constrain_batch,
  scan_blocks,
)

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
    x = constrain_batch(x)
    y = LayerNorm(dtype=self.dtype, name='norm1')(x)
    x = x + CrossAttention(self.num_heads, self.dtype, name='attn')(y, y)
    y = LayerNorm(dtype=self.dtype, name='norm2')(x)
    return x + Mlp(self.mlp_dim, self.dtype, quick_gelu, name='mlp')(y), None


class SafetyChecker(nn.Module):
  """The published one is CLIP ViT-L/14, (224, 14, 1024, 24, 16, 4096, 768), with 17 concepts and 3 special ones."""

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
    """Pictures f32[B, H, W, 3], cut by `center_square` and normalised by `vit.preprocess` -> unsafe bool[B], scores f32[B, C].

    A score is the cosine to a concept less its threshold, rounded to three places; above zero, the picture is unsafe.
    """
    table, (b, *_) = nn.initializers.normal(0.02), images.shape
    patch = (self.patch_size, self.patch_size)
    x = nn.Conv(
      self.hidden_size,
      patch,
      patch,
      padding='VALID',
      use_bias=False,
      dtype=self.dtype,
      name='patch_embed',
    )(images)
    x = x.reshape(b, -1, self.hidden_size)
    cls = self.param('cls_token', table, (self.hidden_size,)).astype(x.dtype)
    x = jnp.concatenate([jnp.broadcast_to(cls, (b, 1, self.hidden_size)), x], 1)
    x = x + self.param('pos_embed', table, x.shape[1:]).astype(x.dtype)
    x = LayerNorm(dtype=self.dtype, name='norm_in')(x)
    x, _ = scan_blocks(ClipBlock, self.num_layers, self.remat)(
      self.num_heads, self.mlp_dim, self.dtype, name='blocks'
    )(x)
    x = LayerNorm(dtype=self.dtype, name='norm')(x[:, 0])
    x = nn.Dense(self.output_dim, use_bias=False, dtype=self.dtype, name='proj')(x).astype(
      jnp.float32
    )

    def over(name: str, count: int) -> Array:
      concepts = self.param(name, nn.initializers.ones, (count, self.output_dim))
      return _unit(x) @ _unit(concepts).T - self.param(
        f'{name}_thresholds', nn.initializers.ones, (count,)
      )

    special = (jnp.round(over('special', self.num_special), 3) > 0).any(-1, keepdims=True)
    scores = jnp.round(over('concepts', self.num_concepts) + SPECIAL_CARE * special, 3)
    return (scores > 0).any(-1), scores


def _unit(x: Array) -> Array:
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def center_square(images: Array, size: int) -> Array:
  """uint8[B, H, W, 3] -> uint8[B, size, size, 3]: the shorter side becomes `size`, bicubic, and the middle of the longer one stays.

  As CLIPImageProcessor does it (transformers, by Pillow), which rounds to bytes after each of the two axes. Runs on the device.
  """
  height, width = images.shape[1:3]
  short = min(height, width)

  def axis(length: int) -> np.ndarray:
    longer = int(size * length / short)
    first = (longer - size) // 2
    return _bicubic(length, longer)[first : first + size]

  for axes, weights in (('bhwc,nw->bhnc', axis(width)), ('bhwc,nh->bnwc', axis(height))):
    x = jnp.einsum(axes, images.astype(jnp.float32), weights, precision=jax.lax.Precision.HIGHEST)
    images = jnp.floor(jnp.clip(x, 0, 255) + 0.5).astype(jnp.uint8)
  return images


def _bicubic(length: int, new_length: int) -> np.ndarray:
  """f32[new_length, length]: how much of each old pixel is in each new one, by Keys' cubic (a = -1/2), widened to shrink."""
  scale = length / new_length
  middle = (np.arange(new_length)[:, None] + 0.5) * scale
  pixels, wide = np.arange(length), max(scale, 1)
  x = np.abs(pixels + 0.5 - middle) / wide
  weights = np.where(
    x < 1, (1.5 * x - 2.5) * x**2 + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0)
  )
  return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
