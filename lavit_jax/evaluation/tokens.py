"""Measures what visual tokens tell about an image: codebook usage, and rebuilt features.

Axes: B images, N patches, D feature width.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.data.images import read_images
from lavit_jax.inference.outputs import VisualTokens
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.models import vit
from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.quantizer import l2_normalize


def codebook_usage(tokens: VisualTokens, codebook_size: int) -> dict[str, float]:
  """Measures how many tokens images have, and how evenly they use the codebook.

  Returns:
    tokens: mean number of tokens of an image.
    distinct: mean number of different codes among the tokens of an image.
    codes: number of codes in use.
    code_share: the same as a fraction of the codebook.
    perplexity: of the frequencies of the codes.
  """
  counts = np.bincount(np.concatenate(tokens.ids), minlength=codebook_size)
  frequencies = counts[counts > 0] / counts.sum()
  num_codes = len(frequencies)
  return {
    'tokens': float(tokens.counts.mean()),
    'distinct': float(np.mean([len(np.unique(ids)) for ids in tokens.ids])),
    'codes': num_codes,
    'code_share': num_codes / codebook_size,
    'perplexity': float(np.exp(-(frequencies * np.log(frequencies)).sum())),
  }


def features(model: Lavit, images: np.ndarray) -> np.ndarray:
  """Returns the patch features f32[B, N, D] of images uint8[B, H, W, 3]."""
  return model.run_batches(_patch_features, ('vit',), read_images(images, model.modules.image_size))


def rebuilt_features(model: Lavit, tokens: VisualTokens) -> np.ndarray:
  """Returns the features f32[B, N, D] that the decoder rebuilds from the tokens alone."""
  return model.run_batches(_decode_features, ('tokenizer', 'decoder'), *model.pad_codes(tokens.ids))


def mean_cosine(x: np.ndarray, y: np.ndarray) -> float:
  """Returns the mean cosine similarity of vectors [..., D]; y may broadcast."""
  products = l2_normalize(jnp.asarray(x)) * l2_normalize(jnp.asarray(y))
  return float(products.sum(-1).mean())


def mean_direction(x: np.ndarray, axis: int) -> np.ndarray:
  """Returns the mean of the unit vectors of x f32[B, N, D] over an axis, which keeps length 1.

  No other constant has a higher mean cosine with x.
  """
  return np.asarray(l2_normalize(jnp.asarray(x))).mean(axis, keepdims=True)


@functools.partial(jax.jit, static_argnums=0)
def _patch_features(model: LavitModules, params: Mapping[str, Any], images: Array) -> Array:
  encoded = jnp.asarray(model.vit.apply({'params': params['vit']}, vit.preprocess(images)))
  return encoded[:, 1:].astype(jnp.float32)  # without the class token


@functools.partial(jax.jit, static_argnums=0)
def _decode_features(
  model: LavitModules, params: Mapping[str, Any], ids: Array, mask: Array
) -> Array:
  codes = model.tokenizer.apply({'params': params['tokenizer']}, ids, method='lookup')
  decoded = model.decoder.apply({'params': params['decoder']}, codes, mask)
  return jnp.asarray(decoded).astype(jnp.float32)
