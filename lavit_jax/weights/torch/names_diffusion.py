"""Name rules of the U-Net and the VAE, which follow diffusers' names.

Our names are close enough to diffusers' for one list of substitutions; the rules come from the
parameter tree of a config, so every size of both is covered.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from lavit_jax.models.unet import UNet
from lavit_jax.models.vae import AutoencoderKL
from lavit_jax.weights.torch.name_rules import NameRule, leaves_by_path

SUBSTITUTIONS = (  # (pattern in the path of a leaf, replacement), applied in this order
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
# In files of SD 1.5 that diffusers wrote before 0.12 the VAE's attention has names of its own.
OLD_ATTENTION = (('to_q', 'query'), ('to_k', 'key'), ('to_v', 'value'), ('to_out/0', 'proj_attn'))


@functools.cache
def unet_shapes(unet: UNet) -> dict[str, Any]:
  """The parameter tree of a U-Net as `jax.ShapeDtypeStruct`s."""
  side = 2 ** (len(unet.block_out_channels) - 1)  # the smallest input
  latents = jnp.zeros((1, side, side, unet.in_channels))
  context = jnp.zeros((1, 1, unet.cross_attention_dim))
  added = None
  if unet.addition_time_embed_dim is not None:
    added = (jnp.zeros((1, unet.pooled_dim)), jnp.zeros((1, 6)))
  timesteps = jnp.zeros(1)
  variables = jax.eval_shape(unet.init, jax.random.key(0), latents, timesteps, context, None, added)
  return variables['params']


@functools.cache
def vae_shapes(vae: AutoencoderKL) -> dict[str, Any]:
  """The parameter tree of a VAE as `jax.ShapeDtypeStruct`s."""
  images = jnp.zeros((1, vae.factor, vae.factor, 3))  # the smallest input
  return jax.eval_shape(vae.init, jax.random.key(0), images)['params']


def unet_rules(unet: UNet) -> list[NameRule]:
  """The UNet2DConditionModel of diffusers with this config."""
  convolutions = () if unet.use_linear_projection else ('proj_in', 'proj_out')
  shapes = unet_shapes(unet)  # pyright: ignore[reportArgumentType]  # modules are hashable
  return _rules(shapes, SUBSTITUTIONS, convolutions)


def vae_rules(vae: AutoencoderKL, old_attention: bool = False) -> list[NameRule]:
  """The AutoencoderKL of diffusers with this config.

  Args:
    vae: the module.
    old_attention: the names of files that diffusers wrote before 0.12.
  """
  substitutions = SUBSTITUTIONS
  if old_attention:
    substitutions += OLD_ATTENTION
  shapes = vae_shapes(vae)  # pyright: ignore[reportArgumentType]  # modules are hashable
  return _rules(shapes, substitutions, ())


def _rules(
  shapes: dict[str, Any],
  substitutions: Iterable[tuple[str, str]],
  convolutions: Collection[str],
) -> list[NameRule]:
  """One rule for each leaf.

  Args:
    shapes: the parameter tree.
    substitutions: of our names by diffusers'.
    convolutions: Dense layers that are 1x1 convolutions in diffusers.
  """
  rules = []
  for path, leaf in leaves_by_path(shapes).items():
    torch_name = path
    for pattern, replacement in substitutions:
      torch_name = re.sub(pattern, replacement, torch_name)
    *_, layer, parameter = path.split('/')
    if parameter != 'kernel':
      transform = 'copy'
    elif leaf.ndim == 4:
      transform = 'conv'
    elif layer in convolutions:
      transform = 'conv1x1_to_linear'
    else:
      transform = 'linear'
    rules.append(NameRule(torch_name.replace('/', '.'), path, transform))
  return rules
