"""The convolutional blocks that the U-Net and the VAE share, with the numerics of diffusers.

B batch, h and w height and width, C channels; images are NHWC. Convolutions run in `dtype`, statistics in float32.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.layers import Dtype


def convolve(x: Array, kernel: Array, strides: tuple[int, int], padding: Any, **settings) -> Array:
  """`jax.lax.conv_general_dilated` of x [B, h, w, C] with a kernel [k, l, C, C'], as a product where that is faster: on CPU at low resolution.

  A convolution on CPU reads its kernel again for every few pixels, so at 8 x 8 latents and 1,280 channels it does half of what a product
  does, at 4 x 4 a seventh. The product is of all neighbourhoods [pixels, k l C], and worth it while they are no larger than the kernel.
  """
  direct = partial(
    jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **settings
  )
  b, h, w, _ = jax.eval_shape(direct, x, kernel).shape
  rows, columns, channels, features = kernel.shape
  if b * h * w > features or rows * columns == 1:
    return direct(x, kernel)

  def product(x: Array, kernel: Array) -> Array:
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    (down, right), (_, height, width, _) = strides, x.shape
    shifted = [
      x[:, i : height - rows + i + 1 : down, j : width - columns + j + 1 : right]
      for i in range(rows)
      for j in range(columns)
    ]
    near = jnp.concatenate(shifted, axis=-1).reshape(b * h * w, -1)
    return (near @ kernel.reshape(-1, features)).reshape(b, h, w, features)

  return jax.lax.platform_dependent(x, kernel, cpu=product, default=direct)


Conv = partial(nn.Conv, conv_general_dilated=convolve)


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
    return (x * (jax.lax.rsqrt(mean(jnp.square(x)) + self.epsilon) * scale) + bias).astype(
      self.dtype
    )


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
    y = Conv(self.channels, (3, 3), padding=1, dtype=self.dtype, name='conv1')(y)
    if time is not None:
      y += nn.Dense(self.channels, dtype=self.dtype, name='time_emb_proj')(nn.silu(time))[
        :, None, None
      ]
    y = nn.silu(GroupNorm(self.num_groups, self.epsilon, self.dtype, name='norm2')(y))
    y = Conv(self.channels, (3, 3), padding=1, dtype=self.dtype, name='conv2')(y)
    if x.shape[-1] != self.channels:
      x = Conv(self.channels, (1, 1), dtype=self.dtype, name='conv_shortcut')(x)
    return x + y


class Downsample(nn.Module):
  """Strided 3x3 convolution, [B, h, w, C] -> [B, h/2, w/2, C]; `padding` before and after each axis.

  The U-Net pads (1, 1); the VAE (0, 1), only below and to the right.
  """

  padding: tuple[int, int]
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return Conv(
      x.shape[-1], (3, 3), strides=2, padding=(self.padding,) * 2, dtype=self.dtype, name='conv'
    )(x)


class Upsample(nn.Module):
  """Nearest-neighbour doubling, then a 3x3 convolution; [B, h, w, C] -> [B, 2h, 2w, C]."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
    return Conv(c, (3, 3), padding=1, dtype=self.dtype, name='conv')(x)
