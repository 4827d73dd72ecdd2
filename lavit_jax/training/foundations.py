"""The two trainings that LaVIT itself takes for granted: the image encoder (EVA-CLIP) and the autoencoder (Stable Diffusion).

The tiny variants train them here; the large ones are ported. Axes: B images, Z latent channels.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models import vae as pixels
from lavit_jax.models import vit
from lavit_jax.models.initialization import init_params
from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.llama import Llama
from lavit_jax.models.sequence import segment_mask
from lavit_jax.models.tokenizer import l2_normalize
from lavit_jax.training.stage import (
  Stage,
  Tree,
  apply_module,
  image_features,
  initialize_params,
  row_keys,
)


def encoder(config, model: LavitModules, shards: int) -> Stage:
  """Contrastive image-text training of the ViT: symmetric cross-entropy over the batch, learned temperature (CLIP).

  And a patch must tell its own pixels and its place: EVA's features come from masked image modelling and stay local, while those of the
  contrastive loss alone become the same at every patch of a picture, and then no token could say what is where.
  """
  del shards
  tower = Llama(
    vocab_size=model.vocabulary.text_size,
    dtype=model.vit.dtype,
    remat=model.vit.remat,
    **config.text_tower,
  )

  def init(key, parts):
    k1, k2, k3, k4, k5 = jax.random.split(key, 5)
    width = tower.hidden_size
    mask, positions = jnp.ones((1, 1, 1, 1), bool), jnp.zeros((1, 1), jnp.int32)
    params = dict(
      **init_params(model, k1, ('vit',)),
      text=tower.init(k2, jnp.zeros((1, 1, width)), positions, mask)['params'],
      text_proj=dict(kernel=jax.random.normal(k3, (width, model.vit.output_dim)) * width**-0.5),
      to_pixels=jax.random.normal(k4, (model.vit.hidden_size, 3 * model.vit.patch_size**2)),
      to_place=jax.random.normal(k5, (model.vit.hidden_size, 2)),
      temperature=jnp.log(1 / 0.07),
    )
    return initialize_params(params, parts), {}

  def embed(params, batch):
    x = image_features(model, params['vit'], batch['image'])
    image = apply_module(model.vit, params['vit'], x, method='pooled')
    ids, length = batch['text'], batch['text_length']
    slots = jnp.arange(ids.shape[1])
    mask = segment_mask((slots < length[:, None]).astype(jnp.int32))
    positions = jnp.broadcast_to(slots, ids.shape)
    hidden, _ = apply_module(
      tower,
      params['text'],
      apply_module(tower, params['text'], ids, method='embed'),
      positions,
      mask,
    )
    last = jnp.take_along_axis(hidden, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
    return (
      x,
      l2_normalize(image),
      l2_normalize(last.astype(jnp.float32) @ params['text_proj']['kernel']),
    )

  def pixel_error(params, x, images):
    """Mean squared error of a linear read-out of the patches' pixels. Its columns are short, so that x [B, 1 + N, D] cannot hide the
    picture in components that are too small to survive the tokenizer.
    """
    kernel = 0.5 * l2_normalize(params['to_pixels'].T).T
    said = jax.nn.standardize(x[:, 1:].astype(jnp.float32)) @ kernel
    side, patch = model.image_size // model.vit.patch_size, model.vit.patch_size
    true = vit.preprocess(images).reshape(-1, side, patch, side, patch, 3).swapaxes(2, 3)
    return jnp.square(said - true.reshape(said.shape)).mean()

  def place_error(params, x):
    """Mean squared error of a linear read-out of the patches' rows and columns, from -1 to 1."""
    said = jax.nn.standardize(x[:, 1:].astype(jnp.float32)) @ l2_normalize(params['to_place'].T).T
    side = jnp.linspace(-1, 1, model.image_size // model.vit.patch_size)
    return jnp.square(
      said - jnp.stack(jnp.meshgrid(side, side, indexing='ij'), -1).reshape(-1, 2)
    ).mean()

  def loss(params, frozen, state, batch, key, train):
    del frozen, key, train
    x, image, text = embed(params, batch)
    logits = jnp.exp(jnp.minimum(params['temperature'], jnp.log(100.0))) * image @ text.T
    same = (batch['text'][:, None] == batch['text']).all(
      -1
    )  # equal captions are no negatives of each other
    target = same / same.sum(-1, keepdims=True)

    def cross_entropy(logits):
      return -(target * jax.nn.log_softmax(logits)).sum(-1).mean()

    contrastive = (cross_entropy(logits) + cross_entropy(logits.T)) / 2
    pixel, place = pixel_error(params, x, batch['image']), place_error(params, x)
    hit = jnp.take_along_axis(same, logits.argmax(-1)[:, None], axis=-1)
    values = dict(
      contrastive=contrastive,
      pixel=pixel,
      place=place,
      accuracy=hit.mean(),
      temperature=jnp.exp(-params['temperature']),
    )
    return contrastive + config.pixel_weight * pixel + config.place_weight * place, (state, values)

  def draw(params, frozen, state, batch, key):
    del frozen, state, key
    _, image, text = embed(params, batch)
    grey = (jnp.clip(image @ text.T, 0, 1) * 255).astype(jnp.uint8).repeat(8, 0).repeat(8, 1)
    return [
      jnp.stack([grey] * 3, -1)[None]
    ]  # similarities: pictures down, captions across; the diagonal should shine

  return Stage(
    (), (), init, loss, lambda params, state: dict(vit=params['vit']), draw, takes=('vit',)
  )


class Moments(NamedTuple):
  """Moving averages over the latents of the steps so far, f32[Z] each, and their weight f32[]."""

  mean: Array
  square: Array
  weight: Array


def autoencoder(config, model: LavitModules, shards: int) -> Stage:
  """L1 on pixels and on their differences, and a little KL. The export has latents of mean 0 and deviation 1."""
  del shards

  def init(key, parts):
    zeros = jnp.zeros(model.vae.latent_channels)
    return initialize_params(init_params(model, key, ('vae',)), parts), Moments(
      zeros, zeros, jnp.zeros([])
    )

  def loss(params, frozen, state, batch, key, train):
    del frozen, train
    x = pixels.preprocess(batch['image'])
    mean, logvar = apply_module(model.vae, params['vae'], x, method='encode')
    z = pixels.sample_latents(mean, logvar, row_keys(key, batch, len(x)))
    y = apply_module(model.vae, params['vae'], z, method='decode')
    l1 = jnp.abs(y - x).mean()
    edges = sum(jnp.abs(jnp.diff(y - x, axis=axis)).mean() for axis in (1, 2))
    kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean()
    moments = Moments(z.mean((0, 1, 2)), jnp.square(z).mean((0, 1, 2)), jnp.ones([]))
    state = jax.tree.map(
      lambda old, new: 0.99 * old + 0.01 * jax.lax.stop_gradient(new), state, moments
    )
    value = l1 + config.edge_weight * edges + config.kl_weight * kl
    psnr = -10 * jnp.log10(jnp.square((jnp.clip(y, -1, 1) - x) / 2).mean())
    return value, (state, dict(l1=l1, edges=edges, kl=kl, psnr=psnr, latent_std=z.std()))

  def export(params, state):
    return dict(
      vae=standardise(params['vae'], state, model.vae.scaling_factor, *model.vae.moments())
    )

  def draw(params, frozen, state, batch, key):
    del frozen, state, key
    y, _, _ = apply_module(model.vae, params['vae'], pixels.preprocess(batch['image'][:8]))
    return [batch['image'][:8], pixels.postprocess(y)]

  return Stage((), (), init, loss, export, draw, takes=('vae',))


def standardise(
  vae: Tree,
  moments: Moments,
  scaling_factor: float,
  mean: Array | float = 0.0,
  std: Array | float = 1.0,
) -> Tree:
  """The same autoencoder, reparametrised: `AutoencoderKL.to_unet` of its latents has mean 0 and deviation 1 in each channel.

  The latents' shift and scale are folded into the 1x1 convolutions on both sides of them, so no number travels beside the weights.

  Args:
    mean, std: of `AutoencoderKL.moments`, f32[Z] or scalars.
  """
  shift = moments.mean / moments.weight
  scale = (
    scaling_factor
    / std
    * jnp.sqrt(jnp.maximum(moments.square / moments.weight - jnp.square(shift), 1e-8))
  )
  into, out = vae['quant_conv'], vae['post_quant_conv']
  gain = jnp.concatenate([1 / scale, jnp.ones_like(scale)])  # channels: means, then log-variances
  offset = jnp.concatenate([mean - shift / scale, -2 * jnp.log(scale)])
  return {
    **vae,
    'quant_conv': dict(kernel=into['kernel'] * gain, bias=into['bias'] * gain + offset),
    'post_quant_conv': dict(
      kernel=out['kernel'] * scale[:, None],
      bias=out['bias'] + (shift - mean * scale) @ out['kernel'][0, 0],
    ),
  }
