"""What both sides of inference.py share: weights, and the inputs of the U-Net. NumPy alone.

The weights depend only on the PyTorch name and the shape of a tensor. Random ones would keep 55% of
the patches of an image; a bias of the selector makes it a third.
"""

from __future__ import annotations

import math
import zlib

import numpy as np

SIDE = 32  # of the latents
STEPS = 10
DRAWING_GUIDANCE = 5.0
ROWS = 256  # of the condition
SELECTOR_BIAS = 'token_predictor.out_conv.4.bias'
KEEP_BIAS = -0.88  # added to the logit of keeping a patch
NULL_ROWS = 77  # of the unconditional branch, the others are masked
CONTEXT = 768  # width of the condition
# The size is a prime: no two rows of a matrix are the same stretch of the pool.
POOL = np.random.default_rng(0).standard_normal(1_000_003, np.float32)


class Weights:
  """An array by name and shape, computed when it is converted to NumPy.

  The numbers depend on the name, and their scale keeps the variance of activations.
  """

  dtype = np.dtype(np.float32)

  def __init__(self, name: str, shape: tuple[int, ...]):
    self.name = name
    self.shape = shape

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    size = math.prod(self.shape)
    start = zlib.crc32(self.name.encode()) % len(POOL)
    values = np.resize(np.roll(POOL, -start)[:size], self.shape)
    if len(self.shape) > 1:
      return values / np.float32(math.sqrt(math.prod(self.shape[1:])))
    center = 1.0 if self.name.endswith('weight') else 0.0  # a norm's scale, or a bias
    values = values * np.float32(0.1) + np.float32(center)
    if self.name.endswith(SELECTOR_BIAS):
      values[0] += np.float32(KEEP_BIAS)
    return values


def drawing_inputs() -> tuple[np.ndarray, tuple, tuple]:
  """The noise and both branches of the U-Net.

  Returns:
    Noise f32[1, h, w, 4]; (context f32[1, M, E], mask bool[1, M]) with a condition; the same
    without.
  """
  rng = np.random.default_rng(0)
  context, null = rng.standard_normal((2, 1, ROWS, CONTEXT), np.float32)
  noise = rng.standard_normal((1, SIDE, SIDE, 4), np.float32)
  null_mask = np.arange(ROWS)[None] < NULL_ROWS
  return noise, (context, np.ones((1, ROWS), bool)), (null, null_mask)
