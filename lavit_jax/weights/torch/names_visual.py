"""Name rules of the visual modules and the safety checker (specification, Checkpoint layout)."""

from __future__ import annotations

from lavit_jax.weights.torch.name_rules import NameRule
from lavit_jax.weights.torch.rule_builders import (
  attention_rules,
  fused_attention_rules,
  linear_rules,
  mlp_rules,
  nested_rules,
  norm_rules,
  of_other_module,
  optional,
)


def vit_rules() -> list[NameRule]:
  """`eva_vitg_psz14`; its norm and head serve only `ViT.pooled` and may be absent."""
  block = [
    *norm_rules('norm1'),
    NameRule('attn.q_bias', 'attn/q_bias'),
    NameRule('attn.v_bias', 'attn/v_bias'),
    NameRule('attn.qkv.weight', 'attn/qkv/kernel', 'qkv'),
    *linear_rules('attn.proj'),
    *norm_rules('norm2'),
    *mlp_rules(),
  ]
  return [
    NameRule('cls_token', 'cls_token', 'unbatch'),
    NameRule('pos_embed', 'pos_embed', 'unbatch'),
    NameRule('patch_embed.proj.weight', 'patch_embed/kernel', 'conv'),
    NameRule('patch_embed.proj.bias', 'patch_embed/bias'),
    *nested_rules('blocks.{i}.', 'blocks/', block),
    *optional([*norm_rules('norm'), *linear_rules('head')]),
  ]


def tokenizer_rules() -> list[NameRule]:
  """`DynamicTokenizer` in `tokenizer_encoder`; a `vit_proj` there belongs to `Understanding`."""
  return [
    *codes_rules(),
    *nested_rules('causal_encoder.', 'merger/', merger_rules()),
    *of_other_module(linear_rules('vit_proj')),
  ]


def understanding_rules() -> list[NameRule]:
  """`Understanding` in `tokenizer_encoder` with `visual_weight` over it.

  The other names in `tokenizer_encoder` belong to `DynamicTokenizer`.
  """
  return [
    *nested_rules('causal_encoder.', 'merger/', merger_rules()),
    *linear_rules('vit_proj'),
    *of_other_module(codes_rules()),
  ]


def decoder_rules(num_contexts: int) -> list[NameRule]:
  """`tokenizer_decoder` (one context head) or `highres_tokenizer_decoder` (two, and the pool)."""
  block = [
    *norm_rules('norm0'),
    *fused_attention_rules('self_attn'),
    *norm_rules('norm1'),
    *attention_rules('cross_attn'),
    *norm_rules('norm2'),
    *mlp_rules(),
  ]
  trunk = [
    NameRule('pos_embed', 'pos_embed', 'unbatch'),
    NameRule('query_embed', 'query_embed', 'unbatch'),
    *linear_rules('in_proj'),
    *nested_rules('blocks.{i}.', 'blocks/', block),
    *norm_rules('norm'),
    *linear_rules('decode_task_layer.0', 'fc1'),
    *linear_rules('decode_task_layer.2', 'fc2'),
  ]
  if num_contexts == 1:
    return [*trunk, *linear_rules('unet_proj', 'context_proj_0')]
  heads = []
  for n in range(num_contexts):
    heads += linear_rules(f'unet_proj_{n + 1}', f'context_proj_{n}')
  pool = [
    NameRule('positional_embedding', 'pos_embed'),
    *linear_rules('q_proj', 'query'),
    *linear_rules('k_proj', 'key'),
    *linear_rules('v_proj', 'value'),
    *linear_rules('c_proj', 'proj'),
  ]
  return [*trunk, *heads, *nested_rules('unet_attnpool.', 'pool/', pool)]


def clip_rules() -> list[NameRule]:
  """`ClipViT`: transformers' CLIPVisionModel."""
  return [
    NameRule('embeddings.class_embedding', 'cls_token'),
    NameRule('embeddings.position_embedding.weight', 'pos_embed'),
    NameRule('embeddings.patch_embedding.weight', 'patch_embed/kernel', 'conv'),
    NameRule('embeddings.position_ids', None),  # a buffer, which is computed here
    *norm_rules('pre_layrnorm', 'norm_in'),
    *_clip_block_rules(),
    *norm_rules('post_layernorm', 'norm'),
  ]


def clip_text_rules() -> list[NameRule]:
  """`ClipTextEncoder`: transformers' CLIPTextModel."""
  return [
    NameRule('embeddings.token_embedding.weight', 'embed'),
    NameRule('embeddings.position_embedding.weight', 'pos_embed'),
    NameRule('embeddings.position_ids', None),
    *_clip_block_rules(),
    *norm_rules('final_layer_norm', 'norm'),
  ]


def _clip_block_rules() -> list[NameRule]:
  block = [
    *norm_rules('layer_norm1', 'norm1'),
    *linear_rules('self_attn.q_proj', 'attn/query'),
    *linear_rules('self_attn.k_proj', 'attn/key'),
    *linear_rules('self_attn.v_proj', 'attn/value'),
    *linear_rules('self_attn.out_proj', 'attn/proj'),
    *norm_rules('layer_norm2', 'norm2'),
    *mlp_rules(),
  ]
  return nested_rules('encoder.layers.{i}.', 'blocks/', block)


def safety_rules(nested: bool = True) -> list[NameRule]:
  """The safety checker.

  Args:
    nested: whether the image encoder is a module within a module, as in transformers up to 4.
  """
  encoder = 'vision_model.vision_model.' if nested else 'vision_model.'
  return [
    *nested_rules(encoder, '', clip_rules()),
    NameRule('visual_projection.weight', 'proj/kernel', 'linear'),
    NameRule('concept_embeds', 'concepts'),
    NameRule('concept_embeds_weights', 'concepts_thresholds'),
    NameRule('special_care_embeds', 'special'),
    NameRule('special_care_embeds_weights', 'special_thresholds'),
  ]


def merger_rules() -> list[NameRule]:
  """The merger, which every file calls `causal_encoder` (specification, Merger)."""
  block = [
    *norm_rules('norm0'),
    *fused_attention_rules('token_causal_attn', 'self_attn'),
    *norm_rules('norm1'),
    *attention_rules('token_cross_attn', 'cross_attn'),
    *norm_rules('norm2'),
    *mlp_rules(),
  ]
  return [
    *norm_rules('ln_vision'),
    *nested_rules('blocks.{i}.', 'blocks/', block),
    *norm_rules('norm'),
  ]


def codes_rules() -> list[NameRule]:
  """Selector and quantizer: what `DynamicTokenizer` has beside the merger."""
  selector = [
    *norm_rules('in_conv.0', 'norm'),
    *linear_rules('in_conv.1', 'fc_in'),
    *linear_rules('out_conv.0', 'fc1'),
    *linear_rules('out_conv.2', 'fc2'),
    *linear_rules('out_conv.4', 'fc_out'),
  ]
  return [
    *nested_rules('token_predictor.', 'selector/', selector),
    *linear_rules('encode_task_layer.0', 'quantizer/fc1'),
    *linear_rules('encode_task_layer.2', 'quantizer/fc2'),
    NameRule('quantize.embedding.weight', 'quantizer/embedding'),
  ]
