"""Statistics of visual tokens, computed by hand."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.evaluation import tokens
from lavit_jax.inference.outputs import VisualTokens


def test_codebook_usage():
  ids = [np.array([3, 3, 5]), np.array([5])]
  usage = tokens.codebook_usage(VisualTokens(ids, None, np.array([3, 1])), 8)
  assert usage == dict(
    tokens=2.0, distinct=1.5, codes=2, code_share=0.25, perplexity=pytest.approx(2.0)
  )


def test_cosine_broadcasts():
  x = jnp.array([[[1.0, 0], [0, 2]], [[3, 0], [3, 0]]])
  assert tokens.mean_cosine(x, x) == pytest.approx(1)
  assert tokens.mean_cosine(x, jnp.array([[1.0, 0], [1, 0]])) == pytest.approx(0.75)


def test_images_are_resized_to_the_size_of_the_model():
  calls = []
  model = types.SimpleNamespace(
    modules=types.SimpleNamespace(image_size=32),
    run_batches=lambda program, names, images: calls.append((names, images.shape, images.dtype)),
  )
  tokens.features(model, np.zeros((2, 64, 64, 3), np.uint8))
  assert calls == [(('vit',), (2, 32, 32, 3), np.uint8)]


def test_no_constant_fits_an_image_better_than_its_mean_direction():
  x = np.array([[[3.0, 0], [0, 1]], [[2, 0], [5, 0]]], np.float32)
  direction = tokens.mean_direction(x, 1)
  np.testing.assert_allclose(direction, [[[0.5, 0.5]], [[1, 0]]])  # lengths do not matter
  assert tokens.mean_cosine(x, direction) == pytest.approx((2**-0.5 + 1) / 2)
