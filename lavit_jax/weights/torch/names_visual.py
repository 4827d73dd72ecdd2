"""Name rules of the visual modules and the safety checker (specification, Checkpoint layout)."""

from __future__ import annotations

from lavit_jax.weights.torch.name_rules import NameRule

# --- Modules ---------------------------------------------------------------------------------


def vit_rules() -> list[NameRule]:
  """`eva_vitg_psz14`; its norm and head serve only `ViT.pooled` and may be absent."""
  block = [
    *_norm('norm1'),
    NameRule('attn.q_bias', 'attn/q_bias'),
    NameRule('attn.v_bias', 'attn/v_bias'),
    NameRule('attn.qkv.weight', 'attn/qkv/kernel', 'qkv'),
    *_linear('attn.proj'),
    *_norm('norm2'),
    *_mlp(),
  ]
  return [
    NameRule('cls_token', 'cls_token', 'unbatch'),
    NameRule('pos_embed', 'pos_embed', 'unbatch'),
    NameRule('patch_embed.proj.weight', 'patch_embed/kernel', 'conv'),
    NameRule('patch_embed.proj.bias', 'patch_embed/bias'),
    *_nested('blocks.{i}.', 'blocks/', block),
    *_optional([*_norm('norm'), *_linear('head')]),
  ]


def tokenizer_rules() -> list[NameRule]:
  """`DynamicTokenizer` in `tokenizer_encoder`; a `vit_proj` there belongs to `Understanding`."""
  return [
    *codes_rules(),
    *_nested('causal_encoder.', 'merger/', merger_rules()),
    *_of_other_module(_linear('vit_proj')),
  ]


def understanding_rules() -> list[NameRule]:
  """`Understanding` in `tokenizer_encoder` with `visual_weight` over it.

  The other names in `tokenizer_encoder` belong to `DynamicTokenizer`.
  """
  return [
    *_nested('causal_encoder.', 'merger/', merger_rules()),
    *_linear('vit_proj'),
    *_of_other_module(codes_rules()),
  ]


def decoder_rules(num_contexts: int) -> list[NameRule]:
  """`tokenizer_decoder` (one context head) or `highres_tokenizer_decoder` (two, and the pool)."""
  block = [
    *_norm('norm0'),
    *_fused_attention('self_attn'),
    *_norm('norm1'),
    *_cross_attention('cross_attn'),
    *_norm('norm2'),
    *_mlp(),
  ]
  trunk = [
    NameRule('pos_embed', 'pos_embed', 'unbatch'),
    NameRule('query_embed', 'query_embed', 'unbatch'),
    *_linear('in_proj'),
    *_nested('blocks.{i}.', 'blocks/', block),
    *_norm('norm'),
    *_linear('decode_task_layer.0', 'fc1'),
    *_linear('decode_task_layer.2', 'fc2'),
  ]
  if num_contexts == 1:
    return [*trunk, *_linear('unet_proj', 'context_proj_0')]
  heads = []
  for n in range(num_contexts):
    heads += _linear(f'unet_proj_{n + 1}', f'context_proj_{n}')
  pool = [
    NameRule('positional_embedding', 'pos_embed'),
    *_linear('q_proj', 'query'),
    *_linear('k_proj', 'key'),
    *_linear('v_proj', 'value'),
    *_linear('c_proj', 'proj'),
  ]
  return [*trunk, *heads, *_nested('unet_attnpool.', 'pool/', pool)]


def safety_rules(nested: bool = True) -> list[NameRule]:
  """The safety checker.

  Args:
    nested: whether the image encoder is a module within a module, as in transformers up to 4.
  """
  encoder = 'vision_model.vision_model.' if nested else 'vision_model.'
  block = [
    *_norm('layer_norm1', 'norm1'),
    *_linear('self_attn.q_proj', 'attn/query'),
    *_linear('self_attn.k_proj', 'attn/key'),
    *_linear('self_attn.v_proj', 'attn/value'),
    *_linear('self_attn.out_proj', 'attn/proj'),
    *_norm('layer_norm2', 'norm2'),
    *_mlp(),
  ]
  return [
    NameRule(f'{encoder}embeddings.class_embedding', 'cls_token'),
    NameRule(f'{encoder}embeddings.position_embedding.weight', 'pos_embed'),
    NameRule(f'{encoder}embeddings.patch_embedding.weight', 'patch_embed/kernel', 'conv'),
    NameRule(f'{encoder}embeddings.position_ids', None),  # a buffer, which is computed here
    *_norm(f'{encoder}pre_layrnorm', 'norm_in'),
    *_nested(f'{encoder}encoder.layers.{{i}}.', 'blocks/', block),
    *_norm(f'{encoder}post_layernorm', 'norm'),
    NameRule('visual_projection.weight', 'proj/kernel', 'linear'),
    NameRule('concept_embeds', 'concepts'),
    NameRule('concept_embeds_weights', 'concepts_thresholds'),
    NameRule('special_care_embeds', 'special'),
    NameRule('special_care_embeds_weights', 'special_thresholds'),
  ]


def merger_rules() -> list[NameRule]:
  """The merger, which every file calls `causal_encoder` (specification, Merger)."""
  block = [
    *_norm('norm0'),
    *_fused_attention('token_causal_attn', 'self_attn'),
    *_norm('norm1'),
    *_cross_attention('token_cross_attn', 'cross_attn'),
    *_norm('norm2'),
    *_mlp(),
  ]
  return [*_norm('ln_vision'), *_nested('blocks.{i}.', 'blocks/', block), *_norm('norm')]


def codes_rules() -> list[NameRule]:
  """Selector and quantizer: what `DynamicTokenizer` has beside the merger."""
  selector = [
    *_norm('in_conv.0', 'norm'),
    *_linear('in_conv.1', 'fc_in'),
    *_linear('out_conv.0', 'fc1'),
    *_linear('out_conv.2', 'fc2'),
    *_linear('out_conv.4', 'fc_out'),
  ]
  return [
    *_nested('token_predictor.', 'selector/', selector),
    *_linear('encode_task_layer.0', 'quantizer/fc1'),
    *_linear('encode_task_layer.2', 'quantizer/fc2'),
    NameRule('quantize.embedding.weight', 'quantizer/embedding'),
  ]


# --- Layers ----------------------------------------------------------------------------------


def _linear(name: str, leaf: str | None = None) -> list[NameRule]:
  """A Linear of torch is a Dense of Flax."""
  leaf = leaf or name.replace('.', '/')
  return [
    NameRule(f'{name}.weight', f'{leaf}/kernel', 'linear'),
    NameRule(f'{name}.bias', f'{leaf}/bias'),
  ]


def _norm(name: str, leaf: str | None = None) -> list[NameRule]:
  """A LayerNorm."""
  leaf = leaf or name.replace('.', '/')
  return [NameRule(f'{name}.weight', f'{leaf}/scale'), NameRule(f'{name}.bias', f'{leaf}/bias')]


def _mlp() -> list[NameRule]:
  return [*_linear('mlp.fc1'), *_linear('mlp.fc2')]


def _fused_attention(name: str, leaf: str | None = None) -> list[NameRule]:
  """Self-attention with one projection for query, key and value."""
  leaf = leaf or name
  return [
    NameRule(f'{name}.qkv.weight', f'{leaf}/qkv/kernel', 'qkv'),
    NameRule(f'{name}.qkv.bias', f'{leaf}/qkv/bias', 'qkv_bias'),
    *_linear(f'{name}.proj', f'{leaf}/proj'),
  ]


def _cross_attention(name: str, leaf: str | None = None) -> list[NameRule]:
  """Cross-attention with a projection each for query, key and value."""
  leaf = leaf or name
  return [
    *_linear(f'{name}.query', f'{leaf}/query'),
    *_linear(f'{name}.key', f'{leaf}/key'),
    *_linear(f'{name}.value', f'{leaf}/value'),
    *_linear(f'{name}.proj', f'{leaf}/proj'),
  ]


# --- Rules from rules ------------------------------------------------------------------------


def _nested(name: str, leaf: str, rules: list[NameRule]) -> list[NameRule]:
  """Rules one level down on both sides: with these prefixes."""
  return [rule._replace(name=f'{name}{rule.name}', leaf=f'{leaf}{rule.leaf}') for rule in rules]


def _optional(rules: list[NameRule]) -> list[NameRule]:
  """Rules that a file may lack."""
  return [rule._replace(optional=True) for rule in rules]


def _of_other_module(rules: list[NameRule]) -> list[NameRule]:
  """Names that the file may hold for another module."""
  return [rule._replace(leaf=None) for rule in rules]
