"""Fresh parameters of a whole model: what a training starts from; shapes and counts (by `jax.eval_shape`); tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lavit_jax.models.lavit import LavitModules


def init_params(model: LavitModules, key: jax.Array, names: tuple[str, ...] | None = None) -> dict:
  """Part name -> parameters, float32, as `weights.store.folder` stores them; of all parts or of those in `names`."""
  side, patches, width = model.image_size, model.num_patches, model.vit.hidden_size
  context_dim = sum(model.decoder.context_dims)
  latent = 2 ** len(model.unet.block_out_channels)
  x, keep = jnp.zeros((1, patches, width)), jnp.ones((1, patches))
  codes = jnp.zeros((1, patches, model.tokenizer.code_dim)), keep > 0
  one = jnp.zeros((1, 1), jnp.int32)
  inputs = dict(
    vit=(jnp.zeros((1, side, side, 3)),),
    tokenizer=(x,),
    understanding=(x, keep),
    decoder=codes,
    llama=(jnp.zeros((1, 1, model.llama.hidden_size)), one, jnp.ones((1, 1, 1, 1), bool)),
    unet=(
      jnp.zeros((1, latent, latent, model.unet.in_channels)),
      jnp.zeros(1),
      jnp.zeros((1, patches, context_dim)),
    ),
    vae=(jnp.zeros((1, 2 * model.vae.factor, 2 * model.vae.factor, 3)),),
  )
  if model.highres_decoder is not None:
    inputs['highres_decoder'] = codes
  if model.highres_unet is not None:
    unet, latent = model.highres_unet, 2 ** len(model.highres_unet.block_out_channels)
    added = (
      None if unet.pooled_dim is None else (jnp.zeros((1, unet.pooled_dim)), jnp.zeros((1, 6)))
    )
    inputs['highres_unet'] = (
      jnp.zeros((1, latent, latent, unet.in_channels)),
      jnp.zeros(1),
      jnp.zeros((1, patches, unet.cross_attention_dim)),
      None,
      added,
    )
  if model.highres_vae is not None:
    inputs['highres_vae'] = (
      jnp.zeros((1, 2 * model.highres_vae.factor, 2 * model.highres_vae.factor, 3)),
    )
  if model.safety_checker is not None:
    side = model.safety_checker.image_size
    inputs['safety_checker'] = (jnp.zeros((1, side, side, 3)),)
  keys = dict(zip(inputs, jax.random.split(key, len(inputs))))
  parts = {
    name: getattr(model, name).init(keys[name], *args)['params']
    for name, args in inputs.items()
    if names is None or name in names
  }
  if names is None or 'uncond_embeddings' in names:
    parts['uncond_embeddings'] = jnp.zeros((model.uncond_rows, context_dim))
  return parts
