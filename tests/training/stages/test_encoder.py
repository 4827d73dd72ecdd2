"""The contrastive loss of the encoder, and what a patch must predict."""

import itertools

import nano
import numpy as np
import pytest

from lavit_jax.models import lavit, vit
from lavit_jax.training.stages.base import (
  image_features,
)

nano.install()
MODEL = lavit.build('nano')


def test_equal_captions_are_no_negatives(batch):
  """Swapping two images changes the loss, unless their captions are equal."""
  stage = nano.run('encoder').stage
  params, state = nano.init_stage(stage, {})
  loss = nano.jit(
    lambda image: stage.loss(params, {}, state, {**batch, 'image': image}, None, True)[0]
  )

  def swapped(a, b):
    order = np.arange(8)
    order[[a, b]] = b, a
    return float(loss(batch['image'][order]))

  value = float(loss(batch['image']))
  assert swapped(6, 7) == pytest.approx(value, rel=1e-5)
  assert swapped(5, 6) != pytest.approx(value, rel=1e-4)


def test_a_patch_must_tell_its_own_pixels_and_place(batch):
  """The linear predictions are those of the definition, patch by patch."""
  stage = nano.run('encoder', pixel_weight=3.0, place_weight=5.0).stage
  params, state = nano.init_stage(stage, {})
  value, (_, metrics) = nano.jit(stage.loss, static_argnums=5)(params, {}, state, batch, None, True)
  assert value == pytest.approx(
    float(metrics['contrastive'] + 3 * metrics['pixel'] + 5 * metrics['place']), rel=1e-5
  )

  x = np.asarray(nano.jit(lambda: image_features(MODEL, params['vit'], batch['image']))())[:, 1:]
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  kernel = np.asarray(params['to_pixels'])
  kernel = 0.5 * kernel / np.linalg.norm(kernel, axis=0)  # columns of length 1/2
  pixels = np.asarray(vit.preprocess(batch['image']))
  errors = []
  for i, j in itertools.product(range(4), repeat=2):
    patch = pixels[:, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].reshape(8, -1)
    errors.append(np.square(x[:, 4 * i + j] @ kernel - patch).mean())
  assert float(metrics['pixel']) == pytest.approx(np.mean(errors), rel=1e-4)
  kernel = np.asarray(params['to_place'])
  predicted = x @ (kernel / np.linalg.norm(kernel, axis=0))
  true = np.array(list(itertools.product(np.linspace(-1, 1, 4), repeat=2)))
  assert float(metrics['place']) == pytest.approx(np.square(predicted - true).mean(), rel=1e-4)
