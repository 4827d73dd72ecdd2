"""Rules for transformers' LlamaConfig, of version 5 and older ones, and the files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.rope import KEYS, REQUIRED
from lavit_jax.weights.torch.configs.rules import (
  Checked,
  ConfigFile,
  Followed,
  Rule,
  constant,
  harmless,
)

ORIGINAL = 'original_max_position_embeddings'
GENERATION = (  # options of generation, which old versions kept in the config
  'max_length',
  'min_length',
  'do_sample',
  'early_stopping',
  'num_beams',
  'num_beam_groups',
  'diversity_penalty',
  'temperature',
  'top_k',
  'top_p',
  'typical_p',
  'repetition_penalty',
  'length_penalty',
  'no_repeat_ngram_size',
  'encoder_no_repeat_ngram_size',
  'bad_words_ids',
  'num_return_sequences',
  'output_scores',
  'return_dict_in_generate',
  'remove_invalid_values',
  'exponential_decay_length_penalty',
  'suppress_tokens',
  'begin_suppress_tokens',
)
# Keys of a scaling that are read elsewhere, or have no effect.
IGNORED = {'type', 'rope_type', 'rope_theta', 'partial_rotary_factor', 'finetuned'}


def complete(config: dict[str, Any]) -> dict[str, Any]:
  """Spells rotary positions as `rope_theta` and `rope_scaling`, and fills in sizes.

  As in transformers, a missing `num_key_value_heads` or `head_dim` follows from other sizes.

  Raises:
    ValueError: the positions are of a kind that is not computed here.
  """
  config = dict(config)
  scaling = config.pop('rope_scaling', None) or config.pop('rope_parameters', None) or {}
  config.pop('rope_parameters', None)
  config.update(_complete_rope(config, scaling))
  config.pop(ORIGINAL, None)
  heads = config.get('num_attention_heads', 32)
  if config.get('num_key_value_heads') is None:
    config['num_key_value_heads'] = heads
  width = config.get('hidden_size', 4096)
  if config.get('head_dim') is None and isinstance(heads, int) and isinstance(width, int) and heads:
    config['head_dim'] = width // heads
  return config


def _complete_rope(config: Mapping[str, Any], scaling: Any) -> dict[str, Any]:
  """The keys of the config that a scaling determines.

  Raises:
    ValueError: as `complete`.
  """
  kind = _rope_type(scaling)
  completed = {}
  for key in ('rope_theta', 'partial_rotary_factor'):
    if scaling.get(key) is not None:
      completed[key] = scaling[key]
  if kind != 'default':
    completed['rope_scaling'] = _complete_scaling(config, {**scaling, 'rope_type': kind})
  return completed


def _rope_type(scaling: Any) -> str:
  """The type of a scaling, after its keys have been checked.

  Raises:
    ValueError: as `complete`.
  """
  if not isinstance(scaling, dict):
    raise ValueError(
      f'rope_scaling={scaling!r} is not an object; give one with the key rope_type, or null'
    )
  kind = scaling.get('rope_type', scaling.get('type', 'default'))
  if kind not in ('default', *REQUIRED):
    raise ValueError(
      f'rope_scaling of the type {kind!r} is not computed here; choose a checkpoint '
      f'with one of the types default, {", ".join(REQUIRED)}'
    )
  unknown = sorted(scaling.keys() - KEYS - IGNORED)
  if unknown:
    key = unknown[0]
    raise ValueError(
      f'rope_scaling has the key {key}={scaling[key]!r}, which is not followed here; '
      'remove it if transformers ignores it'
    )
  return kind


def _complete_scaling(config: Mapping[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
  """Fills in the original length, and the factor of YaRN, as transformers does."""
  if scaling['rope_type'] not in ('llama3', 'yarn'):
    return scaling
  positions = config.get('max_position_embeddings', 2048)
  # The key beside the scaling takes precedence over the one in it.
  original = config.get(ORIGINAL) or scaling.get(ORIGINAL) or positions
  scaling = {**scaling, ORIGINAL: original}
  are_numbers = isinstance(positions, int | float) and isinstance(original, int | float)
  if scaling['rope_type'] == 'yarn' and scaling.get('factor') is None and are_numbers and original:
    scaling['factor'] = positions / original
  return scaling


def complete_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
  """Replaces special tokens that are objects by their text."""
  config = dict(config)
  for key in ('bos_token', 'eos_token', 'unk_token'):
    if isinstance(config.get(key), dict):
      config[key] = config[key].get('content')
  return config


END_TOKEN = Checked(
  constant(2, [2], None),
  2,
  "texts end with id 2, LLaMA's </s>: correct the file if the tokenizer has that id, "
  'or choose a checkpoint whose texts end with it',
)


def _llama(field: str, default: int) -> Checked:
  """A size that must be the variant's."""

  def expected(model: LavitModules) -> int:
    return getattr(model.llama, field)

  return Checked(expected, default)


RULES: dict[str, Rule] = {
  'rope_theta': Followed('rope_theta', 1e4),
  'rope_scaling': Followed('rope_scaling', None),
  'rms_norm_eps': Followed('rms_norm_eps', 1e-6),
  'max_position_embeddings': Followed('max_position_embeddings', 2048),
  # The complete length in folders of Vicuna and LongChat; transformers ignores the key.
  'max_sequence_length': Followed('max_sequence_length', None),
  'hidden_size': _llama('hidden_size', 4096),
  'intermediate_size': _llama('mlp_dim', 11008),
  'num_hidden_layers': _llama('num_layers', 32),
  'num_attention_heads': _llama('num_heads', 32),
  'num_key_value_heads': _llama('num_kv_heads', 32),
  'head_dim': _llama('head_dim', 128),
  'hidden_act': Checked(
    constant('silu', 'swish'),
    'silu',
    "choose a checkpoint whose MLP is SwiGLU: only hidden_act='silu' is computed here",
  ),
  'partial_rotary_factor': Checked(
    constant(None, 1.0), None, 'choose a checkpoint that rotates whole heads'
  ),
  'attention_bias': Checked(
    constant(False, None), False, 'choose a checkpoint without biases in its attention'
  ),
  'mlp_bias': Checked(
    constant(False, None), False, 'choose a checkpoint without biases in its MLP'
  ),
  'model_type': Checked(constant('llama'), 'llama', 'only LLaMA is computed here'),
  'quantization_config': Checked(
    constant(None), None, 'choose a checkpoint whose weights are numbers of 16 or 32 bits'
  ),
  'add_cross_attention': Checked(constant(False, None), False, 'choose a decoder alone'),
  'is_encoder_decoder': Checked(constant(False, None), False, 'choose a decoder alone'),
  **harmless('the shapes of the weights determine it', 'vocab_size'),
  **harmless(
    'used only if the embedding or the head is missing, as in transformers', 'tie_word_embeddings'
  ),
  'eos_token_id': END_TOKEN,
  **harmless(
    'the ids of the tokenizer beside the weights are used',
    'bos_token_id',
    'pad_token_id',
    'sep_token_id',
    'decoder_start_token_id',
    'forced_bos_token_id',
    'forced_eos_token_id',
    'tokenizer_class',
    'prefix',
  ),
  **harmless('of fresh weights', 'initializer_range', 'initializer_factor'),
  **harmless(
    "of transformers' training: none is applied here",
    'attention_dropout',
    'hidden_dropout',
    'resid_pdrop',
    'embd_pdrop',
  ),
  **harmless('the same sum in pieces', 'pretraining_tp', 'chunk_size_feed_forward'),
  **harmless(
    'how a program runs, not what it computes',
    'use_cache',
    'torchscript',
    'use_bfloat16',
    'attn_implementation',
    'return_dict',
    'output_hidden_states',
    'output_attentions',
    'tf_legacy_loss',
  ),
  **harmless('the weights determine it', 'dtype', 'torch_dtype'),
  **harmless(
    'notes about the origin of the file',
    'architectures',
    'transformers_version',
    'auto_map',
    'unsloth_version',
    'unsloth_fixed',
  ),
  **harmless(
    'transformers knows no such key of LlamaConfig and ignores it',
    'multiple_of',
    'use_flash_attention',
  ),
  **harmless(
    'of other kinds of models',
    'is_decoder',
    'cross_attention_hidden_size',
    'tie_encoder_decoder',
    'pruned_heads',
    'finetuning_task',
    'id2label',
    'label2id',
    'num_labels',
    'problem_type',
    'task_specific_params',
  ),
  **harmless('the options of the call are used', *GENERATION),
}

GENERATION_RULES: dict[str, Rule] = {
  'eos_token_id': END_TOKEN,
  **harmless(
    'the ids of the tokenizer beside the weights are used',
    'bos_token_id',
    'pad_token_id',
    'decoder_start_token_id',
    'forced_bos_token_id',
    'forced_eos_token_id',
  ),
}
TOKENIZER_RULES: dict[str, Rule] = {
  'bos_token': Checked(constant('<s>', '', None), None, 'use the tokenizer of the language model'),
  'eos_token': Checked(constant('</s>', '', None), None, 'use the tokenizer of the language model'),
  'unk_token': Checked(
    constant('<unk>', '', None), None, 'use the tokenizer of the language model'
  ),
  'add_prefix_space': Checked(
    constant(True, None), None, 'use a tokenizer that puts a space before a text'
  ),
  'sp_model_kwargs': Checked(
    constant({}, None), None, 'remove it: texts are not split at random here'
  ),
  'clean_up_tokenization_spaces': Checked(
    constant(False, None), None, 'set it to false: texts keep the spaces that the model generates'
  ),
  **harmless(
    'the prompts have their own special tokens',
    'add_bos_token',
    'add_eos_token',
    'add_special_tokens',
  ),
  **harmless(
    'special tokens within a text are ordinary characters here',
    'legacy',
    'split_special_tokens',
    'spaces_between_special_tokens',
  ),
  **harmless('the positions of the language model limit the length', 'model_max_length'),
  **harmless(
    'prompts are padded on the left, and the padding is masked', 'padding_side', 'pad_token'
  ),
  **harmless(
    'tokens beyond the vocabulary of the model are removed',
    'added_tokens_decoder',
    'additional_special_tokens',
  ),
}

CONFIG = ConfigFile('llama', 'config.json', "transformers' LlamaConfig", RULES, 'llama', complete)
GENERATION_CONFIG = ConfigFile(
  'llama',
  'generation_config.json',
  "transformers' GenerationConfig",
  GENERATION_RULES,
  other_keys='the options of the call are used',
)
TOKENIZER_CONFIG = ConfigFile(
  'llama',
  'tokenizer_config.json',
  "transformers' LlamaTokenizer",
  TOKENIZER_RULES,
  complete=complete_tokenizer,
  other_keys='names, chat templates and similar keys are not used here',
)
CONFIG_FILES = (CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG)
