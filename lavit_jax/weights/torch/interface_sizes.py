"""The sizes of another system's modules, by the shapes in its files and its `config.json`.

They become settings of the checkpoint (models/settings.py), since no variant has them. The number
of heads is in no shape: it is that of the `config.json`, or follows from the published width of a
head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lavit_jax.models import lavit
from lavit_jax.models.clip_vit import CLIP, EVA
from lavit_jax.models.interfaces.variants import INTERFACES, sizes_of
from lavit_jax.models.interfaces.variants import SIZES as INTERFACE_SIZES
from lavit_jax.models.settings import GROUPS, LLAVA_V1, VICUNA
from lavit_jax.models.variants import CLIP_SAFETY_CHECKER, VARIANTS
from lavit_jax.weights.torch.interface_files import InterfaceFile
from lavit_jax.weights.torch.mapping import PortingError
from lavit_jax.weights.torch.name_rules import NameRule

Config = Mapping[str, Any]  # the content of a config.json
Sizes = dict[str, Any]

# The published encoder of LLaVA and OpenFlamingo, and the widths of a head.
CLIP_SIZES = {key: size for key, size in CLIP_SAFETY_CHECKER.items() if key != 'output_dim'}
EVA_HEAD_DIM = 88
LLAMA_HEAD_DIM = 128
HEAD_DIM = 64  # of all others

NAMES = {  # form -> the name of its interface
  'clip': None,
  'llava_v1': 'linear',
  'llava_v1.5': 'mlp',
  'llava_transformers': 'mlp',
  'openflamingo': 'flamingo',
  'blip2': 'qformer',
  'instructblip': 'instructed_qformer',
  'blip2_transformers': 'qformer',
  'instructblip_transformers': 'instructed_qformer',
  'emu': 'emu',
}


class _Shapes:
  """The shapes of a module's tensors, by the leaves that they become."""

  def __init__(self, rules: list[NameRule], state: Mapping[str, Any]):
    self._rules = {rule.leaf: rule for rule in rules}
    self._state = state

  def __call__(self, leaf: str) -> tuple[int, ...]:
    """The shape in the file of a leaf, or of its first layer.

    Raises:
      PortingError: the file lacks it.
    """
    name = self._rules[leaf].layer_name(0)
    if name not in self._state:
      raise PortingError(f'the file lacks {name}; download it again')
    return tuple(self._state[name].shape)

  def __contains__(self, leaf: str) -> bool:
    return leaf in self._rules and self._rules[leaf].layer_name(0) in self._state

  def layers(self, leaf: str) -> int:
    """How many layers of a leaf follow one another."""
    rule = self._rules[leaf]
    number = 0
    while rule.layer_name(number) in self._state:
      number += 1
    return number


def choose_variant(file: InterfaceFile) -> str:
  """The variant that the settings change: that with the width of the language model, or 7B."""
  if 'llama' in file.tables:
    width = _Shapes(file.tables['llama'], file.states['llama'])('embedding')[1]
    for name, config in VARIANTS.items():
      if config['llama']['hidden_size'] == width:
        return name
  return 'lavit_7b'


def read_sizes(file: InterfaceFile, config: Config, variant: str) -> dict[str, Sizes]:
  """The settings of a checkpoint with the modules of a file.

  Args:
    file: the names and shapes.
    config: its `config.json`; {} without one.
    variant: which the settings change.

  Returns:
    {group: {field: value}}, less the values that are the variant's own.

  Raises:
    PortingError: the file lacks a tensor.
  """
  settings: dict[str, Sizes] = {}
  width = None
  interface = NAMES[file.form]
  if interface is not None:
    shapes = _Shapes(file.tables['interface'], file.states['interface'])
    sizes, width = INTERFACE_READERS[interface](shapes, config)
    settings['interface'] = dict(sizes, name=interface.removeprefix('instructed_'))
    if interface == 'flamingo':
      settings['interface']['every'] = file.options['every']
      settings['interface']['llm_layers'] *= file.options['every']
  vit = file.states.get('vit')
  is_clip = file.form in ('clip', 'openflamingo') or file.form.startswith('llava')
  if vit:
    read = _clip_sizes if is_clip else _eva_sizes
    own = config if file.form == 'clip' else {}  # CLIPVisionModel's config, not CLIPModel's
    settings['vit'] = read(_Shapes(file.tables['vit'], vit), config.get('vision_config', own))
    if not is_clip and interface != 'emu':
      settings['interface']['cut'] = 0  # the file holds no blocks that are not used
  elif is_clip:
    settings['vit'] = _published_clip(width, config)
  elif width is not None:
    settings['vit'] = dict(hidden_size=width)
  if file.states.get('llama'):
    shapes = _Shapes(file.tables['llama'], file.states['llama'])
    settings['llama'] = _llama_sizes(shapes, config.get('text_config', config))
    settings['interface'].pop('llm_dim')
    if file.form.startswith('llava'):
      settings['chat'] = {'template': LLAVA_V1 if file.form == 'llava_v1' else VICUNA}
  return _without_own(settings, variant)


def _without_own(settings: Mapping[str, Sizes], variant: str) -> dict[str, Sizes]:
  """The settings less the values that the variant has without them."""
  config = lavit.variant_config(variant)
  own = {group: dict(config.get(group, {})) for group in GROUPS}
  own['vit']['architecture'] = EVA
  own['llama']['text_vocab_size'] = config['text_vocab_size']
  name = settings.get('interface', {}).get('name')
  if name is not None:
    own['interface'] = {**INTERFACE_SIZES[sizes_of(variant)][name], **INTERFACES[name][1]}
    own['interface']['llm_dim'] = settings.get('llama', config['llama']).get('hidden_size')
    own['interface']['llm_layers'] = settings.get('llama', config['llama']).get('num_layers')
  kept = {}
  for group, fields in settings.items():
    kept[group] = {
      field: value for field, value in fields.items() if own[group].get(field) != value
    }
  return {group: fields for group, fields in kept.items() if fields}


# --- Image encoders and language model -------------------------------------------------------


def _clip_sizes(shapes: _Shapes, config: Config) -> Sizes:
  width = shapes('cls_token')[0]
  patch_size = shapes('patch_embed/kernel')[-1]
  return dict(
    architecture=CLIP,
    image_size=math.isqrt(shapes('pos_embed')[0] - 1) * patch_size,
    patch_size=patch_size,
    hidden_size=width,
    num_layers=shapes.layers('blocks/mlp/fc1/kernel'),
    num_heads=config.get('num_attention_heads', _heads(width, HEAD_DIM)),
    mlp_dim=shapes('blocks/mlp/fc1/kernel')[0],
  )


def _published_clip(width: int | None, config: Config) -> Sizes:
  """The encoder that a file without one was trained with."""
  sizes = dict(CLIP_SIZES, architecture=CLIP)
  if '336' in str(config.get('mm_vision_tower', '')):
    sizes['image_size'] = 336
  if width not in (None, sizes['hidden_size']):
    sizes.update(hidden_size=width, num_heads=_heads(width, HEAD_DIM))
  return sizes


def _eva_sizes(shapes: _Shapes, config: Config) -> Sizes:
  width = shapes('cls_token')[-1]
  patch_size = shapes('patch_embed/kernel')[-1]
  num_heads = config.get('num_attention_heads', _heads(width, EVA_HEAD_DIM))
  sizes = dict(
    image_size=math.isqrt(shapes('pos_embed')[-2] - 1) * patch_size,
    patch_size=patch_size,
    hidden_size=width,
    num_layers=shapes.layers('blocks/mlp/fc1/kernel'),
    num_heads=num_heads,
    head_dim=width // num_heads,
    mlp_dim=shapes('blocks/mlp/fc1/kernel')[0],
  )
  if 'head/bias' in shapes:
    sizes['output_dim'] = shapes('head/bias')[0]
  return sizes


def _llama_sizes(shapes: _Shapes, config: Config) -> Sizes:
  rows, width = shapes('embedding')
  head_dim = config.get('head_dim')
  if head_dim is None:
    heads = config.get('num_attention_heads')
    head_dim = width // heads if heads else LLAMA_HEAD_DIM
  return dict(
    text_vocab_size=rows,
    hidden_size=width,
    num_layers=shapes.layers('layers/mlp/gate/kernel'),
    num_heads=_heads(shapes('layers/attention/query/kernel')[0], head_dim),
    num_kv_heads=_heads(shapes('layers/attention/key/kernel')[0], head_dim),
    head_dim=head_dim,
    mlp_dim=shapes('layers/mlp/gate/kernel')[0],
  )


def _heads(width: int, head_dim: int) -> int:
  return max(1, width // head_dim)


# --- Interfaces: sizes, and the width of the features that they read -------------------------


def _linear_sizes(shapes: _Shapes, config: Config) -> tuple[Sizes, int]:
  del config
  llm_dim, width = shapes('vit_proj/kernel')
  return dict(llm_dim=llm_dim), width


def _mlp_sizes(shapes: _Shapes, config: Config) -> tuple[Sizes, int]:
  del config
  llm_dim, width = shapes('fc1/kernel')
  return dict(llm_dim=llm_dim), width


def _qformer_sizes(shapes: _Shapes, config: Config) -> tuple[Sizes, int]:
  _, num_queries, width = shapes('qformer/query_tokens')
  layer = 'qformer/pairs/cross_layer/'
  heads = config.get('qformer_config', {}).get('num_attention_heads')
  sizes = dict(
    llm_dim=shapes('vit_proj/kernel')[0],
    num_queries=num_queries,
    hidden_size=width,
    num_layers=2 * shapes.layers(f'{layer}query_mlp/fc1/kernel'),
    num_heads=heads or _heads(width, HEAD_DIM),
    mlp_dim=shapes(f'{layer}query_mlp/fc1/kernel')[0],
  )
  if 'qformer/word_embed' in shapes:
    sizes['vocab_size'] = shapes('qformer/word_embed')[0]
    sizes['max_positions'] = shapes('qformer/pos_embed')[0]
  return sizes, shapes('ln_vision/scale')[0]


def _flamingo_sizes(shapes: _Shapes, config: Config) -> tuple[Sizes, int]:
  del config
  num_latents, width = shapes('resampler/latents')
  inner = shapes('resampler/blocks/query/kernel')[0]
  sizes = dict(
    llm_dim=shapes('gated/blocks/norm/scale')[0],
    llm_layers=_gated_layers(shapes),
    num_latents=num_latents,
    num_layers=shapes.layers('resampler/blocks/query/kernel'),
    num_heads=_heads(inner, HEAD_DIM),
    head_dim=min(HEAD_DIM, inner),
    mlp_dim=shapes('resampler/blocks/mlp/fc1/kernel')[0],
  )
  return sizes, width


def _gated_layers(shapes: _Shapes) -> int:
  return shapes.layers('gated/blocks/query/kernel')


def _emu_sizes(shapes: _Shapes, config: Config) -> tuple[Sizes, int]:
  del config
  _, num_tokens, width = shapes('transformer/tokens')
  num_heads = shapes('transformer/relative_bias')[1]
  block = 'transformer/blocks/'
  sizes = dict(
    llm_dim=shapes('vit_proj/kernel')[0],
    num_tokens=num_tokens,
    hidden_size=width,
    num_layers=shapes.layers(f'{block}fc1/kernel'),
    num_heads=num_heads,
    head_dim=shapes(f'{block}self_attn/query/kernel')[0] // num_heads,
    mlp_dim=shapes(f'{block}fc1/kernel')[0],
  )
  return sizes, shapes('ln_visual/scale')[0]


INTERFACE_READERS: dict[str, Callable[[_Shapes, Config], tuple[Sizes, int]]] = {
  'linear': _linear_sizes,
  'mlp': _mlp_sizes,
  'flamingo': _flamingo_sizes,
  'qformer': _qformer_sizes,
  'instructed_qformer': _qformer_sizes,
  'emu': _emu_sizes,
}
