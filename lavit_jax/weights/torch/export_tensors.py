"""Reads the tensors of an export from the leaves of a checkpoint."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
import tensorstore as ts

from lavit_jax.weights.store import arrays as leaves
from lavit_jax.weights.store import checksums, folder
from lavit_jax.weights.torch import finite
from lavit_jax.weights.torch.name_rules import Slot, contiguous

TargetFile = tuple[str, str]  # (folder, stem)
LeafSpecs = Mapping[str, jax.ShapeDtypeStruct]  # path -> shape and dtype


class ExportedTensor(NamedTuple):
  """A tensor of the result: its file, and the slot that it is read from."""

  file: TargetFile
  slot: Slot


@dataclasses.dataclass(frozen=True)
class ExportedModule:
  """A module of the checkpoint: its leaves, and torch name -> tensor of the result.

  Attributes:
    written: path -> shape and dtype of what is written of a leaf: its beginning on each axis.
  """

  module: str
  leaves: Mapping[str, ts.TensorStore]
  written: LeafSpecs
  tensors: Mapping[str, ExportedTensor]


def unwritten_layers(module: ExportedModule) -> Iterator[tuple[str, int]]:
  """The layers of stacked leaves that no tensor is made of; yields (path, layer)."""
  stacked = {
    tensor.slot.leaf for tensor in module.tensors.values() if tensor.slot.layer is not None
  }
  for leaf in stacked:
    for layer in range(module.written[leaf].shape[0], module.leaves[leaf].shape[0]):
      yield leaf, layer


class ConvertedTensor(NamedTuple):
  """A tensor on its way: `checksum` is that of the leaf, or layer, that it was read from."""

  name: str
  array: np.ndarray
  checksum: int
  counts: finite.Counts


def converted_tensors(module: ExportedModule, dtype: str | None) -> Iterator[ConvertedTensor]:
  """Reads and converts the tensors of a module, leaf by leaf, in threads ahead of the caller."""

  def read(name: str, slot: Slot) -> ConvertedTensor:
    store = module.leaves[slot.leaf]
    if slot.layer is None:
      leaf = store.read().result()
      leaf_checksum = checksums.checksum(leaf)
      leaf = leaf[tuple(slice(size) for size in module.written[slot.leaf].shape)]
    else:
      leaf = store[slot.layer].read().result()
      leaf_checksum = checksums.checksum(leaf[None], slot.layer)
    array, counts = finite.cast(leaf, folder.cast(leaf, dtype).dtype)
    return ConvertedTensor(name, contiguous(slot.to_tensor(array)), leaf_checksum, counts)

  by_leaf = sorted(module.tensors.items(), key=lambda item: item[1].slot.leaf)
  return leaves.prefetch(functools.partial(read, name, tensor.slot) for name, tensor in by_leaf)
