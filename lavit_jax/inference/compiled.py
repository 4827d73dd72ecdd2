"""The compiled programs between pictures, words and codes; drawing has its own room (image_generation.py).

Each takes the model, which is static, and the parameters that it needs by the names of their parts.

Axes: B images, N patches, H width of the language model, S prompt slots.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.inference import decode, faults
from lavit_jax.models import lavit, sequence, vit
from lavit_jax.models.tokenizer import gumbel_keep


@functools.partial(jax.jit, static_argnums=0)
def read(
  model: lavit.LavitModules, parts: dict, images: Array, keys: Array | None
) -> tuple[Array, Array]:
  """uint8[B, H, W, 3] -> what the language model reads: features compacted to a prefix [B, N, H], and their number i32[B].

  Of a picture for which a module's result is not finite, the number is that of the fault (faults.py), negative.
  """
  x, keep, sound = _select(model, parts, images, keys)
  features, mask = sequence.compact(
    _apply(model.understanding, parts['understanding'], x, keep), keep
  )
  fault = faults.first_fault(('vit', x), ('tokenizer', sound), ('understanding', features))
  return features, jnp.where(fault > 0, -fault, mask.sum(-1))


@functools.partial(jax.jit, static_argnums=0)
def tokenize(
  model: lavit.LavitModules, parts: dict, images: Array, keys: Array | None
) -> tuple[Array, Array]:
  """uint8[B, H, W, 3] -> codes i32[B, N] in the place of their patches, and keep bool[B, N].

  Of a picture for which a module's result is not finite, the codes are the number of the fault (faults.py), negative.
  """
  x, keep, sound = _select(model, parts, images, keys)
  merged = _apply(model.tokenizer, parts['tokenizer'], x, keep, method='merge')
  ids, _ = _apply(model.tokenizer, parts['tokenizer'], merged, method='quantize')
  fault = faults.first_fault(('vit', x), ('tokenizer', sound), ('tokenizer', merged))[:, None]
  return jnp.where(fault > 0, -fault, ids), keep > 0.5


@functools.partial(jax.jit, static_argnums=0)
def embed(model: lavit.LavitModules, parts: dict, ids: Array) -> Array:
  """Words and codes, ids i32[B, S] -> embeddings [B, S, H]."""
  return _apply(model.llama, parts['llama'], ids, method='embed')


def generate(model: lavit.LavitModules, parts: dict, *args, **kwargs) -> decode.GenerateOutput:
  """`decode.generate` by the language model."""
  return decode.generate(model.llama, parts['llama'], *args, **kwargs)


def beam_search(model: lavit.LavitModules, parts: dict, *args, **kwargs) -> decode.GenerateOutput:
  """`decode.beam_search` by the language model."""
  return decode.beam_search(model.llama, parts['llama'], *args, **kwargs)


def _select(
  model: lavit.LavitModules, parts: dict, images: Array, keys: Array | None
) -> tuple[Array, Array, Array]:
  """uint8[B, H, W, 3] -> patch features [B, N, D], keep f32[B, N], and whether the choice had numbers to go by, bool[B].

  Patches are sampled with keys [B]; without, the most probable ones are kept.
  """
  x = _apply(model.vit, parts['vit'], vit.preprocess(images))[:, 1:]
  log_probs = _apply(model.tokenizer, parts['tokenizer'], x, method='select')
  sound = ~jnp.isnan(log_probs).any(tuple(range(1, log_probs.ndim)))
  if keys is None:
    return x, gumbel_keep(log_probs), sound
  return x, jax.vmap(lambda row, key: gumbel_keep(row[None], key=key)[0])(log_probs, keys), sound


def _apply(module, params, *args, **kwargs):
  return module.apply({'params': params}, *args, **kwargs)
