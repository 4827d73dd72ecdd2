"""Rules for the config of diffusers' UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.unet import UNet
from lavit_jax.weights.torch.configs.rules import (
  AnyOf,
  Checked,
  ConfigFile,
  Followed,
  Rule,
  constant,
  harmless,
)

WIDTHS = (320, 640, 1280, 1280)
DOWN = ('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D')
# Keys with a list of one value for each level, or one number for all of them.
PER_LEVEL = ('attention_head_dim', 'transformer_layers_per_block')
# Keys with one value, or a list that repeats it.
UNIFORM = ('layers_per_block', 'only_cross_attention', 'cross_attention_dim')


def complete(config: dict[str, Any]) -> dict[str, Any]:
  """Spells each key in one way: PER_LEVEL as lists, UNIFORM as single values."""
  config = dict(config)
  levels = len(config.get('block_out_channels', WIDTHS))
  config.setdefault('attention_head_dim', 8)
  config.setdefault('transformer_layers_per_block', 1)
  for key in PER_LEVEL:
    if isinstance(config[key], int):
      config[key] = [config[key]] * levels
  for key in UNIFORM:
    value = config.get(key)
    if isinstance(value, list) and value and all(entry == value[0] for entry in value):
      config[key] = value[0]
  return config


def check(settings: Mapping[str, Any], unet: UNet) -> None:
  """Checks that the heads divide the channels of their level, and the range of `freq_shift`.

  Raises:
    ValueError: they do not.
  """
  heads = settings['num_heads']
  widths = unet.block_out_channels
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
  freq_shift = settings['freq_shift']
  if freq_shift >= widths[0] // 2:
    raise ValueError(
      f'freq_shift={freq_shift:g} must be below half of the first of '
      f'block_out_channels, {widths[0] // 2}'
    )


def _down_blocks(unet: UNet) -> list[str]:
  return [
    'CrossAttnDownBlock2D' if attention else 'DownBlock2D'
    for attention in unet.down_block_attention
  ]


def _up_blocks(unet: UNet) -> list[str]:
  return [name.replace('Down', 'Up') for name in reversed(_down_blocks(unet))]


def _rules(module: str) -> dict[str, Rule]:
  """The rules for 'unet' or 'highres_unet'."""

  def from_unet(function: Callable[[UNet], Any]) -> Callable[[LavitModules], Any]:
    return lambda model: function(getattr(model, module))

  def field(name: str) -> Callable[[LavitModules], Any]:
    return from_unet(lambda unet: getattr(unet, name))

  def embedding_type(unet: UNet) -> str | None:
    return None if unet.addition_time_embed_dim is None else 'text_time'

  def embedding_dim(unet: UNet) -> int | None:
    """Of the pooled text and six sizes, each as a time embedding."""
    if unet.addition_time_embed_dim is None:
      return None
    assert unet.pooled_dim is not None
    return unet.pooled_dim + 6 * unet.addition_time_embed_dim

  activation = "choose a checkpoint with act_fn='silu': no other is computed here"
  return {
    'attention_head_dim': Followed('num_heads', None),
    'norm_eps': Followed('norm_eps', 1e-5),
    'flip_sin_to_cos': Followed('flip_sin_to_cos', True),
    'freq_shift': Followed('freq_shift', 0),
    'in_channels': Checked(field('in_channels'), 4),
    'out_channels': Checked(field('out_channels'), 4),
    'block_out_channels': Checked(field('block_out_channels'), WIDTHS),
    'layers_per_block': Checked(field('layers_per_block'), 2),
    'down_block_types': Checked(from_unet(_down_blocks), DOWN),
    'up_block_types': Checked(
      from_unet(_up_blocks),
      [name.replace('Down', 'Up') for name in reversed(DOWN)],
    ),
    'mid_block_type': Checked(constant('UNetMidBlock2DCrossAttn'), 'UNetMidBlock2DCrossAttn'),
    'transformer_layers_per_block': Checked(field('transformer_layers'), None),
    'reverse_transformer_layers_per_block': Checked(constant(None), None),
    'cross_attention_dim': Checked(field('cross_attention_dim'), 1280),
    'norm_num_groups': Checked(field('norm_num_groups'), 32),
    'use_linear_projection': Checked(field('use_linear_projection'), False),
    'addition_embed_type': Checked(from_unet(embedding_type), None),
    'addition_time_embed_dim': Checked(field('addition_time_embed_dim'), None),
    'projection_class_embeddings_input_dim': Checked(from_unet(embedding_dim), None),
    'act_fn': Checked(constant('silu', 'swish'), 'silu', activation),
    'time_embedding_act_fn': Checked(constant(None), None, 'choose a checkpoint without it'),
    'timestep_post_act': Checked(constant(None), None, 'choose a checkpoint without it'),
    'time_embedding_type': Checked(
      constant('positional'), 'positional', 'choose a checkpoint with sinusoids of the timesteps'
    ),
    'time_embedding_dim': Checked(
      from_unet(lambda unet: AnyOf((None, 4 * unet.block_out_channels[0]))), None
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
      constant(None),
      None,
      'diffusers accepts none; give attention_head_dim, the numbers of heads',
    ),
    'resnet_time_scale_shift': Checked(
      constant('default'), 'default', 'choose a checkpoint whose time embedding is added'
    ),
    'resnet_skip_time_act': Checked(constant(False, None), False, 'choose a checkpoint with false'),
    'resnet_out_scale_factor': Checked(constant(1), 1, 'choose a checkpoint with 1'),
    'conv_in_kernel': Checked(constant(3), 3, 'choose a checkpoint with 3'),
    'conv_out_kernel': Checked(constant(3), 3, 'choose a checkpoint with 3'),
    **harmless('scores and softmax are computed in float32 always', 'upcast_attention'),
    **harmless('of other addition_embed_types, which are refused', 'addition_embed_type_num_heads'),
    **harmless("of diffusers' training: none is applied here", 'dropout'),
    **harmless('the call gives the size', 'sample_size'),
  }


def _config_file(module: str) -> ConfigFile:
  return ConfigFile(
    module,
    'config.json',
    "diffusers' UNet2DConditionModel",
    _rules(module),
    settings_group=module,
    complete=complete,
    check=lambda settings, model: check(settings, getattr(model, module)),
  )


CONFIG_FILES = (_config_file('unet'), _config_file('highres_unet'))
