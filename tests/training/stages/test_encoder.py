"""The contrastive loss of the encoder, and what a patch must predict."""

import itertools

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


def test_a_patch_must_name_its_object(batch):
  """The cross-entropies are those of the definition, in float64."""
  stage = nano.run('encoder', pixel_weight=0.0, place_weight=0.0, name_weight=2.0).stage
  params, state = nano.init_stage(stage, {})
  value, (_, metrics) = nano.jit(stage.loss, static_argnums=5)(params, {}, state, batch, None, True)
  assert value == pytest.approx(float(metrics['contrastive'] + 2 * metrics['name']), rel=1e-5)

  labels = np.zeros((8, 4, 4), int)
  labels[:, :2, :2] = 1 + 9
  labels[0, :2, :2] = 1 + 7
  labels[0, 2, 3] = 1 + 8
  labels[0, 3, 3] = -1
  labels = labels.reshape(8, 16)
  x = np.asarray(nano.jit(lambda: image_features(MODEL, params['vit'], batch['image']))())[:, 1:]
  x = x.astype(np.float64)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  logits = x @ np.asarray(params['to_name'], np.float64)
  probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  groups = ['', *splits.concept_groups().values()]
  errors = {True: [], False: []}
  hits = []
  for i, n in itertools.product(range(8), range(16)):
    label = labels[i, n]
    if label < 0:
      continue
    same_group = [group == groups[label] for group in groups]
    error = -np.log(probability[i, n, label]) - np.log(probability[i, n, same_group].sum())
    errors[bool(label)].append(error)
    if label:
      hits.append(probability[i, n, 1:].argmax() + 1 == label)
  expected = (np.mean(errors[True]) + np.mean(errors[False])) / 2
  assert float(metrics['name']) == pytest.approx(expected, rel=1e-4)
  assert float(metrics['name_accuracy']) == pytest.approx(np.mean(hits))


def test_names_need_composed_images(batch):
  stage = nano.run('encoder', name_weight=1.0).stage
  params, state = nano.init_stage(stage, {})
  del batch['object_map']
  with pytest.raises(UserError, match='name_weight needs composed images'):
    stage.loss(params, {}, state, batch, None, True)
