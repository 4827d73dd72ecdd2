"""Codes -> a map of patch features: stage 1's target, and the condition of the U-Net (specification, Decoder).

Axes: B images, N patches (and slots), C code width, D feature width. Codes stand in a prefix of the N slots.
"""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.layers import (
  CrossAttention,
  Dtype,
  LayerNorm,
  Mlp,
  SelfAttention,
  attention,
  constrain_batch,
  merge_heads,
  scan_blocks,
  split_heads,
)


class DecoderBlock(nn.Module):
  """Self-attention of the queries, cross-attention to the codes, MLP; all pre-norm."""

  num_heads: int
  mlp_dim: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, codes: Array, mask: Array) -> tuple[Array, None]:
    def norm(name: str) -> LayerNorm:
      return LayerNorm(1e-5, self.dtype, name=name)

    among = SelfAttention(
      self.num_heads, x.shape[-1] // self.num_heads, dtype=self.dtype, name='self_attn'
    )
    cross = CrossAttention(self.num_heads, self.dtype, name='cross_attn')
    x = constrain_batch(x)
    x = x + among(norm('norm0')(x))
    x = x + cross(norm('norm1')(x), codes, partial(attention, mask=mask))
    x = x + Mlp(self.mlp_dim, self.dtype, name='mlp')(norm('norm2')(x))
    return x, None


class AttentionPool(nn.Module):
  """CLIP's attention pool: the mean token asks all tokens, once; [B, N, D] -> dtype[B, P]."""

  num_heads: int
  output_dim: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    def linear(features: int, name: str) -> nn.Dense:
      return nn.Dense(features, dtype=self.dtype, name=name)

    _, n, width = x.shape
    x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
    x = x + self.param('pos_embed', nn.initializers.normal(width**-0.5), (n + 1, width)).astype(
      x.dtype
    )
    q, k, v = linear(width, 'query')(x[:, :1]), linear(width, 'key')(x), linear(width, 'value')(x)
    pooled = attention(*(split_heads(t, self.num_heads) for t in (q, k, v)))
    return linear(self.output_dim, 'proj')(merge_heads(pooled)[:, 0])


class FeatureDecoder(nn.Module):
  """N learned queries read the codes and become the feature map.

  `context_dims` are the widths of the linear heads whose outputs, side by side, condition the U-Net: (768,) for SD 1.5,
  (768, 1280) for SDXL, which also wants a `pooled_dim` of 1280.
  """

  hidden_size: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  num_patches: int
  code_dim: int
  context_dims: tuple[int, ...]
  pooled_dim: int | None = None
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  def setup(self):
    def linear(features: int) -> nn.Dense:
      return nn.Dense(features, dtype=self.dtype)

    table = nn.initializers.normal(0.02)
    self.pos_embed = self.param('pos_embed', table, (self.num_patches, self.hidden_size))
    self.query_embed = self.param('query_embed', table, (self.num_patches, self.hidden_size))
    self.in_proj = linear(self.hidden_size)
    self.blocks = scan_blocks(DecoderBlock, self.num_layers, self.remat)(
      self.num_heads, self.mlp_dim, self.dtype
    )
    self.norm = LayerNorm(1e-5, self.dtype)
    self.fc1, self.fc2 = linear(self.hidden_size), linear(self.hidden_size)
    self.context_proj = [linear(width) for width in self.context_dims]
    if self.pooled_dim is not None:
      self.pool = AttentionPool(self.num_heads, self.pooled_dim, self.dtype)

  def __call__(self, codes: Array, mask: Array) -> Array:
    """Codes [B, N, C] compacted to a prefix, with mask bool[B, N] of that prefix -> features dtype[B, N, D]."""
    codes = self.in_proj(codes)
    codes = codes + self.pos_embed.astype(codes.dtype)  # by slot, not by patch
    queries = jnp.broadcast_to(self.query_embed.astype(codes.dtype), codes.shape)
    x, _ = self.blocks(queries, codes, mask[:, None, None, :])
    features = self.fc2(nn.tanh(self.fc1(self.norm(x))))
    if self.is_initializing():
      self.context(features)  # the heads have parameters of their own, which `init` should make too
    return features

  def context(self, features: Array) -> tuple[Array, Array | None]:
    """Features [B, N, D] -> the U-Net's (context dtype[B, N, sum(context_dims)], pooled dtype[B, pooled_dim] or None)."""
    context = jnp.concatenate([head(features) for head in self.context_proj], axis=-1)
    return context, None if self.pooled_dim is None else self.pool(features)


def null_context(uncond_embeddings: Array, num_rows: int) -> tuple[Array, Array]:
  """The unconditional context: stored rows [R, E] padded to (context [num_rows, E], mask bool[num_rows]); R <= num_rows.

  Raises:
    ValueError: more rows are stored than fit.
  """
  stored = uncond_embeddings.shape[0]
  if stored > num_rows:
    raise ValueError(f'{stored} unconditional rows do not fit the {num_rows} rows of the context')
  return jnp.pad(uncond_embeddings, ((0, num_rows - stored), (0, 0))), jnp.arange(num_rows) < stored
