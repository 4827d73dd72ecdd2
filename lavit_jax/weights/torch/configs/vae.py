"""Rules for the config of diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.vae import AutoencoderKL
from lavit_jax.weights.torch.configs.rules import (
  Checked,
  ConfigFile,
  Followed,
  Rule,
  constant,
  harmless,
)


def check(settings: Mapping[str, Any], vae: AutoencoderKL) -> None:
  """Checks that some pipeline of diffusers would apply all scalings of the latents.

  Raises:
    ValueError: none would.
  """
  mean = settings['latents_mean']
  std = settings['latents_std']
  if (mean is None) != (std is None):
    raise ValueError(
      'latents_mean and latents_std go together, and one is missing: '
      'diffusers would ignore the other; give both, or neither'
    )
  if mean is not None and settings['shift_factor']:
    raise ValueError(
      f'shift_factor={settings["shift_factor"]:g} and latents_mean={mean} are both given, '
      'which no pipeline of diffusers applies; give one of them'
    )
  channels = vae.latent_channels
  for name, values in (('latents_mean', mean), ('latents_std', std)):
    if values is not None and len(values) != channels:
      raise ValueError(f'{name}={values} must have {channels} entries, one for each latent channel')


def _rules(module: str) -> dict[str, Rule]:
  """The rules for 'vae' or 'highres_vae'."""

  def field(name: str) -> Callable[[LavitModules], Any]:
    return lambda model: getattr(getattr(model, module), name)

  def blocks(kind: str) -> Callable[[LavitModules], list[str]]:
    return lambda model: [kind] * len(getattr(model, module).block_out_channels)

  return {
    'scaling_factor': Followed('scaling_factor', 0.18215),
    'shift_factor': Followed('shift_factor', None, lambda value: 0.0 if value is None else value),
    'latents_mean': Followed('latents_mean', None),
    'latents_std': Followed('latents_std', None),
    'in_channels': Checked(constant(3), 3),
    'out_channels': Checked(constant(3), 3),
    'down_block_types': Checked(blocks('DownEncoderBlock2D'), ['DownEncoderBlock2D']),
    'up_block_types': Checked(blocks('UpDecoderBlock2D'), ['UpDecoderBlock2D']),
    'block_out_channels': Checked(field('block_out_channels'), [64]),
    'layers_per_block': Checked(field('layers_per_block'), 1),
    'latent_channels': Checked(field('latent_channels'), 4),
    'norm_num_groups': Checked(field('norm_num_groups'), 32),
    'act_fn': Checked(
      constant('silu', 'swish'),
      'silu',
      "choose a checkpoint with act_fn='silu': no other is computed here",
    ),
    'use_quant_conv': Checked(constant(True, None), True, 'choose a checkpoint with quant_conv'),
    'use_post_quant_conv': Checked(
      constant(True, None), True, 'choose a checkpoint with post_quant_conv'
    ),
    'mid_block_add_attention': Checked(
      constant(True, None), True, 'choose a checkpoint with attention in the middle'
    ),
    **harmless('the VAE computes in float32 always', 'force_upcast'),
    **harmless('the call gives the size, and the option tile the tiles of decoding', 'sample_size'),
  }


def _config_file(module: str) -> ConfigFile:
  return ConfigFile(
    module,
    'config.json',
    "diffusers' AutoencoderKL",
    _rules(module),
    settings_group=module,
    check=lambda settings, model: check(settings, getattr(model, module)),
  )


CONFIG_FILES = (_config_file('vae'), _config_file('highres_vae'))
