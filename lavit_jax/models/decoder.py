"""Codes -> a map of patch features: stage 1's target, and the U-Net's condition.

Source: specification, Decoder.

Axes: B images, N patches (and slots), C code width, D feature width, P pooled width. The codes of
an image take a prefix of the N slots.
"""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.attention import (
  CrossAttention,
  SelfAttention,
  attention,
  counterfactual_attention,
  merge_heads,
  split_heads,
)
from lavit_jax.models.layers import Dtype, LayerNorm, Mlp
from lavit_jax.models.remat import scan_blocks
from lavit_jax.sharding import constrain_batch


class DecoderBlock(nn.Module):
  """Self-attention of the queries, cross-attention to the codes, MLP; all pre-norm."""

  num_heads: int
  mlp_dim: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, codes: Array, mask: Array) -> tuple[Array, None]:
    """Decodes one step further.

    Args:
      x: queries [B, N, D].
      codes: [B, N, D].
      mask: bool[B, 1, 1, N], or the f32 policy of `counterfactual_attention`.

    Returns:
      (dtype[B, N, D], None).
    """

    def norm(name: str) -> LayerNorm:
      return LayerNorm(1e-5, self.dtype, name=name)

    head_dim = x.shape[-1] // self.num_heads
    self_attention = SelfAttention(self.num_heads, head_dim, dtype=self.dtype, name='self_attn')
    cross = CrossAttention(self.num_heads, self.dtype, name='cross_attn')
    x = constrain_batch(x)
    x = x + self_attention(norm('norm0')(x))
    if mask.dtype == jnp.bool:
      attend = partial(attention, mask=mask)
    else:
      attend = partial(counterfactual_attention, policy=mask)
    x = x + cross(norm('norm1')(x), codes, attend)
    x = x + Mlp(self.mlp_dim, self.dtype, name='mlp')(norm('norm2')(x))
    return x, None


class AttentionPool(nn.Module):
  """CLIP's attention pool: the mean token attends to all tokens."""

  num_heads: int
  output_dim: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, N, D] -> dtype[B, P]."""

    def linear(features: int, name: str) -> nn.Dense:
      return nn.Dense(features, dtype=self.dtype, name=name)

    _, n, width = x.shape
    x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
    table = nn.initializers.normal(width**-0.5)
    x = x + self.param('pos_embed', table, (n + 1, width)).astype(x.dtype)
    q = linear(width, 'query')(x[:, :1])
    k = linear(width, 'key')(x)
    v = linear(width, 'value')(x)
    q, k, v = (split_heads(y, self.num_heads) for y in (q, k, v))
    pooled = attention(q, k, v)
    return linear(self.output_dim, 'proj')(merge_heads(pooled)[:, 0])


class FeatureDecoder(nn.Module):
  """N learned queries attend to the codes and become the feature map.

  Attributes:
    hidden_size: D.
    num_layers: number of blocks.
    num_heads: of every attention.
    mlp_dim: hidden width of the MLPs.
    num_patches: N.
    code_dim: C.
    context_dims: widths of the linear heads whose outputs, side by side, condition the U-Net:
      (768,) for SD 1.5, (768, 1280) for SDXL.
    pooled_dim: P, the width of SDXL's pooled condition, 1280; None without one.
    dtype: of the computation.
    remat: policy of the blocks ('none' or a key of `remat.REMAT_POLICIES`).
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
    """Makes the parameters and submodules."""

    def linear(features: int) -> nn.Dense:
      return nn.Dense(features, dtype=self.dtype)

    table = nn.initializers.normal(0.02)
    self.pos_embed = self.param('pos_embed', table, (self.num_patches, self.hidden_size))
    self.query_embed = self.param('query_embed', table, (self.num_patches, self.hidden_size))
    self.in_proj = linear(self.hidden_size)
    make_blocks = scan_blocks(DecoderBlock, self.num_layers, self.remat)
    self.blocks = make_blocks(self.num_heads, self.mlp_dim, self.dtype)
    self.norm = LayerNorm(1e-5, self.dtype)
    self.fc1 = linear(self.hidden_size)
    self.fc2 = linear(self.hidden_size)
    self.context_proj = [linear(width) for width in self.context_dims]
    if self.pooled_dim is not None:
      self.pool = AttentionPool(self.num_heads, self.pooled_dim, self.dtype)

  def __call__(self, codes: Array, mask: Array) -> Array:
    """Decodes codes to patch features.

    Args:
      codes: [B, N, C], compacted to a prefix.
      mask: bool[B, N], True in that prefix.

    Returns:
      dtype[B, N, D].
    """
    chex.assert_shape(codes, (None, self.num_patches, self.code_dim))
    chex.assert_shape(mask, codes.shape[:2])
    features = self._decode(codes, self.pos_embed, mask)
    if self.is_initializing():
      self.context(features)  # so that `init` makes the parameters of the heads, too
    return features

  def decode_kept(self, codes: Array, keep: Array) -> Array:
    """Decodes the codes of the kept patches, with gradients to the choice of patches.

    The result is that of `__call__` on the compacted codes. The gradient by `keep` of a dropped
    patch is what its code would change, in the slot that it would take; see
    `counterfactual_attention`.

    Args:
      codes: of all patches, [B, N, C].
      keep: f32[B, N], 0 or 1.

    Returns:
      dtype[B, N, D].
    """
    chex.assert_shape(codes, (None, self.num_patches, self.code_dim))
    chex.assert_shape(keep, codes.shape[:2])
    kept = jax.lax.stop_gradient(keep)
    slot = (jnp.cumsum(kept, axis=-1) - kept).astype(jnp.int32)  # kept patches before this one
    return self._decode(codes, self.pos_embed[slot], keep.astype(jnp.float32))

  def _decode(self, codes: Array, positions: Array, mask: Array) -> Array:
    """Codes [B, N, C], position embeddings [..., N, D], mask or policy [B, N] -> [B, N, D]."""
    codes = self.in_proj(codes)
    codes = codes + positions.astype(codes.dtype)  # by slot, not by patch
    queries = jnp.broadcast_to(self.query_embed.astype(codes.dtype), codes.shape)
    x, _ = self.blocks(queries, codes, mask[:, None, None, :])
    return self.fc2(nn.tanh(self.fc1(self.norm(x))))

  def context(self, features: Array) -> tuple[Array, Array | None]:
    """The U-Net's condition.

    Args:
      features: [B, N, D].

    Returns:
      context dtype[B, N, sum(context_dims)], and pooled dtype[B, P] or None.
    """
    context = jnp.concatenate([head(features) for head in self.context_proj], axis=-1)
    return context, None if self.pooled_dim is None else self.pool(features)


def null_context(uncond_embeddings: Array, num_rows: int) -> tuple[Array, Array]:
  """The unconditional context of the U-Net, padded to a number of rows.

  Args:
    uncond_embeddings: the stored rows [R, E], R <= num_rows.
    num_rows: of the context.

  Returns:
    context [num_rows, E], and mask bool[num_rows], True for the stored rows.

  Raises:
    ValueError: more rows are stored than fit.
  """
  stored = uncond_embeddings.shape[0]
  if stored > num_rows:
    raise ValueError(f'{stored} unconditional rows do not fit the {num_rows} rows of the context')
  context = jnp.pad(uncond_embeddings, ((0, num_rows - stored), (0, 0)))
  return context, jnp.arange(num_rows) < stored
