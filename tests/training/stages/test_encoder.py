"""The contrastive loss of the encoder, and what a patch must predict."""

import itertools

import jax
import nano
import numpy as np
import pytest

from lavit_jax.data.emoji import splits
from lavit_jax.errors import UserError
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
  stage = nano.run('encoder', pixel_weight=3.0, place_weight=5.0, name_weight=0.0).stage
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


def test_objects_must_be_named_and_patches_told_from_the_background(batch):
  """The cross-entropies are those of the definition, in float64."""
  stage = nano.run('encoder', pixel_weight=0.0, place_weight=0.0, name_weight=2.0).stage
  params, state = nano.init_stage(stage, {})
  value, (_, metrics) = nano.jit(stage.loss, static_argnums=5)(params, {}, state, batch, None, True)
  expected = metrics['contrastive'] + 2 * metrics['name'] + 2 * metrics['group']
  assert value == pytest.approx(float(expected), rel=1e-5)

  x = np.asarray(nano.jit(lambda: image_features(MODEL, params['vit'], batch['image']))())[:, 1:]
  x = x.astype(np.float64)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

  def log_probability(features, kernel):
    logits = features @ np.asarray(kernel, np.float64)
    return logits - np.log(np.exp(logits).sum())

  upper_left = x.reshape(8, 4, 4, -1)[:, :2, :2].mean((1, 2))
  # The second object of the first image covers half of a patch and a quarter of another.
  second = (2 * x[0, 11] + x[0, 15]) / 3
  objects = [(upper_left[0], 7), (second, 8), *((features, 9) for features in upper_left[1:])]
  logs = [log_probability(features, params['to_name']) for features, _ in objects]
  errors = [-log[name] for log, (_, name) in zip(logs, objects, strict=True)]
  hits = [log.argmax() == name for log, (_, name) in zip(logs, objects, strict=True)]
  assert float(metrics['name']) == pytest.approx(np.mean(errors), rel=1e-4)
  assert float(metrics['name_accuracy']) == pytest.approx(np.mean(hits))

  groups = list(splits.concept_groups().values())
  names = list(dict.fromkeys(groups))
  patch_errors = {True: [], False: []}
  for i, n in itertools.product(range(8), range(16)):
    row, column = divmod(n, 4)
    concept = (7 if i == 0 else 9) if row < 2 and column < 2 else None
    if (i, n) == (0, 11):
      concept = 8
    if (i, n) == (0, 15):
      continue  # a quarter: neither an object's nor the background's
    label = 0 if concept is None else 1 + names.index(groups[concept])
    error = -log_probability(x[i, n], params['to_group'])[label]
    patch_errors[concept is not None].append(error)
  expected = (np.mean(patch_errors[True]) + np.mean(patch_errors[False])) / 2
  assert float(metrics['group']) == pytest.approx(expected, rel=1e-4)


def test_names_need_composed_images(batch):
  stage = nano.run('encoder', name_weight=1.0).stage
  params, state = nano.init_stage(stage, {})
  del batch['object_map']
  with pytest.raises(UserError, match='name_weight needs composed images'):
    jax.eval_shape(lambda: stage.loss(params, {}, state, batch, None, True))
