"""Two bicubics: Pillow rounds and clips to bytes between its two passes, JAX does not."""

import jax
import numpy as np
import pytest

from lavit_jax.data import images
from lavit_jax.models import safety_checker


def hard_edges(width: int, height: int) -> np.ndarray:
  """Blocks of 0 and 255, uint8[height, width, 3]."""
  x, y = np.meshgrid(np.arange(width), np.arange(height))
  blocks = np.stack([x // 5 + y // 3, x // 2 + y // 7, x // 11 + y // 4], -1) % 2
  return (255 * blocks).astype(np.uint8)


def weights(length: int, new_length: int) -> np.ndarray:
  """f64[new_length, length]: Keys' cubic with a = -1/2, as wide as a new pixel where it shrinks."""
  rows = np.zeros((new_length, length))
  scale = length / new_length
  for new in range(new_length):
    center = (new + 0.5) * scale
    support = max(scale, 1)
    for old in range(length):
      x = abs(old + 0.5 - center) / support
      if x < 1:
        rows[new, old] = (1.5 * x - 2.5) * x * x + 1
      elif x < 2:
        rows[new, old] = ((-0.5 * x + 2.5) * x - 4) * x + 2
  return rows / rows.sum(1, keepdims=True)


def bicubic(image: np.ndarray, size: int, between: bool) -> np.ndarray:
  """Resizes to f64[size, size, 3], columns first; with `between`, to bytes between the passes."""
  x = np.einsum('hwc,nw->hnc', image.astype(np.float64), weights(image.shape[1], size))
  x = rounded(x) if between else x
  return rounded(np.einsum('hwc,nh->nwc', x, weights(image.shape[0], size)))


def rounded(x: np.ndarray) -> np.ndarray:
  """Rounds to bytes, ties up, also if the sum of float64 is a little below the tie."""
  return np.floor(x.clip(0, 255) + 0.5 + 1e-9)


@pytest.mark.parametrize('sides, size', [((90, 70), 32), ((20, 24), 32), ((24, 20), 77)])
def test_which_library_rounds_between_the_passes(sides, size):
  """The tolerances come from ties, which each library may round in another direction.

  Pillow's weights have 22 bits and JAX's 24. A tie at the end changes the result by 1. A tie
  between the passes changes it by at most 1.3, the absolute sum of the weights, and with the tie at
  the end by 2.
  """
  image = hard_edges(*sides)
  with_bytes = bicubic(image, size, True)
  without = bicubic(image, size, False)
  loaded = images.resize(image, size).astype(np.float64)
  device = np.asarray(jax.image.resize(image.astype(np.float32), (size, size, 3), 'cubic'))
  assert np.abs(loaded - with_bytes).max() <= 2
  assert np.abs(rounded(device) - without).max() <= 1
  if size > max(sides):
    assert np.abs(with_bytes - without).max() > 10  # clearly different


@pytest.mark.parametrize('sides, size', [((60, 60), 224), ((300, 300), 224)])
def test_the_safety_checker_resizes_like_pillow(sides, size):
  """It resizes on the device, with bytes between the passes; for the tolerance, see above."""
  image = hard_edges(*sides)
  found = np.asarray(safety_checker.center_square(image[None], size))[0].astype(np.int32)
  assert np.abs(found - images.resize(image, size).astype(np.int32)).max() <= 2
