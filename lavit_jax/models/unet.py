"""Noisy latents -> the noise in them, under a condition: the U-Net of SD 1.5 and of SDXL.

The numerics are those of diffusers' UNet2DConditionModel, so that its weights can be ported.

Axes: B batch, h and w latents, Z latent channels, C channels, N = h * w positions, M condition
rows, E condition width, T time embedding width, H heads, d head width; latents are NHWC.
"""

import chex
import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.attention import attention, merge_heads, split_heads
from lavit_jax.models.attention_kernels import image_attention
from lavit_jax.models.layers import Dtype, LayerNorm, gelu
from lavit_jax.models.remat import remat_block, scan_blocks
from lavit_jax.models.resnet import Conv, Downsample, GroupNorm, ResnetBlock, Upsample
from lavit_jax.sharding import constrain_batch

MASKED = -10000.0  # what diffusers adds to the scores of masked condition rows


def sinusoids(values: Array, width: int, cosines_first: bool = True, shift: float = 0.0) -> Array:
  """Cosines and sines of values times 10000^(-i / (width/2 - shift)), i = 0, ..., width/2 - 1.

  Args:
    values: [...].
    width: of the result.
    cosines_first: whether cosines come before sines (diffusers' flip_sin_to_cos).
    shift: diffusers' freq_shift.

  Returns:
    f32[..., width].
  """
  half = width // 2
  frequency = jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / (half - shift))
  angles = values[..., None].astype(jnp.float32) * frequency
  waves = [jnp.cos(angles), jnp.sin(angles)]
  return jnp.concatenate(waves if cosines_first else waves[::-1], axis=-1)


class Embedding(nn.Module):
  """Linear, SiLU, Linear."""

  width: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, any] -> [B, T]."""
    x = nn.silu(nn.Dense(self.width, dtype=self.dtype, name='linear_1')(x))
    return nn.Dense(self.width, dtype=self.dtype, name='linear_2')(x)


class Attention(nn.Module):
  """Multi-head attention; only the output projection has a bias.

  It is self-attention without `memory`, else attention to memory with a `bias` of the scores.
  """

  num_heads: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, memory: Array | None = None, bias: Array | None = None) -> Array:
    """Input x [B, N, C], memory [B, M, any] and bias [B, 1, 1, M] -> [B, N, C]."""

    def heads(y: Array, name: str) -> Array:
      linear = nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name=name)
      return split_heads(linear(y), self.num_heads)

    q = heads(x, 'to_q')
    k = heads(x if memory is None else memory, 'to_k')
    v = heads(x if memory is None else memory, 'to_v')
    attended = image_attention(q, k, v) if memory is None else attention(q, k, v, bias=bias)
    return nn.Dense(x.shape[-1], dtype=self.dtype, name='to_out')(merge_heads(attended))


class GEGLU(nn.Module):
  """Linear to 4C values and 4C gates, value * gelu(gate) by the exact GELU, Linear back to C."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, N, C] -> [B, N, C]."""
    channels = x.shape[-1]
    hidden = nn.Dense(8 * channels, dtype=self.dtype, name='fc1')(x)
    value, gate = jnp.split(hidden, 2, axis=-1)
    return nn.Dense(channels, dtype=self.dtype, name='fc2')(value * gelu(gate))


class TransformerBlock(nn.Module):
  """Self-attention, attention to the condition, GEGLU, each pre-norm with a residual."""

  num_heads: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, context: Array, bias: Array | None) -> tuple[Array, None]:
    """Input x [B, N, C], context [B, M, E], bias [B, 1, 1, M] -> ([B, N, C], None)."""

    def norm(name: str) -> LayerNorm:
      return LayerNorm(1e-5, self.dtype, name=name)

    x += Attention(self.num_heads, self.dtype, name='attn1')(norm('norm1')(x))
    x += Attention(self.num_heads, self.dtype, name='attn2')(norm('norm2')(x), context, bias)
    return x + GEGLU(self.dtype, name='ff')(norm('norm3')(x)), None


class Transformer(nn.Module):
  """Transformer blocks over all positions, between two projections, with a residual."""

  num_layers: int
  num_heads: int
  num_groups: int
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  @nn.compact
  def __call__(self, x: Array, context: Array, bias: Array | None) -> Array:
    """Input x [B, h, w, C], context [B, M, E], bias [B, 1, 1, M] -> [B, h, w, C]."""
    batch, h, w, channels = x.shape
    y = GroupNorm(self.num_groups, 1e-6, self.dtype, name='norm')(x)
    y = y.reshape(batch, h * w, channels)
    y = nn.Dense(channels, dtype=self.dtype, name='proj_in')(y)
    blocks = scan_blocks(TransformerBlock, self.num_layers, self.remat)
    y, _ = blocks(self.num_heads, self.dtype, name='blocks')(y, context, bias)
    y = nn.Dense(channels, dtype=self.dtype, name='proj_out')(y)
    return x + y.reshape(x.shape)


class UNet(nn.Module):
  """The noise prediction network.

  Fields with one entry for each resolution go from the finest to the coarsest, as in diffusers'
  configs. The middle equals the coarsest resolution, and always has attention.

  Attributes:
    in_channels: Z of the input.
    out_channels: Z of the output.
    block_out_channels: channels of each resolution.
    layers_per_block: residual blocks of each resolution on the way down; one more on the way up.
    down_block_attention: whether a resolution has transformers.
    transformer_layers: blocks of each transformer.
    num_heads: diffusers' attention_head_dim.
    cross_attention_dim: E.
    norm_num_groups: of the group norms.
    norm_eps: of the residual blocks and of the last norm; the transformers have their own.
    flip_sin_to_cos: of the `sinusoids` of timesteps and sizes.
    freq_shift: of the `sinusoids`, too.
    use_linear_projection: only how diffusers stores proj_in and proj_out: as a matrix, or as a 1x1
      convolution.
    addition_time_embed_dim: turns on SDXL's conditioning on size and crop.
    pooled_dim: width of SDXL's pooled condition.
    dtype: of the computation.
    remat: policy of the blocks ('none' or a key of `remat.REMAT_POLICIES`).
  """

  in_channels: int = 4
  out_channels: int = 4
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  layers_per_block: int = 2
  down_block_attention: tuple[bool, ...] = (True, True, True, False)
  transformer_layers: tuple[int, ...] = (1, 1, 1, 1)
  num_heads: tuple[int, ...] = (8, 8, 8, 8)
  cross_attention_dim: int = 768
  norm_num_groups: int = 32
  norm_eps: float = 1e-5
  flip_sin_to_cos: bool = True
  freq_shift: float = 0.0
  use_linear_projection: bool = False
  addition_time_embed_dim: int | None = None
  pooled_dim: int | None = None
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  @nn.compact
  def __call__(
    self,
    latents: Array,
    timesteps: Array,
    context: Array,
    context_mask: Array | None = None,
    added: tuple[Array, Array] | None = None,
  ) -> Array:
    """Predicts the noise (or the velocity: the network is the same).

    Args:
      latents: f32[B, h, w, in_channels], x_t.
      timesteps: i32 or f32[B].
      context: [B, M, E], the condition.
      context_mask: bool[B, M], True for valid rows; all are if it is None.
      added: SDXL's pooled condition [B, pooled_dim], and f32[B, 6] of original size, crop corner
        and target size, each (height, width).

    Returns:
      f32[B, h, w, out_channels].

    Raises:
      ValueError: fields of different lengths; latents that cannot be halved often enough; a
        condition of the wrong width; `added` missing, or passed to a network without it.
    """
    self._check(latents, context, added)
    if context_mask is not None:
      chex.assert_shape(context_mask, context.shape[:2])
      context_mask = jnp.where(context_mask, 0.0, MASKED)[:, None, None]  # [B, H, N, M]
    widths = self.block_out_channels
    time = self._time_embedding(timesteps, added)
    resnet_class = ResnetBlock if self.remat == 'none' else remat_block(ResnetBlock, self.remat)

    def resnet(x: Array, level: int, name: str) -> Array:
      block = resnet_class(
        widths[level], self.norm_num_groups, self.norm_eps, self.dtype, name=name
      )
      return block(constrain_batch(x), time)

    def transformer(x: Array, level: int, name: str) -> Array:
      block = Transformer(
        self.transformer_layers[level],
        self.num_heads[level],
        self.norm_num_groups,
        self.dtype,
        self.remat,
        name=name,
      )
      return block(x, context, context_mask)

    # Down.
    x = Conv(widths[0], (3, 3), padding=1, dtype=self.dtype, name='conv_in')(latents)
    skips = [x]
    for i in range(len(widths)):
      if i:
        x = Downsample((1, 1), self.dtype, name=f'down_{i - 1}_downsample')(x)
        skips.append(x)
      for j in range(self.layers_per_block):
        x = resnet(x, i, f'down_{i}_resnet_{j}')
        if self.down_block_attention[i]:
          x = transformer(x, i, f'down_{i}_attention_{j}')
        skips.append(x)

    # Middle.
    x = resnet(x, -1, 'mid_resnet_0')
    x = transformer(x, -1, 'mid_attention_0')
    x = resnet(x, -1, 'mid_resnet_1')

    # Up, with one block more than down: for the skip that each resolution begins with.
    for i, level in enumerate(reversed(range(len(widths)))):
      if i:
        x = Upsample(self.dtype, name=f'up_{i - 1}_upsample')(x)
      for j in range(self.layers_per_block + 1):
        x = resnet(jnp.concatenate([x, skips.pop()], axis=-1), level, f'up_{i}_resnet_{j}')
        if self.down_block_attention[level]:
          x = transformer(x, level, f'up_{i}_attention_{j}')

    x = nn.silu(GroupNorm(self.norm_num_groups, self.norm_eps, self.dtype, name='conv_norm_out')(x))
    x = Conv(self.out_channels, (3, 3), padding=1, dtype=self.dtype, name='conv_out')(x)
    return x.astype(jnp.float32)

  def _time_embedding(self, timesteps: Array, added: tuple[Array, Array] | None) -> Array:
    """The embedding [B, T] of timesteps, and of SDXL's pooled condition and sizes."""

    def waves(values: Array, width: int) -> Array:
      return sinusoids(values, width, self.flip_sin_to_cos, self.freq_shift)

    first = self.block_out_channels[0]
    embed_time = Embedding(4 * first, self.dtype, name='time_embedding')
    time = embed_time(waves(timesteps, first))
    if added is None or self.addition_time_embed_dim is None:
      return time
    pooled, time_ids = added
    sizes = waves(time_ids, self.addition_time_embed_dim).reshape(len(pooled), -1)
    embed_added = Embedding(4 * first, self.dtype, name='add_embedding')
    return time + embed_added(jnp.concatenate([pooled, sizes], axis=-1))

  def _check(self, latents: Array, context: Array, added: tuple[Array, Array] | None) -> None:
    chex.assert_rank(latents, 4)
    chex.assert_rank(context, 3)
    levels = len(self.block_out_channels)
    for name in ('down_block_attention', 'transformer_layers', 'num_heads'):
      if len(getattr(self, name)) != levels:
        raise ValueError(
          f'{name}={getattr(self, name)} must have {levels} entries, as block_out_channels has'
        )
    multiple = 2 ** (levels - 1)
    if any(side % multiple for side in latents.shape[1:3]):
      raise ValueError(f'latent sides {latents.shape[1:3]} must be multiples of {multiple}')
    if context.shape[-1] != self.cross_attention_dim:
      raise ValueError(
        f'context is {context.shape[-1]} wide, cross_attention_dim={self.cross_attention_dim}'
      )
    if (added is None) != (self.addition_time_embed_dim is None):
      raise ValueError(
        'added=(pooled, time_ids) and addition_time_embed_dim go together: one is missing'
      )
    if added is not None and added[0].shape[-1] != self.pooled_dim:
      raise ValueError(
        f'pooled condition is {added[0].shape[-1]} wide, pooled_dim={self.pooled_dim}'
      )
