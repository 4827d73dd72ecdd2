"""Noisy latents -> the noise in them, under a condition: the U-Net of Stable Diffusion 1.5 and of SDXL, by config.

The numerics are those of diffusers' UNet2DConditionModel, so that its weights can be ported.

B batch, h and w latents, Z latent channels, C channels, M condition rows, E condition width, T time embedding width,
H heads, d head width; latents are NHWC.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.layers import REMAT_POLICIES, Dtype, LayerNorm, attention, gelu, merge_heads, scan_blocks, split_batch, split_heads
from lavit_jax.models.resnet import Conv, Downsample, GroupNorm, ResnetBlock, Upsample
from lavit_jax.models.splash import picture_attention

MASKED = -10000.  # what diffusers adds to the scores of condition rows that do not count


def sinusoids(values: Array, width: int, cosines_first: bool = True, shift: float = 0.) -> Array:
  """[...] -> f32[..., width]: cosines and sines of the values times 10000^(-i / (width/2 - shift)), i = 0, ..., width/2 - 1."""
  half = width // 2
  angles = values[..., None].astype(jnp.float32) * jnp.exp(-jnp.log(10000.) * jnp.arange(half) / (half - shift))
  waves = [jnp.cos(angles), jnp.sin(angles)]
  return jnp.concatenate(waves if cosines_first else waves[::-1], axis=-1)


class Embedding(nn.Module):
  """Linear, SiLU, Linear; [B, any] -> [B, T]."""

  width: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = nn.silu(nn.Dense(self.width, dtype=self.dtype, name='linear_1')(x))
    return nn.Dense(self.width, dtype=self.dtype, name='linear_2')(x)


class Attention(nn.Module):
  """Multi-head attention from x [B, N, C] to source [B, M, any], x itself if it is None, only the output with a bias; -> [B, N, C]."""

  num_heads: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, source: Array | None = None, bias: Array | None = None) -> Array:
    seen = x if source is None else source
    q, k, v = (split_heads(nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name=name)(y), self.num_heads)
               for name, y in (('to_q', x), ('to_k', seen), ('to_v', seen)))
    heads = picture_attention(q, k, v) if source is None else attention(q, k, v, bias=bias)
    return nn.Dense(x.shape[-1], dtype=self.dtype, name='to_out')(merge_heads(heads))


class GEGLU(nn.Module):
  """Linear to 4C values and 4C gates, value * gelu(gate) with the exact GELU, Linear back to C."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    value, gate = jnp.split(nn.Dense(8 * x.shape[-1], dtype=self.dtype, name='fc1')(x), 2, axis=-1)
    return nn.Dense(x.shape[-1], dtype=self.dtype, name='fc2')(value * gelu(gate))


class TransformerBlock(nn.Module):
  """Self-attention, attention to the condition, GEGLU, each pre-norm with a residual; [B, N, C] -> ([B, N, C], None)."""

  num_heads: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, context: Array, bias: Array | None) -> tuple[Array, None]:
    norm1, norm2, norm3 = (LayerNorm(1e-5, self.dtype, name=f'norm{i}') for i in (1, 2, 3))
    y = norm1(x)
    x += Attention(self.num_heads, self.dtype, name='attn1')(y)
    x += Attention(self.num_heads, self.dtype, name='attn2')(norm2(x), context, bias)
    return x + GEGLU(self.dtype, name='ff')(norm3(x)), None


class Transformer(nn.Module):
  """Transformer blocks over all h*w positions, between two projections, with a residual; [B, h, w, C] -> same."""

  num_layers: int
  num_heads: int
  num_groups: int
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  @nn.compact
  def __call__(self, x: Array, context: Array, bias: Array | None) -> Array:
    batch, h, w, channels = x.shape
    y = GroupNorm(self.num_groups, 1e-6, self.dtype, name='norm')(x).reshape(batch, h * w, channels)
    y = nn.Dense(channels, dtype=self.dtype, name='proj_in')(y)
    blocks = scan_blocks(TransformerBlock, self.num_layers, self.remat)
    y, _ = blocks(self.num_heads, self.dtype, name='blocks')(y, context, bias)
    return x + nn.Dense(channels, dtype=self.dtype, name='proj_out')(y).reshape(x.shape)


class UNet(nn.Module):
  """The noise prediction network.

  Fields with one entry a resolution go from the finest to the coarsest, as diffusers' configs do; `num_heads` is what
  those call attention_head_dim. The middle is as the coarsest resolution, and has attention always.

  `use_linear_projection` says only how diffusers stores proj_in and proj_out: a matrix, or a 1x1 convolution.
  `addition_time_embed_dim` turns on SDXL's conditioning on size and crop; `pooled_dim` is then the width of the pooled
  condition.

  `norm_eps` is that of the residual blocks and of the last norm; the transformers have their own. `flip_sin_to_cos` and
  `freq_shift` are of the `sinusoids` of timesteps and sizes.
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
      self, latents: Array, timesteps: Array, context: Array, context_mask: Array | None = None,
      added: tuple[Array, Array] | None = None,
  ) -> Array:
    """Predicts the noise (or the velocity: the same network).

    Args:
      latents: f32[B, h, w, in_channels], x_t.
      timesteps: i32 or f32[B].
      context: [B, M, E], the condition.
      context_mask: bool[B, M], True for rows that count; all do if it is None.
      added: SDXL's pooled condition [B, pooled_dim] and f32[B, 6] original size, crop corner, target size, each
        (height, width).

    Returns:
      f32[B, h, w, out_channels].

    Raises:
      ValueError: fields of different lengths; latents that cannot be halved often enough; a condition of the wrong
        width; `added` missing, or given to a network without it.
    """
    widths = self.block_out_channels
    self._check(latents, context, added)
    if context_mask is not None:
      context_mask = jnp.where(context_mask, 0., MASKED)[:, None, None]  # [B, H, Q, M]

    def waves(values, width):
      return sinusoids(values, width, self.flip_sin_to_cos, self.freq_shift)

    # 1. time
    time = Embedding(4 * widths[0], self.dtype, name='time_embedding')(waves(timesteps, widths[0]))
    if added is not None:
      pooled, time_ids = added
      sizes = waves(time_ids, self.addition_time_embed_dim).reshape(len(pooled), -1)
      time += Embedding(4 * widths[0], self.dtype, name='add_embedding')(jnp.concatenate([pooled, sizes], axis=-1))

    resnet_cls = ResnetBlock if self.remat == 'none' else nn.remat(ResnetBlock, policy=REMAT_POLICIES[self.remat])

    def resnet(x, level, name):
      return resnet_cls(widths[level], self.norm_num_groups, self.norm_eps, self.dtype, name=name)(split_batch(x), time)

    def transformer(x, level, name):
      return Transformer(self.transformer_layers[level], self.num_heads[level], self.norm_num_groups, self.dtype,
                         self.remat, name=name)(x, context, context_mask)

    # 2. down
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

    # 3. mid
    x = resnet(x, -1, 'mid_resnet_0')
    x = transformer(x, -1, 'mid_attention_0')
    x = resnet(x, -1, 'mid_resnet_1')

    # 4. up, one resnet more than down: for the skip that each resolution begins with
    for i, level in enumerate(reversed(range(len(widths)))):
      if i:
        x = Upsample(self.dtype, name=f'up_{i - 1}_upsample')(x)
      for j in range(self.layers_per_block + 1):
        x = resnet(jnp.concatenate([x, skips.pop()], axis=-1), level, f'up_{i}_resnet_{j}')
        if self.down_block_attention[level]:
          x = transformer(x, level, f'up_{i}_attention_{j}')

    x = nn.silu(GroupNorm(self.norm_num_groups, self.norm_eps, self.dtype, name='conv_norm_out')(x))
    return Conv(self.out_channels, (3, 3), padding=1, dtype=self.dtype, name='conv_out')(x).astype(jnp.float32)

  def _check(self, latents, context, added):
    levels = len(self.block_out_channels)
    for name in ('down_block_attention', 'transformer_layers', 'num_heads'):
      if len(getattr(self, name)) != levels:
        raise ValueError(f'{name}={getattr(self, name)} must have {levels} entries, as block_out_channels has')
    if any(side % 2 ** (levels - 1) for side in latents.shape[1:3]):
      raise ValueError(f'latent sides {latents.shape[1:3]} must be multiples of {2 ** (levels - 1)}')
    if context.shape[-1] != self.cross_attention_dim:
      raise ValueError(f'context is {context.shape[-1]} wide, cross_attention_dim={self.cross_attention_dim}')
    if (added is None) != (self.addition_time_embed_dim is None):
      raise ValueError('added=(pooled, time_ids) and addition_time_embed_dim go together: one is missing')
    if added is not None and added[0].shape[-1] != self.pooled_dim:
      raise ValueError(f'pooled condition is {added[0].shape[-1]} wide, pooled_dim={self.pooled_dim}')
