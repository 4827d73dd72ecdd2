"""Fresh parameters of a whole model: for training from scratch, and for shapes and counts."""

from __future__ import annotations

from collections.abc import Collection

import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.decoder import FeatureDecoder
from lavit_jax.models.interfaces.base import Context
from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.unet import UNet
from lavit_jax.models.vae import AutoencoderKL

UNCOND_EMBEDDINGS = 'uncond_embeddings'


def init_params(
  model: LavitModules, key: Array, names: Collection[str] | None = None
) -> dict[str, dict | Array]:
  """Initializes the parameters of a model.

  `jax.eval_shape` of it gives shapes without memory.

  Args:
    model: its modules.
    key: one key.
    names: of the modules to initialize; None for all of them.

  Returns:
    {module name: parameters}, float32, as `weights.store.folder` stores them.
  """
  inputs = _example_inputs(model)
  keys = dict(zip(inputs, jax.random.split(key, len(inputs)), strict=True))
  params = {}
  for name, arguments in inputs.items():
    if names is None or name in names:
      params[name] = getattr(model, name).init(keys[name], *arguments)['params']
  if names is None or UNCOND_EMBEDDINGS in names:
    context_dim = sum(model.decoder.context_dims)
    params[UNCOND_EMBEDDINGS] = jnp.zeros((model.uncond_rows, context_dim))
  return params


def _example_inputs(model: LavitModules) -> dict[str, tuple]:
  """Arguments of each module's call, as small as it takes them; their order fixes the keys."""
  features = jnp.zeros((1, model.num_patches, model.vit.hidden_size))
  keep = jnp.ones((1, model.num_patches))
  position = jnp.zeros((1, 1), jnp.int32)
  mask = jnp.ones((1, 1, 1, 1), bool)
  inputs: dict[str, tuple] = dict(
    vit=(_images(model.image_size),),
    tokenizer=(features,),
    understanding=(features, keep),
    decoder=_decoder_inputs(model.decoder),
    llama=(jnp.zeros((1, 1, model.llama.hidden_size)), position, mask),
    unet=_unet_inputs(model.unet, model.num_patches),
    vae=_vae_inputs(model.vae),
  )
  if model.highres_decoder is not None:
    inputs['highres_decoder'] = _decoder_inputs(model.highres_decoder)
  if model.highres_unet is not None:
    inputs['highres_unet'] = _unet_inputs(model.highres_unet, model.num_patches)
  if model.highres_vae is not None:
    inputs['highres_vae'] = _vae_inputs(model.highres_vae)
  if model.safety_checker is not None:
    inputs['safety_checker'] = (_images(model.safety_checker.image_size),)
  if model.interface is not None:
    inputs['interface'] = (
      jnp.zeros((1, model.tower.num_features, model.vit.hidden_size)),
      Context(instruction=jnp.zeros((1, 1), jnp.int32)),
    )
  return inputs


def _images(side: int) -> Array:
  return jnp.zeros((1, side, side, 3))


def _decoder_inputs(decoder: FeatureDecoder) -> tuple[Array, Array]:
  codes = jnp.zeros((1, decoder.num_patches, decoder.code_dim))
  mask = jnp.ones((1, decoder.num_patches), bool)
  return codes, mask


def _unet_inputs(unet: UNet, context_rows: int) -> tuple:
  side = 2 ** len(unet.block_out_channels)
  latents = jnp.zeros((1, side, side, unet.in_channels))
  context = jnp.zeros((1, context_rows, unet.cross_attention_dim))
  if unet.pooled_dim is None:
    return latents, jnp.zeros(1), context
  added = (jnp.zeros((1, unet.pooled_dim)), jnp.zeros((1, 6)))
  return latents, jnp.zeros(1), context, None, added


def _vae_inputs(vae: AutoencoderKL) -> tuple[Array]:
  return (_images(2 * vae.factor),)
