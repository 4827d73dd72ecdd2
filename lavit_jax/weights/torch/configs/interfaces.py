"""Rules for the `config.json` of LLaVA, BLIP-2 and CLIP: of transformers, and LLaVA's own.

Sizes are read off the weights (interface_sizes.py). What is computed otherwise here is an error.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from lavit_jax.models.lavit import LavitModules
from lavit_jax.weights.torch.configs import llama, rules
from lavit_jax.weights.torch.configs.rules import Checked, ConfigFile, Rule, constant

Config = dict[str, Any]
OTHER_KEYS = 'the weights determine the sizes, and other keys belong to training or generation'


def _section(*path: str) -> Callable[[Config], Config]:
  """Takes an object within a config, {} if it is not there."""

  def take(config: Config) -> Config:
    for key in path:
      config = config.get(key) or {}
    return dict(config)

  return take


def _file(
  library: str, checks: Mapping[str, Rule], complete: Callable[[Config], Config] = dict
) -> ConfigFile:
  return ConfigFile(
    'interface', 'config.json', library, checks, complete=complete, other_keys=OTHER_KEYS
  )


def _llama_of_llava(config: Config) -> Config:
  """LLaVA's own config is that of its LLaMA, with keys of its own."""
  return llama.complete({**config, 'model_type': 'llama'})


def _llama_of_transformers(config: Config) -> Config:
  return llama.complete(_section('text_config')(config))


def _llama(library: str, complete: Callable[[Config], Config]) -> ConfigFile:
  return ConfigFile(
    'llama', 'config.json', library, llama.RULES, 'llama', complete, other_keys=OTHER_KEYS
  )


def _activation(*names: str) -> Checked:
  remedy = f'choose a checkpoint with {" or ".join(names)}: only that is computed here'
  return Checked(constant(*names), names[0], remedy)


CLIP = dict(
  hidden_act=_activation('quick_gelu'),
  layer_norm_eps=Checked(constant(1e-5), 1e-5),
)
EVA = dict(
  hidden_act=_activation('gelu'),
  layer_norm_eps=Checked(constant(1e-6), 1e-6),
  qkv_bias=Checked(constant(True), True),
)
QFORMER = dict(
  hidden_act=_activation('gelu'),
  layer_norm_eps=Checked(constant(1e-12), 1e-12),
  cross_attention_frequency=Checked(constant(2), 2),
  position_embedding_type=Checked(constant('absolute'), 'absolute'),
)
LLAVA = dict(
  vision_feature_layer=Checked(constant(-2), -2),
  vision_feature_select_strategy=Checked(constant('default'), 'default'),
  projector_hidden_act=_activation('gelu'),
  multimodal_projector_bias=Checked(constant(True), True),
)
OWN_LLAVA = dict(
  mm_vision_select_layer=Checked(constant(-2), -2),
  mm_vision_select_feature=Checked(constant('patch'), 'patch'),
)
CLIP_VISION = _file("transformers' CLIPVisionConfig", CLIP, _section('vision_config'))
BLIP = (
  _file("transformers' Blip2VisionConfig", EVA, _section('vision_config')),
  _file("transformers' Blip2QFormerConfig", QFORMER, _section('qformer_config')),
  _llama("text_config, transformers' LlamaConfig", _llama_of_transformers),
)
OWN = (_file("LLaVA's own config", OWN_LLAVA), _llama("LLaVA's own config", _llama_of_llava))
BY_FORM: dict[str, tuple[ConfigFile, ...]] = {
  'clip': (
    _file(
      "transformers' CLIPVisionConfig", CLIP, lambda config: config.get('vision_config', config)
    ),
  ),
  'llava_v1': OWN,
  'llava_v1.5': OWN,
  'llava_transformers': (
    _file("transformers' LlavaConfig", LLAVA),
    CLIP_VISION,
    _llama("text_config, transformers' LlamaConfig", _llama_of_transformers),
  ),
  'blip2_transformers': BLIP,
  'instructblip_transformers': BLIP,
}


def read_settings(
  form: str, config: Mapping[str, Any], model: LavitModules, modules: set[str], file: pathlib.Path
) -> dict[str, dict[str, Any]]:
  """Checks a `config.json`; the settings of its language model.

  Args:
    form: of the folder (interface_files.py).
    config: its content.
    model: with the sizes of the weights.
    modules: that the folder has.
    file: for messages.

  Returns:
    {'llama': {field: value}}; {} without one.

  Raises:
    UserError: it asks for what is not computed here.
  """
  settings = {}
  for config_file in BY_FORM.get(form, ()):
    if config_file.module not in ('interface', *modules):
      continue
    followed = rules.apply_rules(config_file, config, model, file)
    if config_file.settings_group is not None:
      settings[config_file.settings_group] = followed
  return settings
