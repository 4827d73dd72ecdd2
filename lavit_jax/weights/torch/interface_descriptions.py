"""The `config.json` by which transformers loads a model with another system's interface."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lavit_jax.models import lavit
from lavit_jax.models.clip_vit import ClipViT
from lavit_jax.models.interfaces.qformer import QFormerInterface
from lavit_jax.weights.torch.descriptions import llama_config


def interface_config(
  form: str, model: lavit.LavitModules, modules: Collection[str], vocab_size: int
) -> dict[str, Any]:
  """The config of a folder in a form; {} if transformers cannot load it.

  Args:
    form: see interface_files.py.
    model: with the settings of the result.
    modules: that the checkpoint has: an image encoder and a language model are needed.
    vocab_size: rows of the language model's embedding.
  """
  if not {'vit', 'interface', 'llama'} <= set(modules):
    return {}
  if form == 'llava_transformers':
    return _llava_config(model, vocab_size)
  if form == 'blip2_transformers':
    return _blip2_config(model, vocab_size)
  return {}


def _llava_config(model: lavit.LavitModules, vocab_size: int) -> dict[str, Any]:
  """The config of transformers' LlavaForConditionalGeneration; [IMG] marks the image's slots."""
  encoder = model.vit
  assert isinstance(encoder, ClipViT)
  vision = dict(
    model_type='clip_vision_model',
    hidden_size=encoder.hidden_size,
    intermediate_size=encoder.mlp_dim,
    num_hidden_layers=encoder.num_layers,
    num_attention_heads=encoder.num_heads,
    image_size=encoder.image_size,
    patch_size=encoder.patch_size,
    hidden_act='quick_gelu',
    layer_norm_eps=1e-5,
  )
  return dict(
    architectures=['LlavaForConditionalGeneration'],
    model_type='llava',
    vision_config=vision,
    text_config=llama_config(model.llama, vocab_size),
    image_token_index=min(model.vocabulary.image_start, vocab_size - 1),
    image_seq_length=encoder.num_patches,
    projector_hidden_act='gelu',
    vision_feature_layer=-1 - model.tower.cut,
    vision_feature_select_strategy='default',
    multimodal_projector_bias=True,
    tie_word_embeddings=False,
  )


def _blip2_config(model: lavit.LavitModules, vocab_size: int) -> dict[str, Any]:
  """The config of transformers' Blip2ForConditionalGeneration with a LLaMA."""
  encoder = model.vit
  interface = model.interface
  assert isinstance(interface, QFormerInterface)
  vision = dict(
    model_type='blip_2_vision_model',
    hidden_size=encoder.hidden_size,
    intermediate_size=encoder.mlp_dim,
    num_hidden_layers=encoder.num_layers,
    num_attention_heads=encoder.num_heads,
    image_size=encoder.image_size,
    patch_size=encoder.patch_size,
    hidden_act='gelu',
    layer_norm_eps=1e-6,
    qkv_bias=True,
  )
  qformer = dict(
    model_type='blip_2_qformer',
    hidden_size=interface.hidden_size,
    intermediate_size=interface.mlp_dim,
    num_hidden_layers=interface.num_layers,
    num_attention_heads=interface.num_heads,
    encoder_hidden_size=encoder.hidden_size,
    cross_attention_frequency=2,
    hidden_act='gelu',
    layer_norm_eps=1e-12,
  )
  return dict(
    architectures=['Blip2ForConditionalGeneration'],
    model_type='blip-2',
    vision_config=vision,
    qformer_config=qformer,
    text_config=llama_config(model.llama, vocab_size),
    num_query_tokens=interface.num_queries,
    image_token_index=min(model.vocabulary.image_start, vocab_size - 1),
    use_decoder_only_language_model=True,
    tie_word_embeddings=False,
  )
