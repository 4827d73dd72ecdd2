"""Pixels -> patch features: the EVA-CLIP image encoder (specification, Image encoder).

Axes: B images, N patches (row-major), D width, P output width. The feature map is the last block's, without the final norm.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.layers import (
  Dtype,
  LayerNorm,
  Mlp,
  SelfAttention,
  constrain_batch,
  scan_blocks,
)

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(images: Array) -> Array:
  """uint8[B, H, W, 3] RGB -> f32[B, H, W, 3], normalised by CLIP's mean and deviation. Runs on the device."""
  return (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)


class ViTBlock(nn.Module):
  """Pre-norm self-attention and MLP."""

  num_heads: int
  head_dim: int
  mlp_dim: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, None]:
    x = constrain_batch(x)
    attn = SelfAttention(
      self.num_heads, self.head_dim, key_bias=False, dtype=self.dtype, name='attn'
    )
    x = x + attn(LayerNorm(1e-6, self.dtype, name='norm1')(x))
    x = x + Mlp(self.mlp_dim, self.dtype, name='mlp')(LayerNorm(1e-6, self.dtype, name='norm2')(x))
    return x, None


class ViT(nn.Module):
  """EVA-CLIP ViT; the published `eva_vitg_psz14` is (224, 14, 1408, 40, 16, 88, 6144, 1024).

  `__call__` gives the features LaVIT uses; `pooled` puts the encoder's own head (contrastive training) on top of them.
  """

  image_size: int
  patch_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  output_dim: int
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  @property
  def num_patches(self) -> int:
    return (self.image_size // self.patch_size) ** 2

  def setup(self):
    patch = (self.patch_size, self.patch_size)
    table = nn.initializers.normal(0.02)
    self.patch_embed = nn.Conv(self.hidden_size, patch, patch, padding='VALID', dtype=self.dtype)
    self.cls_token = self.param('cls_token', table, (1, self.hidden_size))
    self.pos_embed = self.param('pos_embed', table, (1 + self.num_patches, self.hidden_size))
    self.blocks = scan_blocks(ViTBlock, self.num_layers, self.remat)(
      self.num_heads, self.head_dim, self.mlp_dim, self.dtype
    )
    self.norm = LayerNorm(1e-6, self.dtype)
    self.head = nn.Dense(self.output_dim, dtype=self.dtype)

  def __call__(self, images: Array) -> Array:
    """Normalised images f32[B, H, W, 3] -> dtype[B, 1 + N, D], CLS row first."""
    patches = self.patch_embed(images)
    patches = patches.reshape(images.shape[0], -1, self.hidden_size)
    cls = jnp.broadcast_to(
      self.cls_token.astype(patches.dtype), (images.shape[0], 1, self.hidden_size)
    )
    x = jnp.concatenate([cls, patches], axis=1) + self.pos_embed.astype(patches.dtype)
    x, _ = self.blocks(x)
    if self.is_initializing():
      self.pooled(x)  # the head has parameters of its own, which `init` should make too
    return x

  def pooled(self, features: Array) -> Array:
    """Features [B, 1 + N, D] -> dtype[B, P]: final norm and head of the CLS row."""
    return self.head(self.norm(features[:, 0]))
