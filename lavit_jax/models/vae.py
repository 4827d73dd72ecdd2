"""Pixels <-> latents: the autoencoder of Stable Diffusion (diffusers' AutoencoderKL), in float32.

A U-Net sees latents of about unit variance: `to_unet` scales what the encoder computes, and
`from_unet` is its inverse. `sample_latents` and `decode` use the encoder's own scale.

Axes: B batch, H and W pixels, h and w latents (H/f and W/f with f = 2^(blocks-1)), Z latent
channels; images are NHWC.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.models.attention_kernels import image_attention
from lavit_jax.models.layers import Dtype
from lavit_jax.models.resnet import Conv, Downsample, GroupNorm, ResnetBlock, Upsample
from lavit_jax.models.row_random import draw_rows

EPSILON = 1e-6
SD_SCALING_FACTOR = 0.18215  # of Stable Diffusion 1.5
SDXL_SCALING_FACTOR = 0.13025
TILE_OVERLAP = 0.25  # share of a tile that the next one covers again, as in diffusers


class SpatialAttention(nn.Module):
  """Attention of one head over all positions, with a residual."""

  num_groups: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, h, w, C] -> [B, h, w, C]."""
    batch, h, w, channels = x.shape

    def linear(name: str) -> nn.Dense:
      return nn.Dense(channels, dtype=self.dtype, name=name)

    y = GroupNorm(self.num_groups, EPSILON, self.dtype, name='group_norm')(x)
    y = y.reshape(batch, h * w, channels)
    q, k, v = (linear(name)(y)[:, :, None] for name in ('to_q', 'to_k', 'to_v'))
    y = linear('to_out')(image_attention(q, k, v)[:, :, 0])
    return x + y.reshape(x.shape)


class MidBlock(nn.Module):
  """Resnet, attention, resnet at the lowest resolution."""

  num_groups: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, h, w, C] -> [B, h, w, C]."""
    x = ResnetBlock(x.shape[-1], self.num_groups, EPSILON, self.dtype, name='resnet_0')(x)
    x = SpatialAttention(self.num_groups, self.dtype, name='attention_0')(x)
    return ResnetBlock(x.shape[-1], self.num_groups, EPSILON, self.dtype, name='resnet_1')(x)


class VAEEncoder(nn.Module):
  """Pixels -> moments of the latents."""

  block_out_channels: tuple[int, ...]
  layers_per_block: int
  latent_channels: int
  num_groups: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Pixels [B, H, W, 3] -> moments [B, h, w, 2Z]."""
    x = Conv(self.block_out_channels[0], (3, 3), padding=1, dtype=self.dtype, name='conv_in')(x)
    for i, channels in enumerate(self.block_out_channels):
      if i:
        x = Downsample((0, 1), self.dtype, name=f'down_{i - 1}_downsample')(x)
      for j in range(self.layers_per_block):
        name = f'down_{i}_resnet_{j}'
        x = ResnetBlock(channels, self.num_groups, EPSILON, self.dtype, name=name)(x)
    x = MidBlock(self.num_groups, self.dtype, name='mid')(x)
    x = nn.silu(GroupNorm(self.num_groups, EPSILON, self.dtype, name='conv_norm_out')(x))
    return Conv(2 * self.latent_channels, (3, 3), padding=1, dtype=self.dtype, name='conv_out')(x)


class VAEDecoder(nn.Module):
  """Latents -> pixels."""

  block_out_channels: tuple[int, ...]
  layers_per_block: int
  num_groups: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Latents [B, h, w, Z] -> pixels [B, H, W, 3]."""
    x = Conv(self.block_out_channels[-1], (3, 3), padding=1, dtype=self.dtype, name='conv_in')(x)
    x = MidBlock(self.num_groups, self.dtype, name='mid')(x)
    for i, channels in enumerate(reversed(self.block_out_channels)):
      if i:
        x = Upsample(self.dtype, name=f'up_{i - 1}_upsample')(x)
      for j in range(self.layers_per_block + 1):
        name = f'up_{i}_resnet_{j}'
        x = ResnetBlock(channels, self.num_groups, EPSILON, self.dtype, name=name)(x)
    x = nn.silu(GroupNorm(self.num_groups, EPSILON, self.dtype, name='conv_norm_out')(x))
    return Conv(3, (3, 3), padding=1, dtype=self.dtype, name='conv_out')(x)


class AutoencoderKL(nn.Module):
  """The variational autoencoder; `AutoencoderKL.init` takes pixels and makes both halves.

  Attributes:
    block_out_channels: channels of each resolution, from the finest.
    layers_per_block: residual blocks of each resolution of the encoder; the decoder has one more.
    latent_channels: Z.
    norm_num_groups: of the group norms.
    scaling_factor: factor of the U-Net's latents.
    shift_factor: subtracted before that.
    latents_mean: a shift for each latent channel, in place of `shift_factor`.
    latents_std: a deviation for each latent channel, by which the latents are divided.
    dtype: of the computation.
  """

  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  latent_channels: int = 4
  norm_num_groups: int = 32
  scaling_factor: float = SD_SCALING_FACTOR
  shift_factor: float = 0.0
  latents_mean: tuple[float, ...] | None = None
  latents_std: tuple[float, ...] | None = None
  dtype: Dtype = jnp.float32

  def setup(self):
    """Makes the parameters and submodules."""
    self.encoder = VAEEncoder(
      block_out_channels=self.block_out_channels,
      layers_per_block=self.layers_per_block,
      latent_channels=self.latent_channels,
      num_groups=self.norm_num_groups,
      dtype=self.dtype,
    )
    self.quant_conv = Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
    self.post_quant_conv = Conv(self.latent_channels, (1, 1), dtype=self.dtype)
    self.decoder = VAEDecoder(
      block_out_channels=self.block_out_channels,
      layers_per_block=self.layers_per_block,
      num_groups=self.norm_num_groups,
      dtype=self.dtype,
    )

  @property
  def factor(self) -> int:
    """Pixels per latent along one side."""
    return 2 ** (len(self.block_out_channels) - 1)

  def encode(self, pixels: Array) -> tuple[Array, Array]:
    """The moments of the latents, on the encoder's scale.

    Args:
      pixels: f32[B, H, W, 3] in -1..1.

    Returns:
      Mean and log-variance, f32[B, h, w, Z] each.

    Raises:
      ValueError: `factor` does not divide H and W.
    """
    chex.assert_shape(pixels, (None, None, None, 3))
    if pixels.shape[1] % self.factor or pixels.shape[2] % self.factor:
      raise ValueError(f'image sides {pixels.shape[1:3]} must be multiples of {self.factor}')
    moments = self.quant_conv(self.encoder(pixels)).astype(jnp.float32)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)

  def decode(self, latents: Array) -> Array:
    """Latents f32[B, h, w, Z], on the encoder's scale -> pixels f32[B, H, W, 3], about -1..1."""
    chex.assert_shape(latents, (None, None, None, self.latent_channels))
    return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)

  def to_unet(self, latents: Array) -> Array:
    """Latents f32[B, h, w, Z] from the encoder's scale to the U-Net's, as in diffusers."""
    mean, std = self.moments()
    return (latents - mean) * (self.scaling_factor / std)

  def from_unet(self, latents: Array) -> Array:
    """The inverse of `to_unet`, for `decode`."""
    mean, std = self.moments()
    return latents * (std / self.scaling_factor) + mean

  def moments(self) -> tuple[np.ndarray, np.ndarray]:
    """The shift and the deviation that `to_unet` removes, f32[Z] or f32[]."""
    mean = self.shift_factor if self.latents_mean is None else self.latents_mean
    std = 1.0 if self.latents_std is None else self.latents_std
    return np.asarray(mean, np.float32), np.asarray(std, np.float32)

  def __call__(self, pixels: Array, key: Array | None = None) -> tuple[Array, Array, Array]:
    """The autoencoder in training.

    Args:
      pixels: f32[B, H, W, 3] in -1..1.
      key: samples the latents; their mean without one.

    Returns:
      The reconstruction f32[B, H, W, 3], and mean and log-variance f32[B, h, w, Z].
    """
    mean, logvar = self.encode(pixels)
    return self.decode(sample_latents(mean, logvar, key)), mean, logvar


def sample_latents(mean: Array, logvar: Array, key: Array | None = None) -> Array:
  """Samples the encoder's Gaussian.

  Args:
    mean: f32[B, h, w, Z].
    logvar: f32[B, h, w, Z].
    key: one key, or keys [B], one for each image; None returns the mean.

  Returns:
    f32[B, h, w, Z].
  """
  chex.assert_equal_shape([mean, logvar])
  if key is None:
    return mean
  return mean + jnp.exp(logvar / 2) * draw_rows(jax.random.normal, key, mean.shape)


# --- Decoding in tiles ---------------------------------------------------------------------------


def decode_tiled(decode: Callable[[Array], Array], latents: Array, factor: int, tile: int) -> Array:
  """Decodes overlapping tiles, which fade linearly into each other, by a scan over tiles.

  Memory is that of one tile and of the image. Geometry and blending are those of diffusers'
  `tiled_decode`, with one difference: the last tile of a row or column has the full size and ends
  at the border, while that of diffusers is the remainder, perhaps a sliver. So all tiles have one
  compiled shape, and the pixels are the same everywhere but in the reach of the last tile.

  Args:
    decode: [B, t, t, Z] -> [B, t * factor, t * factor, 3].
    latents: f32[B, h, w, Z].
    factor: pixels per latent.
    tile: side of a tile, in latents.

  Returns:
    Pixels f32[B, H, W, 3].
  """
  chex.assert_rank(latents, 4)
  batch, h, w, channels = latents.shape
  rows = _tile_side(h, tile, factor)
  columns = _tile_side(w, tile, factor)
  tile_shape = (batch, min(tile, h), min(tile, w), channels)

  def add_tile(canvas: Array, current: tuple[_Tiles, _Tiles]) -> tuple[Array, None]:
    row, column = current
    start = (0, row.start, column.start, 0)
    pixels = decode(jax.lax.dynamic_slice(latents, start, tile_shape))
    # Where a row of tiles fades into the next, diffusers applies the sideways fade twice: in this
    # row, and again in the next.
    sideways = jnp.where(row.passing[:, None], column.weight_twice, column.weight)
    weight = row.weight[:, None] * sideways
    pixel_start = (0, row.start * factor, column.start * factor, 0)
    before = jax.lax.dynamic_slice(canvas, pixel_start, pixels.shape)
    canvas = jax.lax.dynamic_update_slice(canvas, before + pixels * weight[..., None], pixel_start)
    return canvas, None

  i, j = np.indices((len(rows.start), len(columns.start))).reshape(2, -1)
  row_of_tile = _Tiles(*(x[i] for x in rows))
  column_of_tile = _Tiles(*(x[j] for x in columns))
  canvas = jnp.zeros((batch, h * factor, w * factor, 3))
  canvas, _ = jax.lax.scan(add_tile, canvas, (row_of_tile, column_of_tile))
  return canvas


class _Tiles(NamedTuple):
  """The n tiles along one side, of p pixels each.

  Attributes:
    start: i32[n], in latents.
    weight: f32[n, p]; over all tiles, the weights of a pixel add up to 1.
    weight_twice: f32[n, p]; the weight with every fade applied twice.
    passing: bool[n, p]; whether the next tile has begun.
  """

  start: np.ndarray
  weight: np.ndarray
  weight_twice: np.ndarray
  passing: np.ndarray


def _tile_side(side: int, tile: int, factor: int) -> _Tiles:
  """Covers `side` latents; a tile fades in over the overlap, and the one before it fades out."""
  last_start = max(0, side - tile)
  starts = [*range(0, side - tile, int(tile * (1 - TILE_OVERLAP))), last_start]
  start = np.array(starts, np.int32)
  first_pixel = start[:, None] * factor
  pixels = np.arange(side * factor)
  overlap = max(1, int(tile * factor * TILE_OVERLAP))
  ramp = np.clip((pixels - first_pixel) / overlap, 0, 1)
  ramp[0] = 1
  passing = pixels >= np.append(start[1:], side)[:, None] * factor
  own_pixels = first_pixel + np.arange(min(tile, side) * factor)

  def of_own_pixels(x: np.ndarray) -> np.ndarray:
    return np.take_along_axis(x, own_pixels, axis=1)

  return _Tiles(
    start=start,
    weight=of_own_pixels(_fade_weights(ramp)),
    weight_twice=of_own_pixels(_fade_weights(ramp**2)),
    passing=of_own_pixels(passing),
  )


def _fade_weights(ramp: np.ndarray) -> np.ndarray:
  """Weights f32[n, P] of tiles that fade in by ramp [n, P], each over those before it."""
  left_by_later = np.cumprod((1 - ramp)[:0:-1], 0)[::-1]
  left = np.concatenate([left_by_later, np.ones_like(ramp[:1])])
  return (ramp * left).astype(np.float32)


# --- Pixels --------------------------------------------------------------------------------------


def preprocess(images: Array) -> Array:
  """uint8[B, H, W, 3] -> f32 in -1..1."""
  return images.astype(jnp.float32) / 127.5 - 1


def postprocess(pixels: Array) -> Array:
  """f32[B, H, W, 3] in -1..1 -> uint8, clipped and rounded."""
  return jnp.round(jnp.clip(pixels * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)
