"""Token statistics by hand, and judges of drawn pictures that tell what is plain to see."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from lavit_jax.data.emoji import colors, corpus
from lavit_jax.evaluation import images
from lavit_jax.inference.pipeline import VisualTokens


def test_usage():
  tokens = VisualTokens([np.array([3, 3, 5]), np.array([5])], None, np.array([3, 1]))
  usage = images.usage(tokens, 8)
  assert usage == dict(tokens=2.0, codes=2, code_share=0.25, perplexity=pytest.approx(2.0))


def test_cosine_broadcasts():
  x = jnp.array([[[1.0, 0], [0, 2]], [[3, 0], [3, 0]]])
  assert images.cosine(x, x) == pytest.approx(1)
  assert images.cosine(x, jnp.array([[1.0, 0], [1, 0]])) == pytest.approx(0.75)


@pytest.mark.parametrize('name', colors.BACKGROUNDS)
def test_background_is_read_off_the_border(name):
  image = np.empty((20, 20, 3), np.uint8)
  image[:] = np.clip(np.array(colors.BACKGROUNDS[name]) + 8, 0, 255)
  image[3:17, 3:] = 77
  assert images.background(image) == name


def test_background_of_real_examples():
  examples = corpus.examples('embedded', 'train', 3, 50)
  assert np.mean([images.background(e.image) == e.facts.background for e in examples]) > 0.95


def test_shrink_is_a_mean():
  image = np.zeros((1, 32, 32, 3), np.uint8)
  image[0, :2, :2] = [[[255] * 3, [0] * 3], [[255] * 3, [0] * 3]]
  small = images.shrink(image)
  assert small.shape == (1, 16, 16, 3)
  assert small[0, 0, 0, 0] == pytest.approx(0, abs=0.01) and small[0, 1, 1, 0] == -1


def test_the_classifier_learns_from_pixels_alone():
  rng = np.random.default_rng(0)
  kinds = rng.integers(0, 3, 320)
  pictures = rng.integers(0, 120, (320, 64, 64, 3)).astype(np.uint8)
  for picture, kind in zip(pictures, kinds):
    picture[16:48, 16:48, kind] += 100
  classify = images.train_classifier(pictures[:192], kinds[:192], 3, epochs=4, batch_size=32)
  assert (classify(pictures[192:]) == kinds[192:]).mean() > 0.9
  assert (classify(pictures[192:]) == rng.permutation(kinds[192:])).mean() < 0.6


def test_features_are_of_pictures_of_the_size_that_the_model_reads():
  seen = []
  model = types.SimpleNamespace(
    model=types.SimpleNamespace(image_size=32),
    in_batches=lambda program, names, rows: seen.append((names, rows.shape, rows.dtype)),
  )
  images.features(model, np.zeros((2, 64, 64, 3), np.uint8))
  assert seen == [(('vit',), (2, 32, 32, 3), np.uint8)]


def test_mean_direction_is_what_fits_a_picture_best():
  x = np.array([[[3.0, 0], [0, 1]], [[2, 0], [5, 0]]], np.float32)
  np.testing.assert_allclose(
    images.mean_direction(x, 1), [[[0.5, 0.5]], [[1, 0]]]
  )  # lengths do not count
  assert images.cosine(x, images.mean_direction(x, 1)) == pytest.approx((2**-0.5 + 1) / 2)
