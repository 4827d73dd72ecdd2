"""transformers' LlamaConfig, in the spelling of version 5 and in older ones, and what lies beside it."""

from __future__ import annotations

from lavit_jax.models.rope import KEYS, REQUIRED
from lavit_jax.porting.configs.rules import Checked, Family, Followed, constant, harmless

ORIGINAL = 'original_max_position_embeddings'
GENERATION = (  # old versions kept them in the config
    'max_length', 'min_length', 'do_sample', 'early_stopping', 'num_beams', 'num_beam_groups', 'diversity_penalty', 'temperature', 'top_k',
    'top_p', 'typical_p', 'repetition_penalty', 'length_penalty', 'no_repeat_ngram_size', 'encoder_no_repeat_ngram_size', 'bad_words_ids',
    'num_return_sequences', 'output_scores', 'return_dict_in_generate', 'remove_invalid_values', 'exponential_decay_length_penalty',
    'suppress_tokens', 'begin_suppress_tokens')
IGNORED = {'type', 'rope_type', 'rope_theta', 'partial_rotary_factor', 'finetuned'}  # of a scaling's keys: read elsewhere, or of no effect


def complete(config: dict) -> dict:
  """Older spellings as `rope_theta` and `rope_scaling`, and sizes that follow from others filled in, as transformers does.

  Raises:
    ValueError: the positions are told in a way that cannot be followed.
  """
  config = dict(config)
  told = config.pop('rope_scaling', None) or config.pop('rope_parameters', None) or {}
  config.pop('rope_parameters', None)
  if not isinstance(told, dict):
    raise ValueError(f'rope_scaling={told!r} is no object; give one with the key rope_type, or null')
  kind = told.get('rope_type', told.get('type', 'default'))
  if kind not in ('default', *REQUIRED):
    raise ValueError(f'rope_scaling of the type {kind!r} is not computed here; choose a checkpoint '
                     f'with one of the types default, {", ".join(REQUIRED)}')
  if unknown := sorted(told.keys() - KEYS - IGNORED):
    raise ValueError(f'rope_scaling has the key {unknown[0]}={told[unknown[0]]!r}, which is not followed here; remove it if transformers knows none')
  for key in ('rope_theta', 'partial_rotary_factor'):
    if told.get(key) is not None:
      config[key] = told[key]
  if kind != 'default':
    scaling = {**told, 'rope_type': kind}
    if kind in ('llama3', 'yarn'):
      # The key beside the scaling wins over the one in it; without either it is the length of the longest sequence.
      positions = config.get('max_position_embeddings', 2048)
      scaling[ORIGINAL] = config.get(ORIGINAL) or scaling.get(ORIGINAL) or positions
      numbers = all(isinstance(value, int | float) for value in (positions, scaling[ORIGINAL]))
      if kind == 'yarn' and scaling.get('factor') is None and numbers and scaling[ORIGINAL]:
        scaling['factor'] = positions / scaling[ORIGINAL]
    config['rope_scaling'] = scaling
  config.pop(ORIGINAL, None)
  heads = config.get('num_attention_heads', 32)
  if config.get('num_key_value_heads') is None:
    config['num_key_value_heads'] = heads
  width = config.get('hidden_size', 4096)
  if config.get('head_dim') is None and isinstance(heads, int) and isinstance(width, int) and heads:
    config['head_dim'] = width // heads
  return config


def complete_tokenizer(config: dict) -> dict:
  """Tokens that are written as objects, as their text."""
  config = dict(config)
  for key in ('bos_token', 'eos_token', 'unk_token'):
    if isinstance(config.get(key), dict):
      config[key] = config[key].get('content')
  return config


END = Checked(constant(2, [2], None), 2, "texts end with id 2, LLaMA's </s>: correct the file if that is "
              'what the tokenizer has, or choose a checkpoint whose texts end so')

RULES = {
    'rope_theta': Followed('rope_theta', 1e4),
    'rope_scaling': Followed('rope_scaling', None),
    'rms_norm_eps': Followed('rms_norm_eps', 1e-6),
    'max_position_embeddings': Followed('max_position_embeddings', 2048),
    # transformers ignores it; Vicuna's and LongChat's folders say their whole length by it.
    'max_sequence_length': Followed('max_sequence_length', None),
    'hidden_size': Checked(lambda model: model.llama.hidden_size, 4096),
    'intermediate_size': Checked(lambda model: model.llama.mlp_dim, 11008),
    'num_hidden_layers': Checked(lambda model: model.llama.num_layers, 32),
    'num_attention_heads': Checked(lambda model: model.llama.num_heads, 32),
    'num_key_value_heads': Checked(lambda model: model.llama.num_kv_heads, 32),
    'head_dim': Checked(lambda model: model.llama.head_dim, 128),
    'hidden_act': Checked(constant('silu', 'swish'), 'silu', "choose a checkpoint whose MLP is SwiGLU: only hidden_act='silu' is computed here"),
    'partial_rotary_factor': Checked(constant(None, 1.0), None, 'choose a checkpoint that turns whole heads'),
    'attention_bias': Checked(constant(False, None), False, 'choose a checkpoint without biases in its attention'),
    'mlp_bias': Checked(constant(False, None), False, 'choose a checkpoint without biases in its MLP'),
    'model_type': Checked(constant('llama'), 'llama', 'only LLaMA is computed here'),
    'quantization_config': Checked(constant(None), None, 'choose a checkpoint whose weights are numbers of 16 or 32 bits'),
    'add_cross_attention': Checked(constant(False, None), False, 'choose a decoder alone'),
    'is_encoder_decoder': Checked(constant(False, None), False, 'choose a decoder alone'),
    **harmless('the rows of the weights count', 'vocab_size'),
    **harmless('it counts only where embedding or head is missing, as in transformers', 'tie_word_embeddings'),
    'eos_token_id': END,
    **harmless('the ids of the tokenizer beside the weights are used', 'bos_token_id', 'pad_token_id', 'sep_token_id',
               'decoder_start_token_id', 'forced_bos_token_id', 'forced_eos_token_id', 'tokenizer_class', 'prefix'),
    **harmless('of fresh weights', 'initializer_range', 'initializer_factor'),
    **harmless("of transformers' training: none is applied here", 'attention_dropout', 'hidden_dropout', 'resid_pdrop', 'embd_pdrop'),
    **harmless('the same sum in pieces', 'pretraining_tp', 'chunk_size_feed_forward'),
    **harmless('how a program runs, not what it computes', 'use_cache', 'torchscript', 'use_bfloat16', 'attn_implementation', 'return_dict',
               'output_hidden_states', 'output_attentions', 'tf_legacy_loss'),
    **harmless('the types of the weights count', 'dtype', 'torch_dtype'),
    **harmless('who wrote it, and with what', 'architectures', 'transformers_version', 'auto_map', 'unsloth_version', 'unsloth_fixed'),
    **harmless('transformers knows no such key of LlamaConfig and ignores it', 'multiple_of', 'use_flash_attention'),
    **harmless('of other kinds of models', 'is_decoder', 'cross_attention_hidden_size', 'tie_encoder_decoder', 'pruned_heads', 'finetuning_task',
               'id2label', 'label2id', 'num_labels', 'problem_type', 'task_specific_params'),
    **harmless('options of generation: those of the call are used', *GENERATION),
}

GENERATION_RULES = {
    'eos_token_id': END,
    **harmless('the ids of the tokenizer beside the weights are used', 'bos_token_id', 'pad_token_id',
               'decoder_start_token_id', 'forced_bos_token_id', 'forced_eos_token_id'),
}
TOKENIZER_RULES = {
    'bos_token': Checked(constant('<s>', '', None), None, 'give the tokenizer of the language model'),
    'eos_token': Checked(constant('</s>', '', None), None, 'give the tokenizer of the language model'),
    'unk_token': Checked(constant('<unk>', '', None), None, 'give the tokenizer of the language model'),
    'add_prefix_space': Checked(constant(True, None), None, 'give a tokenizer whose texts begin with a space'),
    'sp_model_kwargs': Checked(constant({}, None), None, 'remove it: texts are never split at random'),
    'clean_up_tokenization_spaces': Checked(
        constant(False, None), None, 'write false: texts keep the spaces that the model writes'),
    **harmless('the prompts have their own special tokens', 'add_bos_token', 'add_eos_token', 'add_special_tokens'),
    **harmless('of special tokens within a text, which are letters here', 'legacy', 'split_special_tokens',
               'spaces_between_special_tokens'),
    **harmless('the positions of the language model limit the length', 'model_max_length'),
    **harmless('prompts are padded on the left, out of sight of the model', 'padding_side', 'pad_token'),
    **harmless("tokens behind the model's rows are left out", 'added_tokens_decoder', 'additional_special_tokens'),
}

CONFIG = Family('llama', 'config.json', "transformers' LlamaConfig", RULES, 'llama', complete)
GENERATION_CONFIG = Family(
    'llama', 'generation_config.json', "transformers' GenerationConfig", GENERATION_RULES,
    others='options of generation: those of the call are used')
TOKENIZER_CONFIG = Family(
    'llama', 'tokenizer_config.json', "transformers' LlamaTokenizer", TOKENIZER_RULES,
    complete=complete_tokenizer, others='names, templates of chats and the like, of which nothing is used here')
FAMILIES = (CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG)
