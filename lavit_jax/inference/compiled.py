"""The compiled programs between images, text and codes; images are decoded by image_decoder.py.

Each takes the modules, which are static, and the parameters of the modules that it needs.

Axes: B images or rows, N patches, D width of the image encoder, H hidden size of the language
model, S prompt length.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.inference import beam_search as searching
from lavit_jax.inference import decode, faults
from lavit_jax.models import sequence, vit
from lavit_jax.models.interfaces import emu_regression
from lavit_jax.models.interfaces.base import RowImages
from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.llama import ExtraLayers, KVCache, unroll_layers
from lavit_jax.models.selector import gumbel_keep

Params = dict[str, Any]


@functools.partial(jax.jit, static_argnums=0)
def read(
  modules: LavitModules, params: Params, images: Array, keys: Array | None
) -> tuple[Array, Array]:
  """Encodes images for the language model.

  Args:
    modules: the modules.
    params: of 'vit', 'tokenizer' and 'understanding'.
    images: uint8[B, H, W, 3], of the size of the image encoder.
    keys: keys[B] by which patches are sampled; None keeps the most probable ones.

  Returns:
    Features [B, N, H], those of the kept patches in a prefix, and their number i32[B]. If a
    module's result is not finite for an image, the number is the negative fault (faults.py).
  """
  patches, keep, finite = _select_patches(modules, params, images, keys)
  understood = _apply(modules.understanding, params['understanding'], patches, keep)
  features, mask = sequence.compact(understood, keep)
  fault = faults.first_fault(('vit', patches), ('tokenizer', finite), ('understanding', features))
  return features, jnp.where(fault > 0, -fault, mask.sum(-1))


@functools.partial(jax.jit, static_argnums=0)
def read_by_interface(
  modules: LavitModules, params: Params, images: Array, keys: Array | None
) -> tuple[Array, Array]:
  """Encodes images for the language model by another interface than LaVIT's (models/interfaces).

  Args:
    modules: the modules.
    params: of 'vit' and 'interface'.
    images: uint8[B, H, W, 3], of the size of the image encoder.
    keys: not used, for nothing is sampled.

  Returns:
    Vectors [B, n, H] and their number i32[B], as `read`.
  """
  del keys
  assert modules.interface is not None
  features = modules.tower.features(params['vit'], images)
  tokens = _apply(modules.interface, params['interface'], features)
  fault = faults.first_fault(('vit', features), ('interface', tokens.vectors))
  return tokens.vectors, jnp.where(fault > 0, -fault, tokens.lengths)


@functools.partial(jax.jit, static_argnums=0)
def extra_layers(modules: LavitModules, params: Params, vectors: Array, mask: Array) -> ExtraLayers:
  """The layers of a `LayeredInterface`, for prompts that begin with their one image.

  Args:
    modules: the modules.
    params: of 'interface'.
    vectors: [B, n, W], of each prompt's image.
    mask: bool[B, S], False in the padding of the prompts.
  """
  assert modules.layered_interface is not None
  images = RowImages(vectors[:, None], jnp.where(mask, 0, -1))
  return modules.layered_interface.extra_layers(params['interface'], images)


@functools.partial(jax.jit, static_argnums=0)
def tokenize(
  modules: LavitModules, params: Params, images: Array, keys: Array | None
) -> tuple[Array, Array]:
  """Tokenizes images.

  Args:
    modules: the modules.
    params: of 'vit' and 'tokenizer'.
    images: uint8[B, H, W, 3], of the size of the image encoder.
    keys: keys[B] by which patches are sampled; None keeps the most probable ones.

  Returns:
    The code i32[B, N] of each patch, and bool[B, N], the patches that are kept. If a module's
    result is not finite for an image, its codes are the negative fault (faults.py).
  """
  patches, keep, finite = _select_patches(modules, params, images, keys)
  merged = _apply(modules.tokenizer, params['tokenizer'], patches, keep, method='merge')
  ids, _ = _apply(modules.tokenizer, params['tokenizer'], merged, method='quantize')
  fault = faults.first_fault(('vit', patches), ('tokenizer', finite), ('tokenizer', merged))
  fault = fault[:, None]
  return jnp.where(fault > 0, -fault, ids), keep > 0.5


@functools.partial(jax.jit, static_argnums=0)
def select(modules: LavitModules, params: Params, images: Array) -> tuple[Array, Array]:
  """Runs the selector without sampling.

  Args:
    modules: the modules.
    params: of 'vit' and 'tokenizer'.
    images: uint8[B, H, W, 3], of the size of the image encoder.

  Returns:
    The probability f32[B, N] that each patch is kept, and bool[B, N], the most probable patches. If
    a module's result is not finite for an image, its probabilities are the negative fault
    (faults.py).
  """
  patches, log_probs, finite = _score_patches(modules, params, images)
  fault = faults.first_fault(('vit', patches), ('tokenizer', finite))[:, None]
  probabilities = jnp.exp(log_probs[..., 0].astype(jnp.float32))
  return jnp.where(fault > 0, -fault, probabilities), gumbel_keep(log_probs) > 0.5


@functools.partial(jax.jit, static_argnums=0, static_argnames='cache_dtype')
def regress(
  modules: LavitModules,
  params: Params,
  embeddings: Array,
  mask: Array,
  *,
  cache_dtype: str | None,
) -> tuple[Array, Array]:
  """Draws an image for each prompt as n vectors, one after the other, each of them fed back.

  Args:
    modules: the modules, with a `RegressingInterface`.
    params: of 'llama' and 'interface'.
    embeddings: [B, S, H], left-padded prompts, each of which ends with [IMG].
    mask: bool[B, S], False in the padding.
    cache_dtype: as in `decode.generate`.

  Returns:
    Vectors f32[B, n, H], and the fault i32[B] of each row (faults.py).
  """
  assert modules.regressing_interface is not None
  llama, llama_params = unroll_layers(modules.llama, params['llama'])
  head = functools.partial(_apply, modules.interface, params['interface'], method='regress')
  new_slots = modules.num_image_vectors - 1  # nothing follows the last vector
  hidden, cache = decode.read_prompts(llama, llama_params, embeddings, mask, new_slots, cache_dtype)

  def step(cache: KVCache, vectors: Array) -> tuple[KVCache, Array]:
    number = cache.length - mask.shape[1]
    read = jnp.broadcast_to(jnp.arange(new_slots) <= number, (len(mask), new_slots))
    visible = jnp.concatenate([mask, read], axis=1)[:, None, None]
    positions = (mask.sum(1) + number)[:, None]
    hidden, cache = _apply(llama, llama_params, vectors[:, None], positions, visible, cache)
    return cache, hidden[:, 0]

  vectors, _ = emu_regression.regress(step, cache, hidden, head, modules.num_image_vectors)
  return vectors, faults.first_fault(('llama', vectors))


@functools.partial(jax.jit, static_argnums=0)
def embed(modules: LavitModules, params: Params, ids: Array) -> Array:
  """Embeds ids i32[B, S] of text and codes as [B, S, H]; `params` of 'llama'."""
  return _apply(modules.llama, params['llama'], ids, method='embed')


def generate(
  modules: LavitModules, params: Params, *args: Any, **kwargs: Any
) -> decode.GenerateOutput:
  """Runs `decode.generate` with the language model."""
  return decode.generate(modules.llama, params['llama'], *args, **kwargs)


def beam_search(
  modules: LavitModules, params: Params, *args: Any, **kwargs: Any
) -> decode.GenerateOutput:
  """Runs `beam_search.beam_search` with the language model."""
  return searching.beam_search(modules.llama, params['llama'], *args, **kwargs)


def _select_patches(
  modules: LavitModules, params: Params, images: Array, keys: Array | None
) -> tuple[Array, Array, Array]:
  """Encodes images, and selects the patches that become tokens.

  Returns:
    Patch features [B, N, D], keep f32[B, N], and bool[B], whether the selector's probabilities are
    numbers.
  """
  patches, log_probs, finite = _score_patches(modules, params, images)
  if keys is None:
    return patches, gumbel_keep(log_probs), finite

  def keep_of(image_log_probs: Array, key: Array) -> Array:
    return gumbel_keep(image_log_probs[None], key=key)[0]

  return patches, jax.vmap(keep_of)(log_probs, keys), finite


def _score_patches(
  modules: LavitModules, params: Params, images: Array
) -> tuple[Array, Array, Array]:
  """Encodes images, and scores their patches.

  Returns:
    Patch features [B, N, D], log-probabilities [B, N, 2] of keeping and dropping a patch, and
    bool[B], whether these are numbers.
  """
  encoded = _apply(modules.vit, params['vit'], vit.preprocess(images))
  patches = encoded[:, 1:]  # without the class token
  log_probs = _apply(modules.tokenizer, params['tokenizer'], patches, method='select')
  finite = ~jnp.isnan(log_probs).any(tuple(range(1, log_probs.ndim)))
  return patches, log_probs, finite


def _apply(module: Any, params: Params, *args: Any, **kwargs: Any) -> Any:
  return module.apply({'params': params}, *args, **kwargs)
