"""Rules for diffusers' StableDiffusionSafetyChecker and the image processor beside it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lavit_jax.models import vit
from lavit_jax.models.lavit import LavitModules
from lavit_jax.weights.torch.configs.llama import GENERATION
from lavit_jax.weights.torch.configs.rules import Checked, ConfigFile, Rule, constant, harmless

VISION = 'vision_config.'  # the prefix of the image encoder's keys in RULES
PRETRAINED = (  # transformers' own keys, which old versions wrote into every config
  'architectures',
  'transformers_version',
  'dtype',
  'torch_dtype',
  'torchscript',
  'use_bfloat16',
  'output_attentions',
  'output_hidden_states',
  'return_dict',
  'use_cache',
  'tf_legacy_loss',
  'id2label',
  'label2id',
  'num_labels',
  'problem_type',
  'finetuning_task',
  'task_specific_params',
  'pruned_heads',
  'tie_word_embeddings',
  'tie_encoder_decoder',
  'is_decoder',
  'is_encoder_decoder',
  'add_cross_attention',
  'cross_attention_hidden_size',
  'chunk_size_feed_forward',
  'bos_token_id',
  'eos_token_id',
  'pad_token_id',
  'sep_token_id',
  'decoder_start_token_id',
  'forced_bos_token_id',
  'forced_eos_token_id',
  'prefix',
  'tokenizer_class',
  'attn_implementation',
  'initializer_range',
  'initializer_factor',
  'attention_dropout',
  'dropout',
  *GENERATION,
)


def complete(config: dict[str, Any]) -> dict[str, Any]:
  """Flattens the two objects that may describe the image encoder, as transformers merges them.

  Raises:
    ValueError: one of them is not an object.
  """
  flat = {
    key: value
    for key, value in config.items()
    if key not in ('vision_config', 'vision_config_dict')
  }
  for group in ('vision_config', 'vision_config_dict'):
    values = config.get(group) or {}
    if not isinstance(values, dict):
      raise ValueError(f'{group}={values!r} is not an object; download the file again')
    flat |= {VISION + key: value for key, value in values.items() if not key.startswith('_')}
  return flat


def _vision(key: str, field: str, default: int | str) -> dict[str, Rule]:
  return {VISION + key: Checked(lambda model: getattr(model.safety_checker, field), default)}


RULES: dict[str, Rule] = {
  'model_type': Checked(
    constant('clip'), 'clip', 'only the CLIP checker of Stable Diffusion is computed here'
  ),
  **_vision('hidden_size', 'hidden_size', 768),
  **_vision('intermediate_size', 'mlp_dim', 3072),
  **_vision('num_hidden_layers', 'num_layers', 12),
  **_vision('num_attention_heads', 'num_heads', 12),
  **_vision('image_size', 'image_size', 224),
  **_vision('patch_size', 'patch_size', 32),
  VISION + 'hidden_act': Checked(
    constant('quick_gelu'), 'quick_gelu', 'choose a checker with quick_gelu'
  ),
  VISION + 'layer_norm_eps': Checked(constant(1e-5), 1e-5, 'choose a checker with 1e-05'),
  VISION + 'num_channels': Checked(constant(3), 3),
  VISION + 'model_type': Checked(
    constant('clip_vision_model'), 'clip_vision_model', 'only the CLIP checker is computed here'
  ),
  'projection_dim': Checked(lambda model: model.safety_checker.output_dim, 512),
  **harmless('the projection is that of the whole config', VISION + 'projection_dim'),
  **harmless('the checker has no text encoder', 'text_config', 'text_config_dict'),
  **harmless('the checker compares cosines, which are not scaled', 'logit_scale_init_value'),
  **harmless(
    'of training, of generation, or how transformers runs it',
    *PRETRAINED,
    *(VISION + key for key in PRETRAINED),
  ),
}


def complete_processor(config: dict[str, Any]) -> dict[str, Any]:
  """Spells sizes as one number, as old versions wrote them, and rounds constants."""
  config = dict(config)
  size = config.get('size', 224)
  if isinstance(size, dict) and set(size) == {'shortest_edge'}:
    size = size['shortest_edge']
  crop = config.get('crop_size', 224)
  is_box = isinstance(crop, dict) and set(crop) == {'height', 'width'}
  if is_box and crop['height'] == crop['width']:
    crop = crop['height']
  for key in ('image_mean', 'image_std'):
    values = config.get(key)
    if isinstance(values, list) and all(isinstance(value, int | float) for value in values):
      config[key] = _rounded(values)
  factor = config.get('rescale_factor', 1 / 255)
  if isinstance(factor, int | float) and abs(factor - 1 / 255) < 1e-9:
    factor = 1 / 255
  return {**config, 'size': size, 'crop_size': crop, 'rescale_factor': factor}


def _rounded(values: Iterable[float]) -> list[float]:
  return [round(value, 6) for value in values]


def _image_size(model: LavitModules) -> int:
  assert model.safety_checker is not None
  return model.safety_checker.image_size


PROCESSOR_RULES: dict[str, Rule] = {
  'size': Checked(_image_size, 224),
  'crop_size': Checked(_image_size, 224),
  'image_mean': Checked(lambda model: _rounded(vit.MEAN), _rounded(vit.MEAN)),
  'image_std': Checked(lambda model: _rounded(vit.STD), _rounded(vit.STD)),
  'resample': Checked(constant(3), 3, 'only bicubic (3) is computed here'),
  'rescale_factor': Checked(constant(1 / 255), 1 / 255, 'only 1 / 255 is computed here'),
  **dict.fromkeys(
    ('do_resize', 'do_center_crop', 'do_rescale', 'do_normalize'),
    Checked(constant(True, None), True, 'choose a checker with true'),
  ),
  **harmless('generated images are RGB', 'do_convert_rgb'),
  **harmless(
    'notes about the origin, or how transformers runs it',
    'feature_extractor_type',
    'image_processor_type',
    'processor_class',
    'data_format',
    'input_data_format',
    'return_tensors',
    'device',
    'disable_grouping',
    'do_pad',
    'pad_size',
    'default_to_square',
  ),
}

CONFIG_FILES = (
  ConfigFile(
    'safety_checker',
    'config.json',
    "diffusers' StableDiffusionSafetyChecker",
    RULES,
    complete=complete,
  ),
  ConfigFile(
    'safety_checker',
    '../feature_extractor/preprocessor_config.json',
    "transformers' CLIPImageProcessor",
    PROCESSOR_RULES,
    complete=complete_processor,
  ),
)
