"""Name rules of BLIP-2 and InstructBLIP: the `.pth` files of LAVIS, and those of transformers.

The image encoder of LAVIS is a file of its own, with the names of `names_visual.vit_rules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lavit_jax.weights.torch.mapping import PortingError
from lavit_jax.weights.torch.name_rules import NameRule
from lavit_jax.weights.torch.rule_builders import (
  linear_rules,
  mlp_rules,
  nested_rules,
  norm_rules,
  optional,
)
from lavit_jax.weights.torch.tensors import LazyTensor

BLIP2_TIED = {  # tensors that the first stage's `.pth` repeats, and what they repeat
  'Qformer.cls.predictions.decoder.weight': 'Qformer.bert.embeddings.word_embeddings.weight',
  'Qformer.cls.predictions.decoder.bias': 'Qformer.cls.predictions.bias',
}
QKV_BIAS = '.self_attn.qkv.bias'

# --- Modules ---------------------------------------------------------------------------------


def blip2_rules(projection: str, text: bool = False) -> list[NameRule]:
  """`QFormerInterface` in the `.pth` of LAVIS, under its key `model`.

  Args:
    projection: 'opt_proj', 't5_proj' or 'llm_proj'.
    text: whether the Q-Former reads the instruction (InstructBLIP).
  """
  return [
    *norm_rules('ln_vision'),
    *nested_rules('', 'qformer/', _lavis_qformer(text)),
    *linear_rules(projection, 'vit_proj'),
  ]


def blip2_pretraining_rules() -> list[NameRule]:
  """`QFormerPretraining` in the `.pth` of LAVIS, less the tensors of `BLIP2_TIED`."""
  transform = 'Qformer.cls.predictions.transform.'
  return [
    *norm_rules('ln_vision'),
    *nested_rules('', 'qformer/', _lavis_qformer(True)),
    *linear_rules('vision_proj', 'image_proj'),
    *linear_rules('text_proj'),
    *linear_rules('itm_head', 'matching_head'),
    *linear_rules(f'{transform}dense', 'word_fc'),
    *norm_rules(f'{transform}LayerNorm', 'word_norm'),
    NameRule('Qformer.cls.predictions.bias', 'word_bias'),
    NameRule('temp', 'temperature'),
  ]


def blip2_transformers_rules(text: bool = False) -> list[NameRule]:
  """`QFormerInterface` in transformers' Blip2- or InstructBlipForConditionalGeneration.

  Args:
    text: whether it is InstructBlip's.
  """
  return [
    *norm_rules('vision_model.post_layernorm', 'ln_vision'),
    *nested_rules('', 'qformer/', _transformers_qformer('qformer.embeddings.' if text else None)),
    *linear_rules('language_projection', 'vit_proj'),
  ]


def blip2_retrieval_rules() -> list[NameRule]:
  """`QFormerPretraining` in transformers' Blip2ForImageTextRetrieval.

  It has neither the head of captioning nor the temperature; their rules are optional.
  """
  qformer = _transformers_qformer('embeddings.')
  own = blip2_pretraining_rules()
  absent = [rule for rule in own if (rule.leaf or '').startswith(('word_', 'temperature'))]
  return [
    *norm_rules('vision_model.post_layernorm', 'ln_vision'),
    *nested_rules('', 'qformer/', qformer),
    *linear_rules('vision_projection', 'image_proj'),
    *linear_rules('text_projection', 'text_proj'),
    *linear_rules('itm_head', 'matching_head'),
    *optional(absent),
  ]


def _lavis_qformer(text: bool) -> list[NameRule]:
  bert = 'Qformer.bert.'
  embeddings = [
    NameRule(f'{bert}embeddings.word_embeddings.weight', 'word_embed'),
    NameRule(f'{bert}embeddings.position_embeddings.weight', 'pos_embed'),
  ]
  return [
    NameRule('query_tokens', 'query_tokens', 'unbatch'),
    NameRule(f'{bert}embeddings.position_ids', None),  # a buffer, which is computed here
    *norm_rules(f'{bert}embeddings.LayerNorm', 'embed_norm'),
    *(embeddings if text else []),
    *_qformer_layers(f'{bert}encoder.layer.', 'self', text),
  ]


def _transformers_qformer(embeddings: str | None) -> list[NameRule]:
  """The Q-Former of transformers.

  Args:
    embeddings: what is before the names of the text's embeddings; None without a text.
  """
  norm = 'qformer.embeddings.layernorm' if embeddings == 'qformer.embeddings.' else None
  rules = [
    NameRule('query_tokens', 'query_tokens', 'unbatch'),
    *norm_rules(norm or 'qformer.layernorm', 'embed_norm'),
    *_qformer_layers('qformer.encoder.layer.', 'attention', embeddings is not None),
  ]
  if embeddings is not None:
    rules += [
      NameRule(f'{embeddings}word_embeddings.weight', 'word_embed'),
      NameRule(f'{embeddings}position_embeddings.weight', 'pos_embed'),
      NameRule(f'{embeddings}position_ids', None),
    ]
  return rules


def _qformer_layers(prefix: str, projections: str, text: bool) -> list[NameRule]:
  """The layers, by pairs.

  Args:
    prefix: what is before the number of a layer.
    projections: the name of an attention's projections of queries, keys and values.
    text: whether there is a text.
  """
  plain = [
    *_bert_attention('attention', projections, 'self_attn', 'self_norm'),
    *_bert_mlp('_query', 'query'),
    *(_bert_mlp('', 'text') if text else []),
  ]
  crossing = [
    *plain,
    *_bert_attention('crossattention', projections, 'cross_attn', 'cross_norm'),
  ]
  return [
    *nested_rules(f'{prefix}{{2i}}.', 'pairs/cross_layer/', crossing),
    *nested_rules(f'{prefix}{{2i+1}}.', 'pairs/plain_layer/', plain),
  ]


def _bert_attention(name: str, projections: str, leaf: str, norm: str) -> list[NameRule]:
  rules = []
  for projection in ('query', 'key', 'value'):
    rules += linear_rules(f'{name}.{projections}.{projection}', f'{leaf}/{projection}')
  return [
    *rules,
    *linear_rules(f'{name}.output.dense', f'{leaf}/proj'),
    *norm_rules(f'{name}.output.LayerNorm', norm),
  ]


def _bert_mlp(suffix: str, leaf: str) -> list[NameRule]:
  return [
    *linear_rules(f'intermediate{suffix}.dense', f'{leaf}_mlp/fc1'),
    *linear_rules(f'output{suffix}.dense', f'{leaf}_mlp/fc2'),
    *norm_rules(f'output{suffix}.LayerNorm', f'{leaf}_norm'),
  ]


def blip2_tower_rules() -> list[NameRule]:
  """`ViT` in the files of transformers, after `split_qkv_bias`; it has neither norm nor head."""
  block = [
    *norm_rules('layer_norm1', 'norm1'),
    NameRule('self_attn.q_bias', 'attn/q_bias'),
    NameRule('self_attn.v_bias', 'attn/v_bias'),
    NameRule('self_attn.qkv.weight', 'attn/qkv/kernel', 'qkv'),
    *linear_rules('self_attn.projection', 'attn/proj'),
    *norm_rules('layer_norm2', 'norm2'),
    *mlp_rules(),
  ]
  rules = [
    NameRule('embeddings.class_embedding', 'cls_token', 'unbatch'),
    NameRule('embeddings.position_embedding', 'pos_embed', 'unbatch'),
    NameRule('embeddings.patch_embedding.weight', 'patch_embed/kernel', 'conv'),
    NameRule('embeddings.patch_embedding.bias', 'patch_embed/bias'),
    *nested_rules('encoder.layers.{i}.', 'blocks/', block),
    *optional([*norm_rules('norm'), *linear_rules('head')]),
  ]
  return nested_rules('vision_model.', '', rules)


# --- Tensors that are more or less than one leaf ---------------------------------------------


def split_tied(state: Mapping[str, Any]) -> dict[str, Any]:
  """The tensors of a first stage's file, less those that repeat another.

  Raises:
    PortingError: such a tensor differs from what it should repeat.
  """
  kept = dict(state)
  for name, original in BLIP2_TIED.items():
    if name not in kept or original not in kept:
      continue
    if not np.array_equal(np.asarray(kept.pop(name)), np.asarray(kept[original])):
      raise PortingError(f'{name} differs from {original}, and the Q-Former has one for both')
  return kept


def repeat_tied(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The inverse of `split_tied`, as the published files are."""
  repeated = dict(state)
  for name, original in BLIP2_TIED.items():
    repeated[name] = repeated[original]
  return repeated


def split_qkv_bias(state: Mapping[str, Any]) -> dict[str, Any]:
  """The tensors of a file of transformers, with the biases of queries and values by themselves.

  Raises:
    PortingError: keys have a bias.
  """
  split = {}
  for name, tensor in state.items():
    if not name.endswith(QKV_BIAS):
      split[name] = tensor
      continue
    if np.any(np.asarray(_third(tensor, 1)) != 0):
      raise PortingError(f'{name} has a bias for the keys, and EVA has none')
    block = name.removesuffix('qkv.bias')
    split[f'{block}q_bias'] = _third(tensor, 0)
    split[f'{block}v_bias'] = _third(tensor, 2)
  return split


def _third(tensor: Any, number: int) -> Any:
  """The first, second or last third of an array or of a `LazyTensor`, which is not read yet."""
  size = tensor.shape[0] // 3
  part = slice(number * size, (number + 1) * size)
  if not isinstance(tensor, LazyTensor):
    return np.asarray(tensor)[part]
  offset = tensor.offset
  if offset is not None:
    offset += part.start * tensor.dtype.itemsize
  return LazyTensor((size,), tensor.dtype, lambda: np.asarray(tensor)[part], tensor.file, offset)


def join_qkv_bias(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The inverse of `split_qkv_bias`."""
  joined = dict(state)
  for name in state:
    if name.endswith('.self_attn.q_bias'):
      block = name.removesuffix('q_bias')
      q_bias = joined.pop(name)
      v_bias = joined.pop(f'{block}v_bias')
      joined[f'{block}qkv.bias'] = np.concatenate([q_bias, np.zeros_like(q_bias), v_bias])
  return joined
