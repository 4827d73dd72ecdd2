"""Measures of the selection of patches, computed by hand and with the tiny checkpoint."""

import json
import pathlib

import numpy as np
import pytest

import lavit_jax
from lavit_jax.data.emoji import corpus, sprites
from lavit_jax.data.emoji.scenes import Composer
from lavit_jax.evaluation import report, selection
from lavit_jax.inference.pipeline import Lavit

TINY = pathlib.Path(lavit_jax.__file__).parent / 'assets' / 'tiny'


def hand_made_masks():
  """Returns masks f32[2, 4, 4] for 2 x 2 patches of 2 x 2 pixels."""
  masks = np.zeros((2, 4, 4), np.float32)
  masks[0, :2, :2] = 1  # patch 0 is covered
  masks[0, 0, 2:] = 1  # half of patch 1 is
  masks[0, 2, 0] = 0.01  # hardly any of patch 2 is
  masks[1, 2:, 2:] = [[1, 1], [0.5, 0]]  # more than half of patch 3 is
  return masks


def test_kinds_of_patches():
  coverage = selection.patch_coverage(hand_made_masks(), 2)
  np.testing.assert_allclose(coverage, [[1, 0.5, 0.0025, 0], [0, 0, 0, 0.625]])
  kinds = np.array(selection.KINDS)[selection.patch_kinds(coverage)]
  assert kinds.tolist() == [
    ['object', 'edge', 'edge', 'background'],
    ['background', 'background', 'background', 'object'],
  ]


def test_patches_of_parts_of_pixels():
  mask = np.array([[[1, 0], [0, 0]]], np.float32)
  coverage = selection.patch_coverage(mask, 3)
  np.testing.assert_allclose(coverage, [[1, 0.5, 0, 0.5, 0.25, 0, 0, 0, 0]])


def test_measures_of_hand_made_probabilities():
  measures = selection.score_selection(
    np.array([[0.75, 0.5, 0.25, 0], [0, 0.25, 0.5, 0.75]], np.float32),
    np.array([[1, 1, 1, 0], [0, 0, 0, 1]], bool),
    np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool),
    selection.patch_coverage(hand_made_masks(), 2),
  )
  binomial_std = (4 * 0.375 * 0.625) ** 0.5
  assert measures == pytest.approx(
    dict(
      patches_object=2 / 8,
      patches_background=4 / 8,
      patches_edge=2 / 8,
      probability_object=0.75,
      probability_background=0.75 / 4,
      probability_edge=0.375,
      sampled_object=1,
      sampled_background=0,
      sampled_edge=1,
      most_probable_object=1,
      most_probable_background=1 / 4,
      most_probable_edge=1 / 2,
      probability_ratio=4,
      probability_std=(2 * (0.375**2 + 0.125**2) / 4) ** 0.5,
      correlation_sampled=1,  # 3 tokens and 1, of images that are covered by 0.375 and 0.156
      correlation_expected=0,  # both expect 1.5 tokens
      count_std=1,
      binomial_std=binomial_std,
      count_std_ratio=1 / binomial_std,
    )
  )
  assert {type(value) for value in measures.values()} == {float}


def test_the_same_probability_for_all_patches_is_the_baseline():
  rng = np.random.default_rng(0)
  shape = 4000, 64
  sampled = rng.random(shape) < 1 / 3
  coverage = rng.random((4000, 1)).round() * rng.random(shape)
  measures = selection.score_selection(
    np.full(shape, 1 / 3, np.float32), sampled, sampled, coverage
  )
  assert measures['probability_ratio'] == pytest.approx(1)
  assert measures['probability_std'] == pytest.approx(0)
  assert measures['correlation_expected'] == 0
  assert measures['correlation_sampled'] == pytest.approx(0, abs=0.05)
  assert measures['count_std_ratio'] == pytest.approx(1, abs=0.05)


def test_an_undefined_measure_is_left_out():
  ones = np.ones((3, 4), np.float32)
  measures = selection.score_selection(ones, ones > 0, ones > 0, ones)
  assert measures['probability_object'] == measures['patches_object'] == 1
  assert measures['patches_background'] == measures['patches_edge'] == 0
  assert measures['correlation_sampled'] == measures['correlation_expected'] == 0
  for name in ('probability_background', 'sampled_edge', 'probability_ratio', 'count_std_ratio'):
    assert name not in measures
  json.dumps(measures, allow_nan=False)


def test_the_tiny_checkpoint():
  model = Lavit.from_pretrained(TINY)
  single = corpus.examples('embedded', 'train', 0, 16, 'single')
  scenes = corpus.examples('embedded', 'train', 0, 16, 'scene')
  examples = single + scenes
  images = report.stack_images(examples)
  probabilities, most_probable, counts = model.select_patches(images)
  np.testing.assert_array_equal(counts, most_probable.sum(1))
  assert probabilities.shape == (32, 64)
  assert 0 <= probabilities.min() < 0.1 < 0.9 < probabilities.max() <= 1
  np.testing.assert_array_equal(most_probable, model.tokenize(images, seed=None).keep)
  measures = report.measure_selection(model, examples, Composer(sprites.load()), 0)
  assert all(measures[f'patches_{kind}'] > 0.1 for kind in selection.KINDS)
  kept = sum(measures[f'patches_{kind}'] * measures[f'sampled_{kind}'] for kind in selection.KINDS)
  assert kept == pytest.approx(model.tokenize(images, seed=0).keep.mean())
  assert measures['probability_std'] == pytest.approx(probabilities.std(), rel=1e-4)
  # It has learned to keep objects; 2.5 on held-out images.
  assert measures['probability_ratio'] > 1.5
