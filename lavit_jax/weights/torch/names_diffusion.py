"""diffusers' names for the parameters of the U-Net and the VAE.

Our names follow diffusers' closely enough for one list of substitutions; the rows come from the parameter tree that a
config makes, so every size of both is covered.
"""

import functools
import re

import jax
import jax.numpy as jnp
from flax import traverse_util

from lavit_jax.models.unet import UNet
from lavit_jax.models.vae import AutoencoderKL
from lavit_jax.weights.torch.mapping import NameRule

NAMES = (
  (r'\b(down|up)_(\d+)_', r'\1_blocks/\2/'),
  (r'\bmid[_/]', 'mid_block/'),
  (r'\b(resnet|attention)_(\d+)', r'\1s/\2'),
  (r'\b(down|up)sample/', r'\1samplers/0/'),
  (r'\bblocks/', 'transformer_blocks/{i}/'),
  (r'\bff/fc1', 'ff/net/0/proj'),
  (r'\bff/fc2', 'ff/net/2'),
  (r'\bto_out', 'to_out/0'),
  (r'(kernel|scale)$', 'weight'),
)
# What diffusers called the VAE's attention before it shared the U-Net's: the names in older files of SD 1.5.
OLD_ATTENTION = (('to_q', 'query'), ('to_k', 'key'), ('to_v', 'value'), ('to_out/0', 'proj_attn'))


@functools.cache
def unet_shapes(module: UNet) -> dict:
  """The parameter tree of a U-Net as `jax.eval_shape`'s structs."""
  side, added = 2 ** (len(module.block_out_channels) - 1), None
  if module.addition_time_embed_dim is not None:
    added = jnp.zeros((1, module.pooled_dim)), jnp.zeros((1, 6))
  latents, context = (
    jnp.zeros((1, side, side, module.in_channels)),
    jnp.zeros((1, 1, module.cross_attention_dim)),
  )
  return jax.eval_shape(
    module.init, jax.random.key(0), latents, jnp.zeros(1), context, None, added
  )['params']


@functools.cache
def vae_shapes(module: AutoencoderKL) -> dict:
  """The parameter tree of a VAE as `jax.eval_shape`'s structs."""
  return jax.eval_shape(
    module.init, jax.random.key(0), jnp.zeros((1, module.factor, module.factor, 3))
  )['params']


def unet_rules(module: UNet) -> list[NameRule]:
  """diffusers' UNet2DConditionModel of this config."""
  return _rows(
    unet_shapes(module), NAMES, () if module.use_linear_projection else ('proj_in', 'proj_out')
  )


def vae_rules(module: AutoencoderKL, old_attention: bool = False) -> list[NameRule]:
  """diffusers' AutoencoderKL of this config; `old_attention` for files written before diffusers 0.12."""
  return _rows(vae_shapes(module), NAMES + OLD_ATTENTION * old_attention, ())


def _rows(shapes: dict, names: tuple, convolved: tuple[str, ...]) -> list[NameRule]:
  """One row a leaf; the layers in `convolved` are Dense here and 1x1 convolutions in diffusers."""
  rows = []
  for path, leaf in traverse_util.flatten_dict(shapes).items():
    leaf_name = torch_name = '/'.join(path)
    for pattern, replacement in names:
      torch_name = re.sub(pattern, replacement, torch_name)
    if path[-1] != 'kernel':
      transform = 'copy'
    elif leaf.ndim == 4:
      transform = 'conv'
    else:
      transform = 'conv1x1_to_linear' if path[-2] in convolved else 'linear'
    rows.append(NameRule(torch_name.replace('/', '.'), leaf_name, transform))
  return rows
