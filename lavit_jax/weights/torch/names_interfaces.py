"""Name rules of the visual interfaces: the files of LLaVA, OpenFlamingo and Emu.

Each function gives the names of one module in one published form: that of the authors, or that of
transformers. Those of BLIP-2 are in names_blip2.py.
"""

from __future__ import annotations

from lavit_jax.weights.torch.name_rules import NameRule
from lavit_jax.weights.torch.names_llama import llama_rules
from lavit_jax.weights.torch.names_visual import clip_rules, vit_rules
from lavit_jax.weights.torch.rule_builders import (
  linear_rules,
  nested_rules,
  norm_rules,
)

# --- LLaVA -----------------------------------------------------------------------------------

LLAVA_TOWERS = (  # what is before the names of `clip_rules`
  'model.vision_tower.vision_tower.vision_model.',  # LLaVA's own files, where they hold the tower
  'vision_tower.vision_model.',  # transformers 4
  'vision_tower.',  # transformers 5
)


def llava_linear_rules() -> list[NameRule]:
  """`LinearProjection` in LLaVA v1 (`mm_projector.bin`, or the whole model)."""
  return linear_rules('model.mm_projector', 'vit_proj')


def llava_mlp_rules() -> list[NameRule]:
  """`MlpProjection` in LLaVA v1.5."""
  return [
    *linear_rules('model.mm_projector.0', 'fc1'),
    *linear_rules('model.mm_projector.2', 'fc2'),
  ]


def llava_transformers_rules() -> list[NameRule]:
  """`MlpProjection` in the files of transformers' LlavaForConditionalGeneration."""
  return [
    *linear_rules('multi_modal_projector.linear_1', 'fc1'),
    *linear_rules('multi_modal_projector.linear_2', 'fc2'),
  ]


def llava_tower_rules(prefix: str) -> list[NameRule]:
  """`ClipViT` of a LLaVA file, by one of `LLAVA_TOWERS`."""
  return nested_rules(prefix, '', clip_rules())


# --- OpenFlamingo ----------------------------------------------------------------------------

FLAMINGO_LAYERS = (  # where a language model has its layers
  'transformer.blocks',
  'gpt_neox.layers',
  'model.layers',
  'model.decoder.layers',
)


def resampler_rules() -> list[NameRule]:
  """`PerceiverResampler` in OpenFlamingo's `checkpoint.pt`."""
  attention = [
    *norm_rules('norm_media', 'media_norm'),
    *norm_rules('norm_latents', 'latent_norm'),
    *_perceiver_projections(''),
  ]
  return [
    NameRule('perceiver.latents', 'latents'),
    *nested_rules('perceiver.layers.{i}.0.', 'blocks/', attention),
    *nested_rules('perceiver.layers.{i}.1.', 'blocks/mlp/', _feed_forward()),
    *norm_rules('perceiver.norm', 'norm'),
  ]


def resampler_sequence_rules() -> list[NameRule]:
  """`ResamplerInterface`: OpenFlamingo's names, and LLaVA's for the Linear into the sequence."""
  return [
    *nested_rules('', 'resampler/', resampler_rules()),
    *linear_rules('model.mm_projector', 'vit_proj'),
  ]


def gated_rules(layers: str, every: int) -> list[NameRule]:
  """`GatedLayers` in OpenFlamingo's `checkpoint.pt`.

  Args:
    layers: one of `FLAMINGO_LAYERS`.
    every: each gated layer stands before the last of this many layers.
  """
  number = f'{{{every}i+{every - 1}}}'
  block = [
    NameRule('attn_gate', 'attn_gate'),
    NameRule('ff_gate', 'ff_gate'),
    *norm_rules('attn.norm', 'norm'),
    *_perceiver_projections('attn.'),
    *nested_rules('ff.', 'mlp/', _feed_forward()),
  ]
  return nested_rules(f'lang_encoder.{layers}.{number}.gated_cross_attn_layer.', 'blocks/', block)


def _perceiver_projections(prefix: str) -> list[NameRule]:
  return [
    NameRule(f'{prefix}to_q.weight', 'query/kernel', 'linear'),
    NameRule(f'{prefix}to_kv.weight', 'kv/kernel', 'kv'),
    NameRule(f'{prefix}to_out.weight', 'proj/kernel', 'linear'),
  ]


def _feed_forward() -> list[NameRule]:
  return [
    *norm_rules('0', 'norm'),
    NameRule('1.weight', 'fc1/kernel', 'linear'),
    NameRule('3.weight', 'fc2/kernel', 'linear'),
  ]


# --- Emu -------------------------------------------------------------------------------------


def emu_rules() -> list[NameRule]:
  """`EmuInterface` in Emu's file."""
  block = []
  attentions = (('SelfAttention', 'self'), ('EncDecAttention', 'cross'))
  for number, (name, leaf) in enumerate(attentions):
    for short, projection in zip('qkvo', ('query', 'key', 'value', 'proj'), strict=True):
      block.append(
        NameRule(f'{number}.{name}.{short}.weight', f'{leaf}_attn/{projection}/kernel', 'linear')
      )
    block.append(NameRule(f'{number}.layer_norm.weight', f'{leaf}_norm/scale'))
  block += [
    NameRule('2.DenseReluDense.wi.weight', 'fc1/kernel', 'linear'),
    NameRule('2.DenseReluDense.wo.weight', 'fc2/kernel', 'linear'),
    NameRule('2.layer_norm.weight', 'mlp_norm/scale'),
  ]
  decoder = 'cformer.cformer.'
  return [
    *norm_rules('ln_visual'),
    NameRule('cformer.causal_tokens', 'transformer/tokens', 'unbatch'),
    *nested_rules(f'{decoder}block.{{i}}.layer.', 'transformer/blocks/', block),
    NameRule(
      f'{decoder}block.0.layer.0.SelfAttention.relative_attention_bias.weight',
      'transformer/relative_bias',
    ),
    NameRule(f'{decoder}final_layer_norm.weight', 'transformer/norm/scale'),
    *linear_rules('cformer.projection', 'vit_proj'),
    NameRule('decoder.lm.stu_regress_head.weight', 'head/kernel', 'linear'),
  ]


def emu_llama_rules() -> list[NameRule]:
  """`Llama` in Emu's file."""
  return nested_rules('decoder.lm.', '', llama_rules())


def emu_tower_rules() -> list[NameRule]:
  """`ViT` in Emu's file."""
  return nested_rules('visual.', '', vit_rules())
