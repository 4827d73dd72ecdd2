"""diffusers' UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavit_jax.models.lavit import Lavit
from lavit_jax.porting.configs.rules import AnyOf, Checked, Family, Followed, constant, harmless

WIDTHS = (320, 640, 1280, 1280)
DOWN = ('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D')
PER_LEVEL = ('attention_head_dim', 'transformer_layers_per_block')  # a number stands for all levels
UNIFORM = (
  'layers_per_block',
  'only_cross_attention',
  'cross_attention_dim',
)  # a list of one value stands for the value


def complete(config: dict) -> dict:
  """One number for all levels, and one for each, in the one spelling."""
  config = dict(config)
  levels = len(config.get('block_out_channels', WIDTHS))
  config.setdefault('attention_head_dim', 8)
  config.setdefault('transformer_layers_per_block', 1)
  for key in PER_LEVEL:
    if isinstance(config[key], int):
      config[key] = [config[key]] * levels
  for key in UNIFORM:
    value = config.get(key)
    if isinstance(value, list) and value and all(each == value[0] for each in value):
      config[key] = value[0]
  return config


def check(found: Mapping[str, Any], unet: Any) -> None:
  """Raises ValueError where the heads do not divide the channels of their level."""
  heads, widths = found['num_heads'], unet.block_out_channels
  if len(heads) != len(widths):
    raise ValueError(
      f'attention_head_dim={heads} must have {len(widths)} entries, as block_out_channels has'
    )
  for count, width in zip(heads, widths, strict=True):
    if width % count:
      raise ValueError(
        f'attention_head_dim={heads}, the numbers of heads, '
        f'must divide block_out_channels={list(widths)}'
      )
  if found['freq_shift'] >= widths[0] // 2:
    raise ValueError(
      f'freq_shift={found["freq_shift"]:g} must be below half of the first of '
      f'block_out_channels, {widths[0] // 2}'
    )


def _blocks(unet: Any, direction: str) -> list[str]:
  attention = unet.down_block_attention if direction == 'Down' else unet.down_block_attention[::-1]
  return [f'CrossAttn{direction}Block2D' if has else f'{direction}Block2D' for has in attention]


def _rules(part: str) -> dict:
  def own(name: str):
    return lambda model: getattr(getattr(model, part), name)

  def sized(model: Lavit) -> bool:
    return getattr(model, part).addition_time_embed_dim is not None

  def pooled(model: Lavit) -> int | None:
    unet = getattr(model, part)
    return unet.pooled_dim + 6 * unet.addition_time_embed_dim if sized(model) else None

  def layers(model: Lavit) -> AnyOf:
    """Of levels without attention, and of those alone, the number does not count."""
    return getattr(model, part).transformer_layers

  activation = "choose a checkpoint with act_fn='silu': no other is computed here"
  return {
    'attention_head_dim': Followed('num_heads', None),
    'norm_eps': Followed('norm_eps', 1e-5),
    'flip_sin_to_cos': Followed('flip_sin_to_cos', True),
    'freq_shift': Followed('freq_shift', 0),
    'in_channels': Checked(own('in_channels'), 4),
    'out_channels': Checked(own('out_channels'), 4),
    'block_out_channels': Checked(own('block_out_channels'), WIDTHS),
    'layers_per_block': Checked(own('layers_per_block'), 2),
    'down_block_types': Checked(lambda model: _blocks(getattr(model, part), 'Down'), DOWN),
    'up_block_types': Checked(
      lambda model: _blocks(getattr(model, part), 'Up'),
      [name.replace('Down', 'Up') for name in reversed(DOWN)],
    ),
    'mid_block_type': Checked(constant('UNetMidBlock2DCrossAttn'), 'UNetMidBlock2DCrossAttn'),
    'transformer_layers_per_block': Checked(layers, None),
    'reverse_transformer_layers_per_block': Checked(constant(None), None),
    'cross_attention_dim': Checked(own('cross_attention_dim'), 1280),
    'norm_num_groups': Checked(own('norm_num_groups'), 32),
    'use_linear_projection': Checked(own('use_linear_projection'), False),
    'addition_embed_type': Checked(lambda model: 'text_time' if sized(model) else None, None),
    'addition_time_embed_dim': Checked(own('addition_time_embed_dim'), None),
    'projection_class_embeddings_input_dim': Checked(pooled, None),
    'act_fn': Checked(constant('silu', 'swish'), 'silu', activation),
    'time_embedding_act_fn': Checked(constant(None), None, 'choose a checkpoint without it'),
    'timestep_post_act': Checked(constant(None), None, 'choose a checkpoint without it'),
    'time_embedding_type': Checked(
      constant('positional'), 'positional', 'choose a checkpoint with sinusoids of the timesteps'
    ),
    'time_embedding_dim': Checked(
      lambda model: AnyOf((None, 4 * getattr(model, part).block_out_channels[0])), None
    ),
    'time_cond_proj_dim': Checked(
      constant(None), None, 'choose a checkpoint whose guidance is not an input of the U-Net'
    ),
    'center_input_sample': Checked(constant(False, None), False, 'choose a checkpoint with false'),
    'downsample_padding': Checked(constant(1), 1, 'choose a checkpoint with 1'),
    'mid_block_scale_factor': Checked(constant(1), 1, 'choose a checkpoint with 1'),
    'only_cross_attention': Checked(
      constant(False, None), False, 'choose a checkpoint with self-attention'
    ),
    'mid_block_only_cross_attention': Checked(
      constant(None, False), None, 'choose a checkpoint with self-attention'
    ),
    'dual_cross_attention': Checked(
      constant(False, None), False, 'choose a checkpoint with one condition'
    ),
    'cross_attention_norm': Checked(constant(None), None, 'choose a checkpoint without it'),
    'attention_type': Checked(constant('default'), 'default', 'choose a checkpoint without GLIGEN'),
    'class_embed_type': Checked(constant(None), None, 'choose a checkpoint without classes'),
    'num_class_embeds': Checked(constant(None), None, 'choose a checkpoint without classes'),
    'class_embeddings_concat': Checked(
      constant(False, None), False, 'choose a checkpoint without classes'
    ),
    'encoder_hid_dim': Checked(
      constant(None), None, 'choose a checkpoint that takes the condition as it is'
    ),
    'encoder_hid_dim_type': Checked(
      constant(None), None, 'choose a checkpoint that takes the condition as it is'
    ),
    'num_attention_heads': Checked(
      constant(None), None, 'diffusers takes none; say the numbers of heads as attention_head_dim'
    ),
    'resnet_time_scale_shift': Checked(
      constant('default'), 'default', 'choose a checkpoint whose time is added'
    ),
    'resnet_skip_time_act': Checked(constant(False, None), False, 'choose a checkpoint with false'),
    'resnet_out_scale_factor': Checked(constant(1), 1, 'choose a checkpoint with 1'),
    'conv_in_kernel': Checked(constant(3), 3, 'choose a checkpoint with 3'),
    'conv_out_kernel': Checked(constant(3), 3, 'choose a checkpoint with 3'),
    **harmless('scores and softmax are computed in float32 always', 'upcast_attention'),
    **harmless("of other addition_embed_types, which are refused", 'addition_embed_type_num_heads'),
    **harmless("of diffusers' training: none is applied here", 'dropout'),
    **harmless('the size comes with the call', 'sample_size'),
  }


def _family(part: str) -> Family:
  return Family(
    part,
    'config.json',
    "diffusers' UNet2DConditionModel",
    _rules(part),
    part,
    complete,
    lambda found, model: check(found, getattr(model, part)),
  )


FAMILIES = (_family('unet'), _family('highres_unet'))
