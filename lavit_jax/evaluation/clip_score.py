"""How well an image fits a text: the cosine of their CLIP embeddings (Hessel et al. 2021)."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.errors import UserError
from lavit_jax.models import vit
from lavit_jax.models.clip_text import ClipTextEncoder
from lavit_jax.models.clip_vit import ClipViT
from lavit_jax.models.safety_checker import center_square
from lavit_jax.weights.torch import files
from lavit_jax.weights.torch.mapping import from_state_dict
from lavit_jax.weights.torch.name_rules import NameRule
from lavit_jax.weights.torch.names_visual import clip_rules, clip_text_rules
from lavit_jax.weights.torch.rule_builders import nested_rules


class ClipModules(nn.Module):
  """CLIP: both encoders, each with its projection to the common space of width P."""

  image_encoder: ClipViT
  text_encoder: ClipTextEncoder
  output_dim: int

  def setup(self):
    """Makes the projections."""
    self.image_proj = nn.Dense(self.output_dim, use_bias=False)
    self.text_proj = nn.Dense(self.output_dim, use_bias=False)

  def embed_images(self, images: Array) -> Array:
    """uint8[B, H, W, 3] -> f32[B, P], of length 1."""
    squares = center_square(images, self.image_encoder.image_size)
    cls = self.image_encoder(vit.preprocess(squares))[:, 0]
    return _unit(self.image_proj(self.image_encoder.final_norm(cls)))

  def embed_texts(self, ids: Array, ends: Array) -> Array:
    """Token ids i32[B, S] and the positions i32[B] of their end tokens -> f32[B, P]."""
    return _unit(self.text_proj(self.text_encoder(ids, ends)))

  def __call__(self, images: Array, ids: Array, ends: Array) -> Array:
    """The cosine f32[B] of each image and its text."""
    return (self.embed_images(images) * self.embed_texts(ids, ends)).sum(-1)


def _unit(x: Array) -> Array:
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


RULES = [
  *nested_rules('vision_model.', 'image_encoder/', clip_rules()),
  *nested_rules('text_model.', 'text_encoder/', clip_text_rules()),
  NameRule('visual_projection.weight', 'image_proj/kernel', 'linear'),
  NameRule('text_projection.weight', 'text_proj/kernel', 'linear'),
  NameRule('logit_scale', None),
]


class ClipScorer:
  """A CLIP of transformers, such as openai/clip-vit-large-patch14."""

  def __init__(self, folder: str | os.PathLike):
    """Reads a folder with `config.json`, weights and tokenizer.

    Raises:
      UserError: the folder is no such CLIP, or lacks a file.
    """
    from transformers import AutoTokenizer, CLIPConfig

    folder = pathlib.Path(folder)
    for names in (('config.json',), ('tokenizer.json', 'merges.txt')):
      if not any((folder / name).is_file() for name in names):
        raise UserError(f'{folder} has no {" or ".join(names)}; name the folder of a CLIPModel')
    config: Any = CLIPConfig.from_pretrained(folder)
    image = config.vision_config
    text = config.text_config
    for part in (image, text):
      if part.hidden_act != 'quick_gelu':
        raise UserError(
          f'{folder} has hidden_act={part.hidden_act!r}, and only quick_gelu is computed here; '
          "take one of OpenAI's CLIP models"
        )
    self.modules = ClipModules(
      ClipViT(
        image.image_size,
        image.patch_size,
        image.hidden_size,
        image.num_hidden_layers,
        image.num_attention_heads,
        image.intermediate_size,
      ),
      ClipTextEncoder(
        text.vocab_size,
        text.max_position_embeddings,
        text.hidden_size,
        text.num_hidden_layers,
        text.num_attention_heads,
        text.intermediate_size,
      ),
      config.projection_dim,
    )
    self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    self.max_length = text.max_position_embeddings
    ids = jnp.zeros((1, self.max_length), jnp.int32)
    images = jnp.zeros((1, image.image_size, image.image_size, 3), jnp.uint8)
    like = jax.eval_shape(self.modules.init, jax.random.key(0), images, ids, ids[:, 0])['params']
    self.params = jax.tree.map(jnp.asarray, from_state_dict(RULES, files.load(folder), like))
    self._score = jax.jit(self.modules.apply)

  def score(self, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """The cosine of each image uint8[B, H, W, 3] and its text, f32[B]; texts are cut at the end."""
    tokens = self.tokenizer(
      list(texts),
      padding='max_length',
      truncation=True,
      max_length=self.max_length,
      return_tensors='np',
    )
    ends = tokens['attention_mask'].sum(1) - 1
    return np.asarray(self._score({'params': self.params}, images, tokens['input_ids'], ends))
