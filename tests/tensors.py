"""Safetensors files that hold what they were given."""

import pathlib
from collections.abc import Mapping

import numpy as np
import safetensors.numpy


def save_tensors(tensors: Mapping[str, np.ndarray], path: pathlib.Path) -> None:
  """Writes arrays of any memory layout.

  `save_file` of safetensors 0.8.0 writes the memory as it lies: a transposed array gets the right
  shape and the wrong numbers, without a word.
  """
  contiguous = {name: np.asarray(x, order='C') for name, x in tensors.items()}
  safetensors.numpy.save_file(contiguous, path)
