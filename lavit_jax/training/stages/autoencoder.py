"""The autoencoder of images, in the role of Stable Diffusion's.

LaVIT takes a trained autoencoder for granted. The tiny variants train theirs here; the large ones
are converted. Axes: B images, Z latent channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lavit_jax.models import vae as pixels
from lavit_jax.models.initialization import init_params
from lavit_jax.models.lavit import LavitModules
from lavit_jax.training.config import read_options
from lavit_jax.training.stages.base import (
  BatchLayout,
  ModuleNames,
  Stage,
  Tree,
  apply_module,
  initialize_params,
  row_keys,
)

MODULES = ModuleNames(takes=('vae',))
MOMENT_DECAY = 0.99
MIN_VARIANCE = 1e-8
NUM_DRAWN = 8  # images


@dataclasses.dataclass(frozen=True)
class AutoencoderOptions:
  """The options that configs of this stage have besides the common ones: weights in the loss."""

  kl_weight: float
  edge_weight: float  # of the differences between neighboring pixels

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> AutoencoderOptions:
    """Reads them from a config."""
    return read_options(cls, config)


class Moments(NamedTuple):
  """Moving averages over the latents of the steps so far, and their weight."""

  mean: Array  # f32[Z]
  square: Array  # f32[Z]
  weight: Array  # f32[]


def build(options: AutoencoderOptions, model: LavitModules, layout: BatchLayout) -> Stage:
  """L1 on pixels and on their differences, and a little KL.

  The exported autoencoder has latents of mean 0 and standard deviation 1.
  """
  del layout

  def init(key, loaded):
    params = initialize_params(init_params(model, key, ('vae',)), loaded)
    zeros = jnp.zeros(model.vae.latent_channels)
    return params, Moments(zeros, zeros, jnp.zeros([]))

  def loss(params, frozen, state, batch, key, train):
    del frozen, train
    x = pixels.preprocess(batch['image'])
    mean, logvar = apply_module(model.vae, params['vae'], x, method='encode')
    z = pixels.sample_latents(mean, logvar, row_keys(key, batch, len(x)))
    y = apply_module(model.vae, params['vae'], z, method='decode')
    l1 = jnp.abs(y - x).mean()
    edges = sum(jnp.abs(jnp.diff(y - x, axis=axis)).mean() for axis in (1, 2))
    kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean()
    value = l1 + options.edge_weight * edges + options.kl_weight * kl
    psnr = -10 * jnp.log10(jnp.square((jnp.clip(y, -1, 1) - x) / 2).mean())
    metrics = dict(l1=l1, edges=edges, kl=kl, psnr=psnr, latent_std=z.std())
    return value, (_update_moments(state, z), metrics)

  def export(params, state):
    latent_mean, latent_std = model.vae.moments()
    scaling_factor = model.vae.scaling_factor
    vae = standardize_latents(params['vae'], state, scaling_factor, latent_mean, latent_std)
    return dict(vae=vae)

  def draw(params, frozen, state, batch, key):
    """Images, and the same after encoding and decoding."""
    del frozen, state, key
    images = batch['image'][:NUM_DRAWN]
    y, _, _ = apply_module(model.vae, params['vae'], pixels.preprocess(images))
    return [images, pixels.postprocess(y)]

  return Stage(MODULES, init, loss, export, draw)


def _update_moments(moments: Moments, latents: Array) -> Moments:
  mean = latents.mean((0, 1, 2))
  square = jnp.square(latents).mean((0, 1, 2))
  new = jax.lax.stop_gradient(Moments(mean, square, jnp.ones([])))
  return jax.tree.map(lambda m, n: MOMENT_DECAY * m + (1 - MOMENT_DECAY) * n, moments, new)


def image_multiple(model: LavitModules) -> int:
  """The number of pixels of which an image's side must be a multiple."""
  return model.vae.factor


def standardize_latents(
  params: Tree,
  moments: Moments,
  scaling_factor: float,
  mean: ArrayLike = 0.0,
  std: ArrayLike = 1.0,
) -> Tree:
  """The same autoencoder with other latents, of mean 0 and standard deviation 1 in each channel.

  These are the latents as the U-Net takes them (`AutoencoderKL.to_unet`). Their shift and scale
  are folded into the 1x1 convolutions on both sides, so no number travels beside the weights.

  Args:
    params: of the autoencoder.
    moments: of its latents so far.
    scaling_factor: of the autoencoder.
    mean: of `AutoencoderKL.moments`, f32[Z] or a scalar.
    std: of `AutoencoderKL.moments`, f32[Z] or a scalar.
  """
  shift = moments.mean / moments.weight
  variance = moments.square / moments.weight - jnp.square(shift)
  scale = scaling_factor / std * jnp.sqrt(jnp.maximum(variance, MIN_VARIANCE))
  # The channels of `quant_conv` are means, then log-variances.
  gain = jnp.concatenate([1 / scale, jnp.ones_like(scale)])
  offset = jnp.concatenate([mean - shift / scale, -2 * jnp.log(scale)])
  encoder = params['quant_conv']
  decoder = params['post_quant_conv']
  decoder_bias = decoder['bias'] + (shift - mean * scale) @ decoder['kernel'][0, 0]
  return {
    **params,
    'quant_conv': dict(kernel=encoder['kernel'] * gain, bias=encoder['bias'] * gain + offset),
    'post_quant_conv': dict(kernel=decoder['kernel'] * scale[:, None], bias=decoder_bias),
  }
