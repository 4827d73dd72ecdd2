"""What both sides of inference.py are given: weights that depend on their PyTorch name and shape only, and inputs. NumPy alone."""

from __future__ import annotations

import math
import zlib

import numpy as np

SIDE, STEPS, DRAWING_GUIDANCE, ROWS, NULL_ROWS, CONTEXT = 32, 10, 5.0, 256, 77, 768
POOL = np.random.default_rng(0).standard_normal(
  1_000_003, np.float32
)  # a prime: no two rows of a matrix are the same part of it


class Weights:
  """An array known by name and shape, made when it is asked for: numbers that depend on the name, of a size that keeps activations level."""

  dtype = np.dtype(np.float32)

  def __init__(self, name: str, shape: tuple[int, ...]):
    self.name, self.shape = name, shape

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    size = math.prod(self.shape)
    start = zlib.crc32(self.name.encode()) % len(POOL)
    values = np.resize(np.roll(POOL, -start)[:size], self.shape)
    if len(self.shape) > 1:
      return values / np.float32(math.sqrt(math.prod(self.shape[1:])))
    return values * np.float32(0.1) + np.float32(
      self.name.endswith('weight')
    )  # of a norm, or a bias


def drawing_inputs() -> tuple[np.ndarray, tuple, tuple]:
  """Noise [1, h, w, 4]; context [1, M, E] and its mask [1, M], with a condition and without."""
  rng = np.random.default_rng(0)
  context, null = rng.standard_normal((2, 1, ROWS, CONTEXT), np.float32)
  noise = rng.standard_normal((1, SIDE, SIDE, 4), np.float32)
  return noise, (context, np.ones((1, ROWS), bool)), (null, np.arange(ROWS)[None] < NULL_ROWS)
