"""Stage 1b: the U-Net learns to denoise latents, given the reconstructed features.

See the specification, Training. With the condition `emu`, it is given the vectors that Emu's
interface makes of the image, unprojected: those that the language model regresses at inference (Sun
et al. 2023, section 2.3).

Axes: B images, N patches, n rows of the condition, Z latent channels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models import noise_schedule
from lavit_jax.models import vae as pixels
from lavit_jax.models.decoder import null_context
from lavit_jax.models.diffusion import sample_latents
from lavit_jax.models.initialization import init_params
from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.row_random import draw_rows
from lavit_jax.models.sequence import compact
from lavit_jax.models.settings import CODES
from lavit_jax.training.config import read_options
from lavit_jax.training.stages.base import (
  BatchLayout,
  ModuleNames,
  Stage,
  Tree,
  apply_module,
  image_features,
  initialize_params,
  row_keys,
  vit_images,
)
from lavit_jax.visualization import shade_dropped_patches

MODULES = ModuleNames(
  needs=('vit', 'tokenizer', 'vae'),
  starts=('decoder',),
  takes=('decoder', 'unet', 'uncond_embeddings'),
  zeros=('uncond_embeddings',),
)
VECTOR_MODULES = ModuleNames(needs=('vit', 'interface', 'vae'), takes=('unet',))
NUM_DRAWN = 8  # images


@dataclasses.dataclass(frozen=True)
class DetokenizerOptions:
  """The section `detokenizer` of the config."""

  drop_condition: float  # share of the examples that are denoised without a condition
  guidance_scale: float  # of drawn images
  condition: str = CODES  # what the U-Net reads: settings.CONDITIONS

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> DetokenizerOptions:
    """Reads them from a config."""
    return read_options(cls, config['detokenizer'], 'detokenizer')


def module_names(options: DetokenizerOptions) -> ModuleNames:
  """The modules that the stage reads with a condition."""
  return MODULES if options.condition == CODES else VECTOR_MODULES


def build(options: DetokenizerOptions, model: LavitModules, layout: BatchLayout) -> Stage:
  """Denoising under the reconstructed features, sometimes under none (for guidance).

  Of the decoder only the context heads train (`optim.freeze`): the features stay what
  stage 1 made them. With the condition `emu` the U-Net trains alone, and none is zeros.
  """
  del layout
  by_vectors = options.condition != CODES
  scheduler = model.scheduler  # of the U-Net that the run starts from
  schedule = scheduler.schedule

  def init(key, loaded):
    if by_vectors:
      return initialize_params(init_params(model, key, ('unet',)), loaded), {}
    fresh = init_params(model, key, ('decoder', 'unet', 'uncond_embeddings'))
    uncond = fresh.pop('uncond_embeddings')
    state = dict(uncond_embeddings=loaded.get('uncond_embeddings', uncond))
    return initialize_params(fresh, loaded), state

  def condition(params, frozen, images, key):
    """Images and a key, or keys [B] -> (context [B, n, width], TokenizerOutput or None)."""
    if by_vectors:
      features = model.tower.features(frozen['vit'], images)
      return apply_module(model.interface, frozen['interface'], features).vectors, None
    x = image_features(model, frozen['vit'], images)[:, 1:]
    tokens = apply_module(model.tokenizer, frozen['tokenizer'], x, key)
    decoder = params['decoder']
    rebuilt = apply_module(model.decoder, decoder, *compact(tokens.codes, tokens.keep))
    rebuilt = jax.lax.stop_gradient(rebuilt)
    context, _ = apply_module(model.decoder, decoder, rebuilt, method='context')
    return context, tokens

  def null_condition(state, batch_size):
    """What the U-Net sees without a condition: context [B, n, width], mask bool[B, n]."""
    if by_vectors:
      shape = (batch_size, model.num_image_vectors, model.llama.hidden_size)
      return jnp.zeros(shape), jnp.ones(shape[:2], bool)
    context, mask = null_context(state['uncond_embeddings'], model.num_patches)
    contexts = jnp.broadcast_to(context, (batch_size, *context.shape))
    return contexts, jnp.broadcast_to(mask, (batch_size, model.num_patches))

  def loss(params, frozen, state, batch, key, train):
    del train
    images = batch['image']
    keys = [row_keys(purpose, batch, len(images)) for purpose in jax.random.split(key, 5)]
    latent_key, token_key, drop_key, time_key, noise_key = keys
    latents = _encode(model, frozen['vae'], images, latent_key)
    context, tokens = condition(params, frozen, vit_images(batch), token_key)
    drop = draw_rows(jax.random.uniform, drop_key, (len(images), 1)) < options.drop_condition
    null, null_mask = null_condition(state, len(images))
    context = jnp.where(drop[..., None], null, context)
    mask = jnp.where(drop, null_mask, True)
    t = draw_rows(_draw_timesteps(len(schedule.betas)), time_key, (len(images),))
    noise = draw_rows(jax.random.normal, noise_key, latents.shape)
    noisy = noise_schedule.add_noise(schedule, latents, noise, t)
    predicted = apply_module(model.unet, params['unet'], noisy, t, context, mask)
    target = noise_schedule.training_target(scheduler.prediction_type, schedule, latents, noise, t)
    value = jnp.square(predicted - target).mean()
    metrics = dict(latent_std=latents.std())
    if tokens is not None:
      metrics['keep_ratio'] = tokens.keep.mean()
      if model.tokenizer.capacities:
        metrics['tokenizer_in_bucket'] = tokens.in_bucket
    return value, (state, metrics)

  def export(params, state):
    if by_vectors:
      return dict(unet=params['unet'])
    return dict(
      unet=params['unet'], decoder=params['decoder'], uncond_embeddings=state['uncond_embeddings']
    )

  def draw(params, frozen, state, batch, key, num_steps=20):
    """Images, kept patches if there are some, and images from the condition: DDIM with guidance."""
    images = batch['image'][:NUM_DRAWN]
    token_key, noise_key = jax.random.split(key)
    context, tokens = condition(params, frozen, vit_images(batch)[:NUM_DRAWN], token_key)
    null, null_mask = null_condition(state, len(images))
    side = images.shape[1] // model.vae.factor
    shape = (len(images), side, side, model.vae.latent_channels)
    latents = sample_latents(
      functools.partial(apply_module, model.unet, params['unet']),
      jax.random.normal(noise_key, shape),
      (context, jnp.ones_like(null_mask)),
      (null, null_mask),
      steps=num_steps,
      guidance_scale=options.guidance_scale,
      scheduler=scheduler,
    )
    latents = model.vae.from_unet(latents)
    drawn = apply_module(model.vae, frozen['vae'], latents, method='decode')
    rows = [images, pixels.postprocess(drawn)]
    if tokens is not None:
      rows.insert(1, shade_dropped_patches(images, tokens.keep))
    return rows

  return Stage(module_names(options), init, loss, export, draw)


def _encode(model: LavitModules, params: Tree, images: Array, keys: Array) -> Array:
  """uint8[B, H, W, 3] and keys [B] -> latents f32[B, h, w, Z] as the U-Net takes them."""
  mean, logvar = apply_module(model.vae, params, pixels.preprocess(images), method='encode')
  return model.vae.to_unet(pixels.sample_latents(mean, logvar, keys))


def _draw_timesteps(num_train_steps: int):
  return lambda key, shape: jax.random.randint(key, shape, 0, num_train_steps)


def image_multiple(model: LavitModules) -> int:
  """The number of pixels of which an image's side must be a multiple."""
  return model.vae.factor * 2 ** (len(model.unet.block_out_channels) - 1)
