"""The convolutional blocks that the U-Net and the VAE share, with the numerics of diffusers.

B batch, h and w height and width, C channels; images are NHWC. Convolutions run in `dtype`, statistics in float32.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.layers import Dtype


class GroupNorm(nn.Module):
  """Normalises each of `num_groups` runs of channels over space, in float32; [B, h, w, C] -> `dtype`[B, h, w, C].

  Two passes for the variance: the one-pass E[x^2] - E[x]^2 loses what a large mean leaves of float32. Each sums over space
  before it sums over a group's channels, two to four times as fast on CPU as over both at once.
  """

  num_groups: int
  epsilon: float
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    channels, width = x.shape[-1], x.shape[-1] // self.num_groups
    if channels % self.num_groups:
      raise ValueError(f'{channels} channels do not divide into norm_num_groups={self.num_groups}')

    def mean(x: Array) -> Array:  # [B, h, w, C] -> [B, 1, 1, C]
      groups = x.mean((1, 2)).reshape(len(x), self.num_groups, width).mean(-1)
      return jnp.repeat(groups, width, axis=-1)[:, None, None]

    scale = self.param('scale', nn.initializers.ones, (channels,))
    bias = self.param('bias', nn.initializers.zeros, (channels,))
    x = x.astype(jnp.float32)
    x = x - mean(x)
    return (x * (jax.lax.rsqrt(mean(jnp.square(x)) + self.epsilon) * scale) + bias).astype(self.dtype)


class ResnetBlock(nn.Module):
  """x + conv(silu(norm(conv(silu(norm(x))) + time))) (diffusers' ResnetBlock2D); [B, h, w, C] -> [B, h, w, channels].

  `time` [B, T] is the time embedding, or None where there is none (the VAE). A 1x1 convolution carries the residual
  when the width changes.
  """

  channels: int
  num_groups: int
  epsilon: float
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, time: Array | None = None) -> Array:
    y = nn.silu(GroupNorm(self.num_groups, self.epsilon, self.dtype, name='norm1')(x))
    y = nn.Conv(self.channels, (3, 3), padding=1, dtype=self.dtype, name='conv1')(y)
    if time is not None:
      y += nn.Dense(self.channels, dtype=self.dtype, name='time_emb_proj')(nn.silu(time))[:, None, None]
    y = nn.silu(GroupNorm(self.num_groups, self.epsilon, self.dtype, name='norm2')(y))
    y = nn.Conv(self.channels, (3, 3), padding=1, dtype=self.dtype, name='conv2')(y)
    if x.shape[-1] != self.channels:
      x = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name='conv_shortcut')(x)
    return x + y


class Downsample(nn.Module):
  """Strided 3x3 convolution, [B, h, w, C] -> [B, h/2, w/2, C]; `padding` before and after each axis.

  The U-Net pads (1, 1); the VAE (0, 1), only below and to the right.
  """

  padding: tuple[int, int]
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return nn.Conv(x.shape[-1], (3, 3), strides=2, padding=(self.padding,) * 2, dtype=self.dtype, name='conv')(x)


class Upsample(nn.Module):
  """Nearest-neighbour doubling, then a 3x3 convolution; [B, h, w, C] -> [B, 2h, 2w, C]."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
    return nn.Conv(c, (3, 3), padding=1, dtype=self.dtype, name='conv')(x)
