"""Images -> features of the Inception-v3 network that the FID is computed from.

Sources: Szegedy et al. 2015 (Rethinking the Inception Architecture), and the released weights of
Heusel et al. 2017 (GANs Trained by a Two Time-Scale Update Rule), in the form that pytorch-fid and
torch-fidelity read. These differ from torchvision's Inception-v3: average pooling leaves the border
out, the last block has max pooling, and images are resized as TensorFlow 1 does.

Axes: B images, H and W pixels, C channels.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from lavit_jax.errors import UserError
from lavit_jax.weights.torch import files, script_files

SIZE = 299  # pixels of the network's input
NUM_FEATURES = 2048
_NORM_EPSILON = 1e-3
# The convolutions of each block, by their names in the file.
_STEM = ('Conv2d_1a_3x3', 'Conv2d_2a_3x3', 'Conv2d_2b_3x3', 'Conv2d_3b_1x1', 'Conv2d_4a_3x3')
_DOUBLE = tuple(f'branch3x3dbl_{i}' for i in (1, 2, 3))
_SEVEN = tuple(f'branch7x7_{i}' for i in (1, 2, 3))
_DOUBLE_SEVEN = tuple(f'branch7x7dbl_{i}' for i in (1, 2, 3, 4, 5))
_BLOCKS_35 = ('Mixed_5b', 'Mixed_5c', 'Mixed_5d')  # named by the width of their input
_BLOCKS_17 = ('Mixed_6b', 'Mixed_6c', 'Mixed_6d', 'Mixed_6e')
_BLOCKS_8 = ('Mixed_7b', 'Mixed_7c')
_BRANCHES = {
  _BLOCKS_35: ('branch1x1', 'branch5x5_1', 'branch5x5_2', *_DOUBLE, 'branch_pool'),
  ('Mixed_6a',): ('branch3x3', *_DOUBLE),
  _BLOCKS_17: ('branch1x1', *_SEVEN, *_DOUBLE_SEVEN, 'branch_pool'),
  ('Mixed_7a',): ('branch3x3_1', 'branch3x3_2', *(f'branch7x7x3_{i}' for i in (1, 2, 3, 4))),
  _BLOCKS_8: (
    'branch1x1',
    *(f'branch3x3_{i}' for i in ('1', '2a', '2b')),
    *(f'branch3x3dbl_{i}' for i in ('1', '2', '3a', '3b')),
    'branch_pool',
  ),
}


class Convolution(NamedTuple):
  """A convolution with its batch norm folded in.

  Attributes:
    kernel: f32[height, width, C in, C out].
    bias: f32[C out].
  """

  kernel: Array
  bias: Array


Weights = dict[str, Convolution]


def read_weights(path: str | os.PathLike) -> Weights:
  """Reads the convolutions of a file; all else in it, such as the classifier, is left out.

  Args:
    path: a state dict as safetensors or pickle, such as `pt_inception-2015-12-05-6726825d.pth`; or
      a TorchScript file of a module with these names.

  Raises:
    UserError: the file is missing or damaged, lacks a weight, or has one of another shape.
  """
  path = pathlib.Path(path)
  state = script_files.load(path) if script_files.is_script(path) else files.load(path)
  weights = {}
  try:
    for name in convolution_names():
      weights[name] = _fold(state, name)
    features = jax.eval_shape(extract_features, weights, jnp.zeros((1, SIZE, SIZE, 3), jnp.uint8))
    chex.assert_shape(features, (1, NUM_FEATURES))
  except (KeyError, TypeError, ValueError, AssertionError) as error:
    raise UserError(
      f'{path} is not the Inception-v3 of the FID ({error}); take pt_inception-2015-12-05.pth of '
      'pytorch-fid, or the same weights as safetensors'
    ) from None
  return weights


def convolution_names() -> list[str]:
  """The names of all convolutions in the file."""
  names: list[str] = list(_STEM)
  for blocks, branches in _BRANCHES.items():
    names += [f'{block}.{branch}' for block in blocks for branch in branches]
  return names


def _fold(state: Mapping[str, ArrayLike], name: str) -> Convolution:
  """One convolution, with its batch norm as it is at inference."""
  gamma, beta, mean, variance = (
    np.asarray(state[f'{name}.bn.{key}'], np.float32)
    for key in ('weight', 'bias', 'running_mean', 'running_var')
  )
  scale = gamma / np.sqrt(variance + _NORM_EPSILON)
  kernel = np.asarray(state[f'{name}.conv.weight'], np.float32).transpose(2, 3, 1, 0)
  return Convolution(jnp.asarray(kernel * scale), jnp.asarray(beta - mean * scale))


# --- Network -------------------------------------------------------------------------------------


def extract_features(weights: Weights, images: Array) -> Array:
  """uint8[B, H, W, 3] -> f32[B, NUM_FEATURES], the mean of the last block over all places."""
  chex.assert_rank(images, 4)
  x = (_resize(images.astype(jnp.float32)) - 128) / 128
  x = _chain(weights, x, _STEM[:1], last_stride=2)
  x = _convolve(weights[_STEM[1]], x, padding='VALID')
  x = _max_pool(_convolve(weights[_STEM[2]], x), stride=2)
  x = _convolve(weights[_STEM[3]], x)
  x = _max_pool(_convolve(weights[_STEM[4]], x, padding='VALID'), stride=2)
  for block in _BLOCKS_35:
    x = _block_35(_of_block(weights, block), x)
  x = _shrink_to_17(_of_block(weights, 'Mixed_6a'), x)
  for block in _BLOCKS_17:
    x = _block_17(_of_block(weights, block), x)
  x = _shrink_to_8(_of_block(weights, 'Mixed_7a'), x)
  for block, pool in zip(_BLOCKS_8, (_average_pool, _max_pool), strict=True):
    x = _block_8(_of_block(weights, block), x, pool)
  return x.mean((1, 2))


def _resize(images: Array) -> Array:
  """Bilinear to [B, SIZE, SIZE, 3], with pixel 0 on pixel 0, and without smoothing."""
  _, height, width, _ = images.shape
  highest = jax.lax.Precision.HIGHEST
  rows = jnp.einsum('nh,bhwc->bnwc', _bilinear(height), images, precision=highest)
  return jnp.einsum('nw,bhwc->bhnc', _bilinear(width), rows, precision=highest)


def _bilinear(length: int) -> np.ndarray:
  """The share of each old pixel in each new one, f32[SIZE, length]."""
  place = np.arange(SIZE) * (length / SIZE)
  near = np.floor(place).astype(int)
  far = np.minimum(near + 1, length - 1)
  shares = np.zeros((SIZE, length))
  np.add.at(shares, (np.arange(SIZE), near), 1 - (place - near))
  np.add.at(shares, (np.arange(SIZE), far), place - near)
  return shares.astype(np.float32)


def _block_35(weights: Weights, x: Array) -> Array:
  return _concatenate(
    _convolve(weights['branch1x1'], x),
    _chain(weights, x, ('branch5x5_1', 'branch5x5_2')),
    _chain(weights, x, _DOUBLE),
    _convolve(weights['branch_pool'], _average_pool(x)),
  )


def _shrink_to_17(weights: Weights, x: Array) -> Array:
  return _concatenate(
    _chain(weights, x, ('branch3x3',), last_stride=2),
    _chain(weights, x, _DOUBLE, last_stride=2),
    _max_pool(x, stride=2),
  )


def _block_17(weights: Weights, x: Array) -> Array:
  return _concatenate(
    _convolve(weights['branch1x1'], x),
    _chain(weights, x, _SEVEN),
    _chain(weights, x, _DOUBLE_SEVEN),
    _convolve(weights['branch_pool'], _average_pool(x)),
  )


def _shrink_to_8(weights: Weights, x: Array) -> Array:
  branches = _BRANCHES[('Mixed_7a',)]
  return _concatenate(
    _chain(weights, x, branches[:2], last_stride=2),
    _chain(weights, x, branches[2:], last_stride=2),
    _max_pool(x, stride=2),
  )


def _block_8(weights: Weights, x: Array, pool: Callable[[Array], Array]) -> Array:
  short = _convolve(weights['branch3x3_1'], x)
  long = _chain(weights, x, ('branch3x3dbl_1', 'branch3x3dbl_2'))
  return _concatenate(
    _convolve(weights['branch1x1'], x),
    _convolve(weights['branch3x3_2a'], short),
    _convolve(weights['branch3x3_2b'], short),
    _convolve(weights['branch3x3dbl_3a'], long),
    _convolve(weights['branch3x3dbl_3b'], long),
    _convolve(weights['branch_pool'], pool(x)),
  )


def _of_block(weights: Weights, block: str) -> Weights:
  prefix = f'{block}.'
  return {
    name.removeprefix(prefix): convolution
    for name, convolution in weights.items()
    if name.startswith(prefix)
  }


def _chain(weights: Weights, x: Array, names: Sequence[str], last_stride: int = 1) -> Array:
  """Convolutions one after another; with a stride, the last one has no padding."""
  for name in names[:-1]:
    x = _convolve(weights[name], x)
  return _convolve(weights[names[-1]], x, last_stride, 'SAME' if last_stride == 1 else 'VALID')


def _convolve(convolution: Convolution, x: Array, stride: int = 1, padding: str = 'SAME') -> Array:
  x = jax.lax.conv_general_dilated(
    x,
    convolution.kernel,
    (stride, stride),
    padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    precision=jax.lax.Precision.HIGHEST,
  )
  return jax.nn.relu(x + convolution.bias)


def _max_pool(x: Array, stride: int = 1) -> Array:
  padding = 'SAME' if stride == 1 else 'VALID'
  window = (1, 3, 3, 1)
  return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1, stride, stride, 1), padding)


def _average_pool(x: Array) -> Array:
  """Means of 3 x 3 pixels, or of those that are inside the image."""
  sums = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), 'SAME')
  return sums / np.outer(_pixels_inside(x.shape[1]), _pixels_inside(x.shape[2]))[..., None]


def _pixels_inside(length: int) -> np.ndarray:
  """How many of the pixels i - 1, i and i + 1 there are, f32[length]."""
  pixel = np.arange(length)
  return (np.minimum(pixel + 2, length) - np.maximum(pixel - 1, 0)).astype(np.float32)


def _concatenate(*branches: Array) -> Array:
  return jnp.concatenate(branches, -1)
