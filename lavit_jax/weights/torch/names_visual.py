"""Names of the published visual files (specification, Checkpoint layout) <-> leaves of the ViT, the tokenizer, the decoders and the safety checker."""

from lavit_jax.weights.torch.mapping import NameRule


def vit_rules() -> list[NameRule]:
  """`eva_vitg_psz14`; its norm and head serve only `ViT.pooled` and may be absent."""
  block = [
    *norm('norm1'),
    NameRule('attn.q_bias', 'attn/q_bias'),
    NameRule('attn.v_bias', 'attn/v_bias'),
    NameRule('attn.qkv.weight', 'attn/qkv/kernel', 'qkv'),
    *linear('attn.proj'),
    *norm('norm2'),
    *mlp(),
  ]
  return [
    NameRule('cls_token', 'cls_token', 'unbatch'),
    NameRule('pos_embed', 'pos_embed', 'unbatch'),
    NameRule('patch_embed.proj.weight', 'patch_embed/kernel', 'conv'),
    NameRule('patch_embed.proj.bias', 'patch_embed/bias'),
    *under('blocks.{i}.', 'blocks/', block),
    *optional([*norm('norm'), *linear('head')]),
  ]


def tokenizer_rules() -> list[NameRule]:
  """`DynamicTokenizer` in `tokenizer_encoder`; a `vit_proj` there belongs to `Understanding`."""
  return [
    *codes_rules(),
    *under('causal_encoder.', 'merger/', merger_rules()),
    *elsewhere(linear('vit_proj')),
  ]


def understanding_rules() -> list[NameRule]:
  """`Understanding` in `tokenizer_encoder` overlaid by `visual_weight`; the rest there belongs to `DynamicTokenizer`."""
  return [
    *under('causal_encoder.', 'merger/', merger_rules()),
    *linear('vit_proj'),
    *elsewhere(codes_rules()),
  ]


def decoder_rules(num_contexts: int) -> list[NameRule]:
  """`tokenizer_decoder` (one context head) or `highres_tokenizer_decoder` (two, and the pool)."""
  block = [
    *norm('norm0'),
    *fused('self_attn'),
    *norm('norm1'),
    *cross('cross_attn'),
    *norm('norm2'),
    *mlp(),
  ]
  trunk = [
    NameRule('pos_embed', 'pos_embed', 'unbatch'),
    NameRule('query_embed', 'query_embed', 'unbatch'),
    *linear('in_proj'),
    *under('blocks.{i}.', 'blocks/', block),
    *norm('norm'),
    *linear('decode_task_layer.0', 'fc1'),
    *linear('decode_task_layer.2', 'fc2'),
  ]
  if num_contexts == 1:
    return [*trunk, *linear('unet_proj', 'context_proj_0')]
  heads = [
    row for n in range(num_contexts) for row in linear(f'unet_proj_{n + 1}', f'context_proj_{n}')
  ]
  pool = [
    NameRule('positional_embedding', 'pos_embed'),
    *linear('q_proj', 'query'),
    *linear('k_proj', 'key'),
    *linear('v_proj', 'value'),
    *linear('c_proj', 'proj'),
  ]
  return [*trunk, *heads, *under('unet_attnpool.', 'pool/', pool)]


def safety_rules(nested: bool = True) -> list[NameRule]:
  """The safety checker; up to version 4 transformers' image encoder was a module within a module (`nested`). The buffer of positions is computed here."""
  encoder = 'vision_model.vision_model.' if nested else 'vision_model.'
  attention = [
    row
    for theirs, ours in (('q', 'query'), ('k', 'key'), ('v', 'value'), ('out', 'proj'))
    for row in linear(f'self_attn.{theirs}_proj', f'attn/{ours}')
  ]
  block = [*norm('layer_norm1', 'norm1'), *attention, *norm('layer_norm2', 'norm2'), *mlp()]
  return [
    NameRule(f'{encoder}embeddings.class_embedding', 'cls_token'),
    NameRule(f'{encoder}embeddings.position_embedding.weight', 'pos_embed'),
    NameRule(f'{encoder}embeddings.patch_embedding.weight', 'patch_embed/kernel', 'conv'),
    NameRule(f'{encoder}embeddings.position_ids', None),
    *norm(f'{encoder}pre_layrnorm', 'norm_in'),
    *under(f'{encoder}encoder.layers.{{i}}.', 'blocks/', block),
    *norm(f'{encoder}post_layernorm', 'norm'),
    NameRule('visual_projection.weight', 'proj/kernel', 'linear'),
    NameRule('concept_embeds', 'concepts'),
    NameRule('concept_embeds_weights', 'concepts_thresholds'),
    NameRule('special_care_embeds', 'special'),
    NameRule('special_care_embeds_weights', 'special_thresholds'),
  ]


def merger_rules() -> list[NameRule]:
  """The merger, called `causal_encoder` in every file that holds one."""
  block = [
    *norm('norm0'),
    *fused('token_causal_attn', 'self_attn'),
    *norm('norm1'),
    *cross('token_cross_attn', 'cross_attn'),
    *norm('norm2'),
    *mlp(),
  ]
  return [*norm('ln_vision'), *under('blocks.{i}.', 'blocks/', block), *norm('norm')]


def codes_rules() -> list[NameRule]:
  """Selector and quantizer: what `DynamicTokenizer` has beside the merger."""
  selector = [
    *norm('in_conv.0', 'norm'),
    *linear('in_conv.1', 'fc_in'),
    *linear('out_conv.0', 'fc1'),
    *linear('out_conv.2', 'fc2'),
    *linear('out_conv.4', 'fc_out'),
  ]
  return [
    *under('token_predictor.', 'selector/', selector),
    *linear('encode_task_layer.0', 'quantizer/fc1'),
    *linear('encode_task_layer.2', 'quantizer/fc2'),
    NameRule('quantize.embedding.weight', 'quantizer/embedding'),
  ]


def linear(name: str, leaf: str | None = None) -> list[NameRule]:
  """A torch Linear is a Dense."""
  leaf = leaf or name.replace('.', '/')
  return [
    NameRule(f'{name}.weight', f'{leaf}/kernel', 'linear'),
    NameRule(f'{name}.bias', f'{leaf}/bias'),
  ]


def norm(name: str, leaf: str | None = None) -> list[NameRule]:
  """A torch LayerNorm is a LayerNorm."""
  leaf = leaf or name.replace('.', '/')
  return [NameRule(f'{name}.weight', f'{leaf}/scale'), NameRule(f'{name}.bias', f'{leaf}/bias')]


def mlp() -> list[NameRule]:
  """fc1, fc2 under the same names on both sides."""
  return [*linear('mlp.fc1'), *linear('mlp.fc2')]


def fused(name: str, leaf: str | None = None) -> list[NameRule]:
  """Self-attention with fused q, k, v."""
  leaf = leaf or name
  return [
    NameRule(f'{name}.qkv.weight', f'{leaf}/qkv/kernel', 'qkv'),
    NameRule(f'{name}.qkv.bias', f'{leaf}/qkv/bias', 'qkv_bias'),
    *linear(f'{name}.proj', f'{leaf}/proj'),
  ]


def cross(name: str, leaf: str | None = None) -> list[NameRule]:
  """Cross-attention with projections of its own for query, key and value."""
  return [
    row
    for part in ('query', 'key', 'value', 'proj')
    for row in linear(f'{name}.{part}', f'{leaf or name}/{part}')
  ]


def under(name: str, leaf: str, rows: list[NameRule]) -> list[NameRule]:
  """Rows one level down on both sides."""
  return [row._replace(name=name + row.name, leaf=leaf + row.leaf) for row in rows]


def optional(rows: list[NameRule]) -> list[NameRule]:
  """Rows that a file may lack."""
  return [row._replace(optional=True) for row in rows]


def elsewhere(rows: list[NameRule]) -> list[NameRule]:
  """Names that the file may hold for another part of the model."""
  return [row._replace(leaf=None) for row in rows]
