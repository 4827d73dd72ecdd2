"""Measures whether the selector selects: which patches it keeps, and how many of an image.

A patch is of one of three kinds:

    object      objects cover more than half of it
    background  no object covers any of it
    edge        the rest

Axes: B images, N patches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.data.images import read_images
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.models import vit
from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.selector import gumbel_keep

KINDS = ('object', 'background', 'edge')


def measure_selection(
  model: Lavit, images: np.ndarray, masks: np.ndarray, seed: int
) -> dict[str, float]:
  """Measures the selection of patches.

  Args:
    model: with ViT and tokenizer.
    images: uint8[B, H, W, 3].
    masks: f32[B, H', W'] in 0..1, how much of each pixel objects cover.
    seed: of the sampled patches.

  Returns:
    What `score_selection` returns.
  """
  probabilities, most_probable = select(model, images)
  sampled = model.tokenize(images, seed=seed).keep
  side = math.isqrt(probabilities.shape[1])
  return score_selection(probabilities, sampled, most_probable, patch_coverage(masks, side))


def select(model: Lavit, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Runs the selector.

  Args:
    model: with ViT and tokenizer.
    images: uint8[B, H, W, 3].

  Returns:
    The probability f32[B, N] that a patch is kept, and bool[B, N], the patches that are kept
    without sampling.
  """
  pixels = read_images(images, model.modules.image_size)
  return model.run_batches(_select, ('vit', 'tokenizer'), pixels)


def patch_coverage(masks: np.ndarray, side: int) -> np.ndarray:
  """Returns the covered share of each patch, f32[B, side * side].

  Args:
    masks: f32[B, H, W] in 0..1. If patches do not consist of whole pixels, pixels are divided.
    side: number of patches along a side of the image.
  """
  count, height, width = masks.shape
  divided = masks.repeat(side // math.gcd(height, side), 1)
  divided = divided.repeat(side // math.gcd(width, side), 2)
  patches = divided.reshape(count, side, divided.shape[1] // side, side, -1)
  return patches.mean((2, 4)).reshape(count, side * side)


def patch_kinds(coverage: np.ndarray) -> np.ndarray:
  """Returns the kind of each patch, an index into `KINDS`, i32[B, N].

  Args:
    coverage: f32[B, N], the covered share of each patch.
  """
  kinds = np.full(coverage.shape, KINDS.index('edge'), np.int32)
  kinds[coverage > 0.5] = KINDS.index('object')
  kinds[coverage == 0] = KINDS.index('background')
  return kinds


def score_selection(
  probabilities: np.ndarray,
  sampled: np.ndarray,
  most_probable: np.ndarray,
  coverage: np.ndarray,
) -> dict[str, float]:
  """Compares the selection of patches with what covers them.

  Args:
    probabilities: f32[B, N], that a patch is kept.
    sampled: bool[B, N], the patches that are kept by sampling.
    most_probable: bool[B, N], the patches that are kept without sampling.
    coverage: f32[B, N], the share of each patch that objects cover.

  Returns:
    For each KIND of `KINDS` (a kind without patches is left out):
      patches_KIND: share of the patches that are of this kind.
      probability_KIND: mean probability.
      sampled_KIND: share of these patches that is kept by sampling.
      most_probable_KIND: share of these patches that is kept without sampling.
    probability_ratio: probability_object / probability_background.
    probability_std: standard deviation of the probability over all patches of all images.
    correlation_sampled: correlation, over images, of the number of sampled tokens with the share of
      the image that objects cover; 0 if one of them is the same for all images.
    correlation_expected: that of the expected number of tokens, the sum of the probabilities.
    count_std: standard deviation of the number of sampled tokens between images.
    binomial_std: sqrt(N p (1 - p)) with the mean probability p, that of N independent draws.
    count_std_ratio: count_std / binomial_std.

    A selector with the same probability for all patches has ratios of 1, correlations of 0 and a
    probability_std of 0. A ratio with denominator 0 is left out.
  """
  # Sums of float32 are not exact enough where all patches have the same probability.
  probabilities = probabilities.astype(np.float64)
  measures = {}
  kinds = patch_kinds(coverage)
  for index, kind in enumerate(KINDS):
    members = kinds == index
    measures[f'patches_{kind}'] = float(members.mean())
    if members.any():
      measures[f'probability_{kind}'] = float(probabilities[members].mean())
      measures[f'sampled_{kind}'] = float(sampled[members].mean())
      measures[f'most_probable_{kind}'] = float(most_probable[members].mean())
  p = float(probabilities.mean())
  counts = sampled.sum(1)
  object_share = coverage.mean(1)
  measures['probability_std'] = float(probabilities.std())
  measures['correlation_sampled'] = _correlation(counts, object_share)
  measures['correlation_expected'] = _correlation(probabilities.sum(1), object_share)
  measures['count_std'] = float(counts.std())
  measures['binomial_std'] = math.sqrt(sampled.shape[1] * p * (1 - p))
  for name, numerator, denominator in (
    ('probability_ratio', 'probability_object', 'probability_background'),
    ('count_std_ratio', 'count_std', 'binomial_std'),
  ):
    if numerator in measures and measures.get(denominator):
      measures[name] = measures[numerator] / measures[denominator]
  return measures


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
  """Returns the correlation of x and y [B]; 0 if one of them is constant."""
  if np.ptp(x) == 0 or np.ptp(y) == 0:
    return 0.0
  return float(np.corrcoef(x, y)[0, 1])


@functools.partial(jax.jit, static_argnums=0)
def _select(modules: LavitModules, params: Mapping[str, Any], images: Array) -> tuple[Array, Array]:
  encoded = jnp.asarray(modules.vit.apply({'params': params['vit']}, vit.preprocess(images)))
  patches = encoded[:, 1:]  # without the class token
  log_probs = jnp.asarray(
    modules.tokenizer.apply({'params': params['tokenizer']}, patches, method='select')
  )
  return jnp.exp(log_probs[..., 0]), gumbel_keep(log_probs) > 0.5
