"""diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavit_jax.porting.configs.rules import Checked, Family, Followed, constant, harmless


def check(found: Mapping[str, Any], vae: Any) -> None:
  """Raises ValueError where the factors are not those of one of diffusers' pipelines."""
  mean, std, channels = found['latents_mean'], found['latents_std'], vae.latent_channels
  if (mean is None) != (std is None):
    raise ValueError(
      'latents_mean and latents_std go together, and one is missing: '
      'diffusers would ignore the other; give both, or neither'
    )
  if mean is not None and found['shift_factor']:
    raise ValueError(
      f'shift_factor={found["shift_factor"]:g} and latents_mean={mean} are both given, '
      'which no pipeline of diffusers applies; '
      'give one of them'
    )
  for name, values in (('latents_mean', mean), ('latents_std', std)):
    if values is not None and len(values) != channels:
      raise ValueError(f'{name}={values} must have {channels} entries, one a latent channel')


def _rules(part: str) -> dict:
  def own(name: str):
    return lambda model: getattr(getattr(model, part), name)

  def blocks(kind: str):
    return lambda model: [kind] * len(getattr(model, part).block_out_channels)

  return {
    'scaling_factor': Followed('scaling_factor', 0.18215),
    'shift_factor': Followed('shift_factor', None, lambda value: 0.0 if value is None else value),
    'latents_mean': Followed('latents_mean', None),
    'latents_std': Followed('latents_std', None),
    'in_channels': Checked(constant(3), 3),
    'out_channels': Checked(constant(3), 3),
    'down_block_types': Checked(blocks('DownEncoderBlock2D'), ['DownEncoderBlock2D']),
    'up_block_types': Checked(blocks('UpDecoderBlock2D'), ['UpDecoderBlock2D']),
    'block_out_channels': Checked(own('block_out_channels'), [64]),
    'layers_per_block': Checked(own('layers_per_block'), 1),
    'latent_channels': Checked(own('latent_channels'), 4),
    'norm_num_groups': Checked(own('norm_num_groups'), 32),
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
    **harmless(
      'the size comes with the call, and the tiles of decoding with the option tile', 'sample_size'
    ),
  }


def _family(part: str) -> Family:
  return Family(
    part,
    'config.json',
    "diffusers' AutoencoderKL",
    _rules(part),
    part,
    check=lambda found, model: check(found, getattr(model, part)),
  )


FAMILIES = (_family('vae'), _family('highres_vae'))
