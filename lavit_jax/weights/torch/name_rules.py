"""Rules that pair a torch name with a leaf of a parameter tree, and the transforms between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from lavit_jax.weights.torch.tensors import ArraySpec

LAYER = re.compile(r'\{\d*i(?:\+\d+)?\}')
STRIP_COLUMNS = 16  # copied at once from a transposed matrix: a few cache lines of the source


class NameRule(NamedTuple):
  """One line of a table: a torch name and the leaf that it becomes.

  Attributes:
    name: the torch name. `{i}` stands for the number of a layer, `{2i+1}` for that of a leaf which
      stacks only the odd ones.
    leaf: path of the leaf; None for a name that a file may have for another module.
    transform: a key of `TRANSFORMS`.
    optional: whether a file may lack the name, in all layers; the tree then lacks the leaf.
  """

  name: str
  leaf: str | None
  transform: str = 'copy'
  optional: bool = False

  @property
  def is_stack(self) -> bool:
    """Whether the leaf stacks layers."""
    return LAYER.search(self.name) is not None

  def layer_name(self, layer: int) -> str:
    """The torch name of one layer of the leaf."""
    return LAYER.sub(lambda match: str(_layer_number(match[0], layer)), self.name)

  @property
  def pattern(self) -> str:
    """A regex of its torch names, whatever number the layer has."""
    return r'\d+'.join(re.escape(piece) for piece in LAYER.split(self.name))


def _layer_number(placeholder: str, layer: int) -> int:
  """The number in a file of the leaf's layer, by '{i}', '{2i}' or '{2i+1}'."""
  step, _, first = placeholder.strip('{}').partition('i')
  return int(step or 1) * layer + int(first or 0)


class Transform(NamedTuple):
  """A bijection between the torch array and the leaf of one layer; both ways give views."""

  to_flax: Callable[[np.ndarray], np.ndarray]
  to_torch: Callable[[np.ndarray], np.ndarray]


TRANSFORMS = {
  'copy': Transform(lambda x: x, lambda x: x),
  'linear': Transform(lambda x: x.T, lambda x: x.T),  # [out, in] <-> [in, out]
  'conv': Transform(  # OIHW <-> HWIO
    lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
  ),
  'conv1x1_to_linear': Transform(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]),
  'qkv': Transform(  # [3 * out, in] <-> [3, in, out]
    lambda x: x.reshape(3, -1, x.shape[1]).swapaxes(1, 2),
    lambda x: x.swapaxes(1, 2).reshape(-1, x.shape[1]),
  ),
  'kv': Transform(  # [2 * out, in] <-> [2, in, out]
    lambda x: x.reshape(2, -1, x.shape[1]).swapaxes(1, 2),
    lambda x: x.swapaxes(1, 2).reshape(-1, x.shape[1]),
  ),
  'qkv_bias': Transform(lambda x: x.reshape(3, -1), lambda x: x.reshape(-1)),
  'unbatch': Transform(lambda x: x[0], lambda x: x[None]),  # [1, ...] <-> [...]
}


class Slot(NamedTuple):
  """Where one torch array belongs.

  Attributes:
    leaf: path of the leaf.
    layer: its layer on axis 0 of the leaf; None if the leaf is not a stack.
    rule: the rule that pairs them.
  """

  leaf: str
  layer: int | None
  rule: NameRule

  def to_leaf(self, array: np.ndarray) -> np.ndarray:
    """The leaf, or its layer, from the torch array."""
    return TRANSFORMS[self.rule.transform].to_flax(array)

  def to_tensor(self, array: np.ndarray) -> np.ndarray:
    """The torch array from the leaf, or from its layer."""
    return TRANSFORMS[self.rule.transform].to_torch(array)

  def tensor_from(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
    """The torch array from all leaves by path."""
    leaf = leaves[self.leaf]
    return self.to_tensor(leaf if self.layer is None else leaf[self.layer])


def contiguous(array: np.ndarray) -> np.ndarray:
  """The array in C order.

  A transposed view is copied in strips, in a seventh of numpy's time on large matrices.
  """
  if array.flags.c_contiguous or array.ndim < 2:
    return array
  copy = np.empty(array.shape, array.dtype)
  for start in range(0, array.shape[-1], STRIP_COLUMNS):
    strip = slice(start, start + STRIP_COLUMNS)
    copy[..., strip] = array[..., strip]
  return copy


def leaves_by_path(tree: Mapping) -> dict[str, Any]:
  """By path, with '/' between keys: the leaves of a nested dict."""
  return dict(flatten_dict(tree, sep='/'))


def zeros_view(spec: ArraySpec) -> np.ndarray:
  """An array of zeros of this shape and dtype that takes no memory."""
  return np.broadcast_to(np.zeros((), spec.dtype), spec.shape)
