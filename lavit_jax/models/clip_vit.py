"""Pixels -> patch features: CLIP's image encoder (Radford et al. 2021, section 2.4).

The safety checker and the interfaces of LLaVA and Flamingo read images by it.

Axes: B images, N patches (row-major), D width.
"""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.attention import CrossAttention, attention
from lavit_jax.models.layers import Dtype, LayerNorm, Mlp
from lavit_jax.models.remat import scan_blocks
from lavit_jax.sharding import constrain_batch

CLIP = 'clip'  # the architecture of an image encoder, in the settings of a checkpoint
EVA = 'eva'  # models/vit.py


def quick_gelu(x: Array) -> Array:
  """CLIP's approximation of GELU."""
  return x * jax.nn.sigmoid(1.702 * x)


class ClipBlock(nn.Module):
  """Pre-norm self-attention and MLP.

  It sows its output as the intermediate 'stream' [B, N, D]. The text encoder's blocks are causal.
  """

  num_heads: int
  mlp_dim: int
  dtype: Dtype = jnp.float32
  causal: bool = False

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, None]:
    """[B, N, D] -> (dtype[B, N, D], None)."""
    x = constrain_batch(x)
    attend = attention
    if self.causal:
      attend = partial(attention, mask=jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool)))
    y = LayerNorm(dtype=self.dtype, name='norm1')(x)
    x = x + CrossAttention(self.num_heads, self.dtype, name='attn')(y, y, attend)
    y = LayerNorm(dtype=self.dtype, name='norm2')(x)
    x = x + Mlp(self.mlp_dim, self.dtype, quick_gelu, name='mlp')(y)
    self.sow('intermediates', 'stream', x)
    return x, None


class ClipViT(nn.Module):
  """CLIP's ViT; the published ViT-L/14 is (224, 14, 1024, 24, 16, 4096)."""

  image_size: int
  patch_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  @property
  def num_patches(self) -> int:
    """N."""
    return (self.image_size // self.patch_size) ** 2

  def setup(self):
    """Makes the parameters and submodules."""
    patch = (self.patch_size, self.patch_size)
    table = nn.initializers.normal(0.02)
    self.patch_embed = nn.Conv(
      self.hidden_size, patch, patch, padding='VALID', use_bias=False, dtype=self.dtype
    )
    self.cls_token = self.param('cls_token', table, (self.hidden_size,))
    self.pos_embed = self.param('pos_embed', table, (1 + self.num_patches, self.hidden_size))
    self.norm_in = LayerNorm(dtype=self.dtype)
    make_blocks = scan_blocks(ClipBlock, self.num_layers, self.remat)
    self.blocks = make_blocks(self.num_heads, self.mlp_dim, self.dtype)
    self.norm = LayerNorm(dtype=self.dtype)

  def __call__(self, images: Array) -> Array:
    """Normalized images f32[B, H, W, 3] -> dtype[B, 1 + N, D], the CLS row first, not normed."""
    chex.assert_shape(images, (None, self.image_size, self.image_size, 3))
    batch = images.shape[0]
    x = self.patch_embed(images).reshape(batch, -1, self.hidden_size)
    cls = self.cls_token.astype(x.dtype)
    x = jnp.concatenate([jnp.broadcast_to(cls, (batch, 1, self.hidden_size)), x], 1)
    x = x + self.pos_embed.astype(x.dtype)
    x, _ = self.blocks(self.norm_in(x))
    if self.is_initializing():
      self.final_norm(x)  # so that `init` makes its parameters, too
    return x

  def final_norm(self, x: Array) -> Array:
    """[..., D] -> dtype[..., D]."""
    return self.norm(x)
