"""The convolutional blocks that the U-Net and the VAE share, with the numerics of diffusers.

Axes: B batch, h and w height and width, C channels; images are NHWC. Convolutions run in `dtype`,
statistics in float32.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.layers import Dtype


def convolve(
  x: Array, kernel: Array, strides: Sequence[int], padding: Any, **settings: Any
) -> Array:
  """`jax.lax.conv_general_dilated`, as a product where that is faster: on CPU at low resolution.

  A convolution on CPU reads its kernel again for every few pixels, so at 8 x 8 latents and 1,280
  channels it has half the speed of a product, at 4 x 4 a seventh. The product is of all
  neighborhoods [pixels, k l C], and is faster while they are no larger than the kernel.

  Args:
    x: [B, h, w, C].
    kernel: [k, l, C, C'].
    strides: vertical and horizontal.
    padding: ((top, bottom), (left, right)).
    **settings: of `jax.lax.conv_general_dilated`.

  Returns:
    [B, h', w', C'].
  """
  direct = partial(
    jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **settings
  )
  b, h, w, features = jax.eval_shape(direct, x, kernel).shape
  rows, columns = kernel.shape[:2]
  if b * h * w > features or rows * columns == 1:
    return direct(x, kernel)

  def by_product(x: Array, kernel: Array) -> Array:
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    last_row = x.shape[1] - rows
    last_column = x.shape[2] - columns
    shifted = []
    for i in range(rows):
      for j in range(columns):
        window_rows = slice(i, last_row + i + 1, strides[0])
        window_columns = slice(j, last_column + j + 1, strides[1])
        shifted.append(x[:, window_rows, window_columns])
    neighborhoods = jnp.concatenate(shifted, axis=-1).reshape(b * h * w, -1)
    return (neighborhoods @ kernel.reshape(-1, features)).reshape(b, h, w, features)

  return jax.lax.platform_dependent(x, kernel, cpu=by_product, default=direct)


Conv = partial(nn.Conv, conv_general_dilated=convolve)


class GroupNorm(nn.Module):
  """Normalizes `num_groups` runs of channels over space, in float32.

  The variance takes two passes: in float32 the one-pass E[x^2] - E[x]^2 loses precision by a large
  mean. Each pass sums over space before it sums over a group's channels, which is two to four times
  as fast on CPU as over both at once.
  """

  num_groups: int
  epsilon: float
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, h, w, C] -> dtype[B, h, w, C]."""
    channels = x.shape[-1]
    if channels % self.num_groups:
      raise ValueError(f'{channels} channels do not divide into norm_num_groups={self.num_groups}')
    width = channels // self.num_groups

    def group_mean(x: Array) -> Array:  # [B, h, w, C] -> [B, 1, 1, C]
      groups = x.mean((1, 2)).reshape(len(x), self.num_groups, width).mean(-1)
      return jnp.repeat(groups, width, axis=-1)[:, None, None]

    scale = self.param('scale', nn.initializers.ones, (channels,))
    bias = self.param('bias', nn.initializers.zeros, (channels,))
    x = x.astype(jnp.float32)
    x = x - group_mean(x)
    inverse_std = jax.lax.rsqrt(group_mean(jnp.square(x)) + self.epsilon)
    return (x * (inverse_std * scale) + bias).astype(self.dtype)


class ResnetBlock(nn.Module):
  """x + conv(silu(norm(conv(silu(norm(x))) + time))): diffusers' ResnetBlock2D.

  `time` is the time embedding, or None where there is none (the VAE). A 1x1 convolution projects
  the residual where the width changes.
  """

  channels: int
  num_groups: int
  epsilon: float
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, time: Array | None = None) -> Array:
    """Input x [B, h, w, C] and time [B, T] -> [B, h, w, channels]."""
    y = nn.silu(GroupNorm(self.num_groups, self.epsilon, self.dtype, name='norm1')(x))
    y = Conv(self.channels, (3, 3), padding=1, dtype=self.dtype, name='conv1')(y)
    if time is not None:
      project = nn.Dense(self.channels, dtype=self.dtype, name='time_emb_proj')
      y += project(nn.silu(time))[:, None, None]
    y = nn.silu(GroupNorm(self.num_groups, self.epsilon, self.dtype, name='norm2')(y))
    y = Conv(self.channels, (3, 3), padding=1, dtype=self.dtype, name='conv2')(y)
    if x.shape[-1] != self.channels:
      x = Conv(self.channels, (1, 1), dtype=self.dtype, name='conv_shortcut')(x)
    return x + y


class Downsample(nn.Module):
  """Strided 3x3 convolution.

  `padding` is before and after each axis. The U-Net pads (1, 1); the VAE (0, 1), only below and to
  the right.
  """

  padding: tuple[int, int]
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, h, w, C] -> [B, h/2, w/2, C]."""
    padding = (self.padding, self.padding)
    convolution = Conv(
      x.shape[-1], (3, 3), strides=2, padding=padding, dtype=self.dtype, name='conv'
    )
    return convolution(x)


class Upsample(nn.Module):
  """Nearest-neighbor doubling, then a 3x3 convolution."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, h, w, C] -> [B, 2h, 2w, C]."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
    return Conv(c, (3, 3), padding=1, dtype=self.dtype, name='conv')(x)
