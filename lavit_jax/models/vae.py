"""Pixels <-> latents: the autoencoder of Stable Diffusion (diffusers' AutoencoderKL), in float32.

B batch, H and W pixels, h and w latents (H/f and W/f with f = 2^(blocks-1)), Z latent channels; images are NHWC.

A U-Net sees latents of about unit variance: `to_unet` makes them of what the encoder gives, and `from_unet` turns them back.
`sample_latents` and `decode` work on the encoder's own scale.
"""

from collections.abc import Callable
from typing import NamedTuple

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
  """One head over all h*w positions, with a residual; [B, h, w, C] -> [B, h, w, C]."""

  num_groups: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    batch, h, w, channels = x.shape
    y = GroupNorm(self.num_groups, EPSILON, self.dtype, name='group_norm')(x).reshape(
      batch, h * w, channels
    )
    q, k, v = (nn.Dense(channels, dtype=self.dtype, name=f'to_{n}')(y)[:, :, None] for n in 'qkv')
    y = nn.Dense(channels, dtype=self.dtype, name='to_out')(image_attention(q, k, v)[:, :, 0])
    return x + y.reshape(x.shape)


class MidBlock(nn.Module):
  """Resnet, attention, resnet at the lowest resolution."""

  num_groups: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = ResnetBlock(x.shape[-1], self.num_groups, EPSILON, self.dtype, name='resnet_0')(x)
    x = SpatialAttention(self.num_groups, self.dtype, name='attention_0')(x)
    return ResnetBlock(x.shape[-1], self.num_groups, EPSILON, self.dtype, name='resnet_1')(x)


class VAEEncoder(nn.Module):
  """Pixels [B, H, W, 3] -> moments [B, h, w, 2Z]."""

  block_out_channels: tuple[int, ...]
  layers_per_block: int
  latent_channels: int
  num_groups: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = Conv(self.block_out_channels[0], (3, 3), padding=1, dtype=self.dtype, name='conv_in')(x)
    for i, channels in enumerate(self.block_out_channels):
      if i:
        x = Downsample((0, 1), self.dtype, name=f'down_{i - 1}_downsample')(x)
      for j in range(self.layers_per_block):
        x = ResnetBlock(
          channels, self.num_groups, EPSILON, self.dtype, name=f'down_{i}_resnet_{j}'
        )(x)
    x = MidBlock(self.num_groups, self.dtype, name='mid')(x)
    x = nn.silu(GroupNorm(self.num_groups, EPSILON, self.dtype, name='conv_norm_out')(x))
    return Conv(2 * self.latent_channels, (3, 3), padding=1, dtype=self.dtype, name='conv_out')(x)


class VAEDecoder(nn.Module):
  """Latents [B, h, w, Z] -> pixels [B, H, W, 3]."""

  block_out_channels: tuple[int, ...]
  layers_per_block: int
  num_groups: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = Conv(self.block_out_channels[-1], (3, 3), padding=1, dtype=self.dtype, name='conv_in')(x)
    x = MidBlock(self.num_groups, self.dtype, name='mid')(x)
    for i, channels in enumerate(reversed(self.block_out_channels)):
      if i:
        x = Upsample(self.dtype, name=f'up_{i - 1}_upsample')(x)
      for j in range(self.layers_per_block + 1):
        x = ResnetBlock(channels, self.num_groups, EPSILON, self.dtype, name=f'up_{i}_resnet_{j}')(
          x
        )
    x = nn.silu(GroupNorm(self.num_groups, EPSILON, self.dtype, name='conv_norm_out')(x))
    return Conv(3, (3, 3), padding=1, dtype=self.dtype, name='conv_out')(x)


class AutoencoderKL(nn.Module):
  """The variational autoencoder; `AutoencoderKL.init` takes pixels and makes both halves.

  `scaling_factor` is 0.18215 in SD 1.5 and 0.13025 in SDXL. `shift_factor` is taken off before; some VAEs have a mean and a
  deviation for each latent channel, f[Z], in place of it.
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
    sizes = dict(
      block_out_channels=self.block_out_channels,
      layers_per_block=self.layers_per_block,
      num_groups=self.norm_num_groups,
      dtype=self.dtype,
    )
    self.encoder = VAEEncoder(latent_channels=self.latent_channels, **sizes)
    self.quant_conv = Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
    self.post_quant_conv = Conv(self.latent_channels, (1, 1), dtype=self.dtype)
    self.decoder = VAEDecoder(**sizes)

  @property
  def factor(self) -> int:
    """Pixels per latent along one side."""
    return 2 ** (len(self.block_out_channels) - 1)

  def encode(self, pixels: Array) -> tuple[Array, Array]:
    """f32[B, H, W, 3] in -1..1 -> mean and log-variance f32[B, h, w, Z], unscaled.

    Raises ValueError for sides that `factor` does not divide.
    """
    if pixels.shape[1] % self.factor or pixels.shape[2] % self.factor:
      raise ValueError(f'image sides {pixels.shape[1:3]} must be multiples of {self.factor}')
    mean, logvar = jnp.split(self.quant_conv(self.encoder(pixels)).astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)

  def decode(self, latents: Array) -> Array:
    """f32[B, h, w, Z], unscaled -> pixels f32[B, H, W, 3], about -1..1."""
    return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)

  def to_unet(self, latents: Array) -> Array:
    """Latents f32[B, h, w, Z] on the encoder's scale -> on the U-Net's, as diffusers' pipelines do it."""
    mean, std = self.moments()
    return (latents - mean) * (self.scaling_factor / std)

  def from_unet(self, latents: Array) -> Array:
    """The inverse of `to_unet`: what `decode` takes."""
    mean, std = self.moments()
    return latents * (std / self.scaling_factor) + mean

  def moments(self) -> tuple[np.ndarray, np.ndarray]:
    """f32[Z] or f32[]: what is taken off, and the deviation that is left."""
    mean = self.shift_factor if self.latents_mean is None else self.latents_mean
    std = 1.0 if self.latents_std is None else self.latents_std
    return np.asarray(mean, np.float32), np.asarray(std, np.float32)

  def __call__(self, pixels: Array, key: Array | None = None) -> tuple[Array, Array, Array]:
    """The autoencoder as it trains: (reconstruction, mean, logvar), from a sampled latent when there is a key."""
    mean, logvar = self.encode(pixels)
    return self.decode(sample_latents(mean, logvar, key)), mean, logvar


def sample_latents(mean: Array, logvar: Array, key: Array | None = None) -> Array:
  """A draw from the encoder's Gaussian by a key or by keys [B], or its mean without; f32[B, h, w, Z] throughout."""
  return (
    mean
    if key is None
    else mean + jnp.exp(logvar / 2) * draw_rows(jax.random.normal, key, mean.shape)
  )


def decode_tiled(decode: Callable[[Array], Array], latents: Array, factor: int, tile: int) -> Array:
  """Latents f32[B, h, w, Z] -> pixels f32[B, H, W, 3], in overlapping tiles that fade linearly into each other, by a scan over tiles.

  Memory is that of one tile and of the picture. Geometry and blending are those of diffusers' `tiled_decode`, with one difference:
  the last tile of a row or column has the full size and ends at the border, where theirs is what remains, perhaps a sliver. So all
  tiles are one compiled shape, and the same pixels come out everywhere but in the last tile's reach.

  Args:
    decode: [B, t, t, Z] -> [B, t * factor, t * factor, 3].
    factor: pixels per latent.
    tile: side of a tile, in latents.
  """
  rows, columns = (_tiles(side, tile, factor) for side in latents.shape[1:3])
  batch, h, w, channels = latents.shape

  def add(canvas: Array, now: tuple[_Tiles, _Tiles]) -> tuple[Array, None]:
    row, column = now
    pixels = decode(
      jax.lax.dynamic_slice(
        latents, (0, row.start, column.start, 0), (batch, min(tile, h), min(tile, w), channels)
      )
    )
    # Where a row fades into the next, diffusers fades its tiles sideways twice: once in this row, and again in the next.
    weight = row.weight[:, None] * jnp.where(
      row.passing[:, None], column.weight_twice, column.weight
    )
    at = (0, row.start * factor, column.start * factor, 0)
    before = jax.lax.dynamic_slice(canvas, at, pixels.shape)
    return jax.lax.dynamic_update_slice(canvas, before + pixels * weight[..., None], at), None

  i, j = np.indices((len(rows.start), len(columns.start))).reshape(2, -1)
  tiles = _Tiles(*(x[i] for x in rows)), _Tiles(*(x[j] for x in columns))
  return jax.lax.scan(add, jnp.zeros((batch, h * factor, w * factor, 3)), tiles)[0]


class _Tiles(NamedTuple):
  """The n tiles along one side: where they begin, in latents, and of the pixels of each [n, p] how much they count."""

  start: np.ndarray  # i32[n]
  weight: np.ndarray  # f32[n, p]; over all tiles they add up to 1 at every pixel
  weight_twice: np.ndarray  # f32[n, p], the same when every fade is made twice
  passing: np.ndarray  # bool[n, p], whether the next tile has begun


def _tiles(side: int, tile: int, factor: int) -> _Tiles:
  """Covers `side` latents; a tile fades in over the overlap, and what came before it fades out."""
  start = np.array(
    [*range(0, side - tile, int(tile * (1 - TILE_OVERLAP))), max(0, side - tile)], np.int32
  )
  pixels = np.arange(side * factor)
  ramp = np.clip(
    (pixels - start[:, None] * factor) / max(1, int(tile * factor * TILE_OVERLAP)), 0, 1
  )
  ramp[0] = 1

  def weights(ramp):
    later = np.cumprod((1 - ramp)[:0:-1], 0)[::-1]  # what the tiles after each leave of it
    return (ramp * np.concatenate([later, np.ones_like(ramp[:1])])).astype(np.float32)

  passing = pixels >= np.append(start[1:], side)[:, None] * factor
  own = start[:, None] * factor + np.arange(min(tile, side) * factor)  # the pixels of each tile
  return _Tiles(
    start, *(np.take_along_axis(x, own, 1) for x in (weights(ramp), weights(ramp**2), passing))
  )


def preprocess(images: Array) -> Array:
  """uint8[B, H, W, 3] -> f32 in -1..1."""
  return images.astype(jnp.float32) / 127.5 - 1


def postprocess(pixels: Array) -> Array:
  """f32[B, H, W, 3] in -1..1 -> uint8, clipped and rounded."""
  return jnp.round(jnp.clip(pixels * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)
