"""Params of all modules, and a batch."""

import math

import jax
import nano
import numpy as np
import pytest

from lavit_jax.models import lavit
from lavit_jax.models.quantizer import l2_normalize
from lavit_jax.weights.torch import name_tables

nano.install()
MODEL = lavit.build('nano')


@pytest.fixture(scope='module')
def parts():
  """Random weights of all parts, drawn by numpy: nothing compiles."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if getattr(path[-1], 'key', '') == 'scale':
      return jax.device_put(np.ones(leaf.shape, np.float32))
    fan_in = max(math.prod(leaf.shape[:-1][-3:]), 1)
    return jax.device_put(rng.normal(0, fan_in**-0.5, leaf.shape).astype(np.float32))

  parts = jax.tree_util.tree_map_with_path(
    draw, name_tables.module_shapes(MODEL, name_tables.TABLES)
  )
  parts['tokenizer']['quantizer']['embedding'] = l2_normalize(
    parts['tokenizer']['quantizer']['embedding']
  )
  return parts


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  length = np.array([3, 5, 2, 4, 6, 1, 4, 4], np.int32)
  text = np.where(np.arange(8) < length[:, None], rng.integers(3, 2048, (8, 8)), 0).astype(np.int32)
  text[7] = text[6]
  length[7] = length[6]  # two equal captions
  return dict(
    image=rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8),
    text=text,
    text_length=length,
    text_weight=(np.arange(8) < length[:, None]).astype(np.float32),
    kind=np.array([0, 1, 2, 0, 1, 0, 1, 2], np.int32),
    object_map=_object_map(),
    object_names=np.array([[7, 8], *[[9, -1]] * 7], np.int32),
  )


def _object_map():
  """In each image an upper left square of 16 pixels shows the first object.

  In the first image the lower right quarter of its last patch shows the second one, which is too
  little, and the patch above has half of it.
  """
  objects = np.zeros((8, 32, 32), np.uint8)
  objects[:, :16, :16] = 1
  objects[0, 28:, 28:] = 2
  objects[0, 16:20, 24:] = 2
  return objects
