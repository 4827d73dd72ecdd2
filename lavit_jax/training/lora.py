"""The options of training with low-rank adapters (models/lora.py), and what follows from them.

Which kernels have an adapter, which leaves train in full, and the dtypes of the frozen weights.
stages/adapters.py makes the stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import Mesh
from ml_collections import FieldReference

from lavit_jax import sharding
from lavit_jax.models import lora
from lavit_jax.models.int8 import Int8, quantize_weight
from lavit_jax.models.interfaces.variants import LAVIT
from lavit_jax.models.lavit import LavitModules
from lavit_jax.training.config import derived, read_options
from lavit_jax.weights.store import folder
from lavit_jax.weights.store.arrays import flatten, unflatten
from lavit_jax.weights.torch import adapter_names

Tree = Any
BIASES = ('none', 'lora_only', 'all')
BASE_DTYPES = ('float32', 'bfloat16', 'int8')
MATRICES = ('kernel', 'head', 'embedding')  # names of the leaves that `base_dtype` concerns


@dataclasses.dataclass(frozen=True)
class LoraOptions:
  """The section `lora` of the config; names as in peft's `LoraConfig`."""

  rank: int = 0  # 0: no adapters
  alpha: float = 16.0
  dropout: float = 0.0
  targets: tuple[str, ...] = ('^llama/layers/', '^understanding/')
  modules_to_save: tuple[str, ...] = ()  # trained in full
  bias: str = 'none'
  rslora: bool = False
  base_dtype: str = 'float32'

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> LoraOptions:
    """Reads them from a section of a config."""
    options = read_options(cls, config, 'lora')
    return dataclasses.replace(
      options, targets=tuple(options.targets), modules_to_save=tuple(options.modules_to_save)
    )

  @property
  def scale(self) -> float:
    """The scale s of the adapters (models/lora.py)."""
    return lora.adapter_scale(self.rank, self.alpha, self.rslora)

  def peft_fields(self) -> dict[str, Any]:
    """These options by the names of peft's `LoraConfig`."""
    return dict(
      r=self.rank,
      lora_alpha=self.alpha,
      lora_dropout=self.dropout,
      bias=self.bias,
      use_rslora=self.rslora,
    )


def follow_adapters(values: Mapping[str, Any]) -> dict[str, Any]:
  """The values of a config, in which `optim.muon` follows `lora.rank`, and `lora.targets` a module.

  Muon's regexes are of kernels: with adapters none of them trains, and it is () unless it is set.
  With another interface than LaVIT's there is no module `understanding` to name.

  Args:
    values: of the config; `interface` is a reference (`interface_options.follow_interface`).
  """
  rank = FieldReference(values['lora']['rank'])
  muon = values['optim']['muon']
  targets = values['lora']['targets']

  def targets_with(interface: str) -> tuple[str, ...]:
    return tuple(each for each in targets if interface == LAVIT or 'understanding' not in each)

  return dict(
    values,
    lora=dict(values['lora'], rank=rank, targets=derived(values['interface'], targets_with)),
    optim=dict(values['optim'], muon=derived(rank, lambda rank: () if rank else muon)),
  )


class Adapted(NamedTuple):
  """What trains.

  Attributes:
    modules: the modules beside whose weights something trains.
    kernels: (module, path) of the kernels with an adapter.
    in_full: (module, path) of the leaves that train themselves.
  """

  modules: tuple[str, ...]
  kernels: tuple[tuple[str, str], ...]
  in_full: tuple[tuple[str, str], ...]


def find_adapted(options: LoraOptions, model: LavitModules) -> Adapted:
  """Finds what the options name.

  Raises:
    UserError: a target names nothing.
  """
  modules = [
    name for name in adapter_names.MODULES if name != 'understanding' or not model.interface
  ]
  rules = {module: adapter_names.leaf_rules(model, module) for module in modules}
  kernel_rules = {}
  for module, of_module in rules.items():
    kernel_rules[module] = {
      path: rule for path, rule in of_module.items() if adapter_names.is_adaptable(rule)
    }
  kernels = adapter_names.find_leaves('lora.targets', options.targets, kernel_rules)
  in_full = adapter_names.find_leaves('lora.modules_to_save', options.modules_to_save, rules)
  kernels = [kernel for kernel in kernels if kernel not in in_full]
  in_full += _biases(options.bias, rules, kernels, in_full)
  used = {module for module, _ in (*kernels, *in_full)}
  return Adapted(tuple(name for name in modules if name in used), tuple(kernels), tuple(in_full))


def _biases(
  bias: str,
  rules: Mapping[str, Mapping[str, Any]],
  kernels: Collection[tuple[str, str]],
  in_full: Collection[tuple[str, str]],
) -> list[tuple[str, str]]:
  """The biases that train: those beside adapters, or all in modules that have some."""
  layers = {(module, path.removesuffix('kernel')) for module, path in kernels}
  modules = {module for module, _ in layers}
  biases = []
  for module in sorted(modules) if bias != 'none' else ():
    for path, rule in rules[module].items():
      is_bias = path.rpartition('/')[2] in ('bias', 'q_bias', 'v_bias')
      beside = (module, path.removesuffix('bias')) in layers
      if is_bias and not rule.optional and (beside or bias == 'all'):
        biases.append((module, path))
  return [leaf for leaf in biases if leaf not in in_full]


# --- The weights beside --------------------------------------------------------------------------


class BaseWeights(NamedTuple):
  """The dtypes of the frozen weights beside which adapters train.

  Attributes:
    dtype: of matrices: one of `BASE_DTYPES`. With 'int8' the matrices of the language model are
      Int8, and all others bfloat16. Norms and biases are float32.
    in_full: (module, path) of the leaves that train themselves, of which no frozen copy is kept.
  """

  dtype: str
  in_full: tuple[tuple[str, str], ...]

  def modules(self, names: Collection[str]) -> list[str]:
    """Those of some modules whose frozen weights are not all float32."""
    if self.dtype == 'float32':
      return []
    return [name for name in names if name in adapter_names.MODULES]

  def stored_dtype(self, module: str, path: str) -> str | None:
    """The dtype in which a leaf is read; None for that of its file, to be quantized."""
    name = path.rpartition('/')[2]
    if self.dtype == 'float32' or name not in MATRICES or (module, path) in self.in_full:
      return 'float32'
    return None if self._is_quantized(module, name) else 'bfloat16'

  def convert(self, module: str, path: str, leaf: Array) -> Array | Int8:
    """A leaf that was read, in its dtype."""
    dtype = self.stored_dtype(module, path)
    if dtype is None:
      return quantize_weight(path.rpartition('/')[2], leaf)
    return leaf.astype(dtype)

  def _is_quantized(self, module: str, name: str) -> bool:
    return self.dtype == 'int8' and module == 'llama' and name in ('kernel', 'head')

  def convert_all(self, params: Mapping[str, Tree]) -> dict[str, Tree]:
    """`convert` of all leaves of the modules that adapters may stand beside."""
    stored = dict(params)
    for module in adapter_names.MODULES & params.keys():
      flat = flatten(params[module])
      stored[module] = unflatten({path: self.convert(module, path, x) for path, x in flat.items()})
    return stored

  def without_trained(self, params: Mapping[str, Tree]) -> dict[str, Tree]:
    """The parameters without the leaves that train themselves."""
    kept = dict(params)
    for module in {module for module, _ in self.in_full}:
      flat = flatten(params[module])
      kept[module] = unflatten(
        {path: leaf for path, leaf in flat.items() if (module, path) not in self.in_full}
      )
    return kept


def read_base(base: BaseWeights, source: str, module: str, mesh: Mesh) -> Tree:
  """Reads a module of a folder leaf by leaf, in the dtypes of `base`, sharded on the mesh.

  Raises:
    UserError: the folder is damaged.
  """
  sources = {}
  for dtype in ('float32', 'bfloat16', None):
    sources[dtype] = folder.open_params(source, module, dtype)
  structs = sources[None].structs
  shardings = flatten(sharding.shardings({module: unflatten(structs)}, mesh)[module])
  stored = {}
  for path in structs:
    leaf = sources[base.stored_dtype(module, path)].read(path, sharding=shardings[path])
    stored[path] = jax.block_until_ready(
      base.convert(module, path, leaf)
    )  # one at a time, for memory
  tree = unflatten(stored)
  return jax.device_put(tree, sharding.shardings({module: tree}, mesh)[module])
