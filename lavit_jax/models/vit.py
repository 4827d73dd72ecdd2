"""Pixels -> patch features: the EVA-CLIP image encoder (specification, Image encoder).

Axes: B images, N patches (row-major), D width, P output width. The feature map is that of the last
block, before the final norm.
"""

import chex
import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.attention import SelfAttention
from lavit_jax.models.layers import Dtype, LayerNorm, Mlp
from lavit_jax.models.remat import scan_blocks
from lavit_jax.sharding import constrain_batch

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(images: Array) -> Array:
  """uint8[B, H, W, 3] RGB -> f32[B, H, W, 3], normalized by CLIP's mean and deviation.

  It runs on the device.
  """
  return (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)


class ViTBlock(nn.Module):
  """Pre-norm self-attention and MLP.

  It sows its output as the intermediate 'stream' [B, 1 + N, D].
  """

  num_heads: int
  head_dim: int
  mlp_dim: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, None]:
    """[B, 1 + N, D] -> (dtype[B, 1 + N, D], None)."""

    def norm(name: str) -> LayerNorm:
      return LayerNorm(1e-6, self.dtype, name=name)

    x = constrain_batch(x)
    attention = SelfAttention(
      self.num_heads, self.head_dim, key_bias=False, dtype=self.dtype, name='attn'
    )
    x = x + attention(norm('norm1')(x))
    x = x + Mlp(self.mlp_dim, self.dtype, name='mlp')(norm('norm2')(x))
    self.sow('intermediates', 'stream', x)
    return x, None


class ViT(nn.Module):
  """EVA-CLIP ViT; the published `eva_vitg_psz14` is (224, 14, 1408, 40, 16, 88, 6144, 1024).

  `__call__` returns the features that LaVIT uses; `pooled` applies the encoder's own head
  (contrastive training) to them.
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
  def patches_per_side(self) -> int:
    """Patches along one side of an image."""
    return self.image_size // self.patch_size

  @property
  def num_patches(self) -> int:
    """N."""
    return self.patches_per_side**2

  def setup(self):
    """Makes the parameters and submodules."""
    patch = (self.patch_size, self.patch_size)
    table = nn.initializers.normal(0.02)
    self.patch_embed = nn.Conv(self.hidden_size, patch, patch, padding='VALID', dtype=self.dtype)
    self.cls_token = self.param('cls_token', table, (1, self.hidden_size))
    self.pos_embed = self.param('pos_embed', table, (1 + self.num_patches, self.hidden_size))
    make_blocks = scan_blocks(ViTBlock, self.num_layers, self.remat)
    self.blocks = make_blocks(self.num_heads, self.head_dim, self.mlp_dim, self.dtype)
    self.norm = LayerNorm(1e-6, self.dtype)
    self.head = nn.Dense(self.output_dim, dtype=self.dtype)

  def __call__(self, images: Array) -> Array:
    """Normalized images f32[B, H, W, 3] -> dtype[B, 1 + N, D], the CLS row first."""
    chex.assert_shape(images, (None, self.image_size, self.image_size, 3))
    batch = images.shape[0]
    patches = self.patch_embed(images)
    patches = patches.reshape(batch, -1, self.hidden_size)
    cls_token = self.cls_token.astype(patches.dtype)
    cls = jnp.broadcast_to(cls_token, (batch, 1, self.hidden_size))
    x = jnp.concatenate([cls, patches], axis=1) + self.pos_embed.astype(patches.dtype)
    x, _ = self.blocks(x)
    if self.is_initializing():
      self.pooled(x)  # so that `init` makes the parameters of the head, too
    return x

  def pooled(self, features: Array) -> Array:
    """Features [B, 1 + N, D] -> dtype[B, P]: final norm and head of the CLS row."""
    return self.head(self.norm(features[:, 0]))

  def final_norm(self, x: Array) -> Array:
    """[..., D] -> dtype[..., D]."""
    return self.norm(x)
