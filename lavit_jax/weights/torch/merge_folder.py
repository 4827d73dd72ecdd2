"""Checkpoint folder and adapters -> checkpoint folder with the adapters in its kernels."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from lavit_jax.models import lavit, lora
from lavit_jax.weights.store import folder
from lavit_jax.weights.store.arrays import ParameterSource, flatten
from lavit_jax.weights.store.metadata import module_digest
from lavit_jax.weights.torch import adapter_names, adapters, finite
from lavit_jax.weights.torch.adapters import Adapters, ModuleAdapter
from lavit_jax.weights.torch.conversion_plan import Conversion, ConversionItem, Progress
from lavit_jax.weights.torch.import_folder import read_back

TRAVELLING = ('tokenizer', 'torch')  # folders of a checkpoint beside its modules


def plan_merge(
  src: pathlib.Path, dst: pathlib.Path, adapter: pathlib.Path, dtype: str | None
) -> Conversion:
  """Plans a merge; nothing is written before the result's `run` is called.

  Args:
    src: the checkpoint folder that the adapters belong to.
    dst: where the result is written.
    adapter: the folder of adapters.
    dtype: of floating leaves in the result; None keeps the dtypes.

  Raises:
    UserError: a folder is damaged, or the adapters are of another model.
  """
  config = folder.read_config(src)
  variant = config['variant']
  settings = adapters.with_settings(folder.read_settings(src), adapters.read_info(adapter))
  model = lavit.build(variant, settings=settings)
  loaded = adapters.load_adapters(adapter, model)
  notes = adapters.base_notes(partial(module_digest, src), config['parts'], loaded)
  merge = _Merge(src, dst, adapter, config, settings, model, loaded, dtype, notes)
  items = []
  for module in merge.modules:
    structs = merge.structs(module)
    items.append(
      ConversionItem(
        module=module,
        path='',
        tensors=len(structs),
        parameters=sum(math.prod(leaf.shape) for leaf in structs.values()),
        dtype=', '.join(sorted({str(leaf.dtype) for leaf in structs.values()})),
        bytes=sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in structs.values()),
      )
    )
  return Conversion('merge', 'adapters', variant, items, merge.run, notes)


@dataclasses.dataclass(frozen=True)
class _Merge:
  """A planned merge; the attributes are those of `plan_merge`, and what it read."""

  src: pathlib.Path
  dst: pathlib.Path
  adapter: pathlib.Path
  config: Mapping[str, Any]
  settings: Mapping[str, Any]
  model: lavit.LavitModules
  loaded: Adapters
  dtype: str | None
  notes: list[str]

  @property
  def modules(self) -> list[str]:
    """Those of the result: the checkpoint's, and those that the adapters bring whole."""
    whole = [name for name, adapter in self.loaded.modules.items() if not adapter.config]
    replaced = {'understanding'} if 'interface' in whole else set()
    kept = [name for name in self.config['parts'] if name not in {*whole, *replaced}]
    return kept + whole

  def structs(self, module: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of a module of the result."""
    adapter = self.loaded.modules.get(module)
    if adapter is not None and not adapter.config:
      leaves = flatten(adapter.trained)
    else:
      leaves = self._source(module).structs
    return {path: folder.cast(leaf, self.dtype) for path, leaf in leaves.items()}

  def _source(self, module: str) -> ParameterSource:
    return folder.open_params(self.src, module, None)

  def run(self, progress: Progress) -> None:
    """Writes the checkpoint folder, and reads it back."""
    variant = self.config['variant']
    with folder.open_writer(self.dst, variant, self._metadata(), settings=self.settings) as result:
      for module in self.modules:
        structs = self.structs(module)
        stacked = self._stacked(module, structs)
        with result.open_module(module, structs, stacked) as writer:
          for path, layer, array in self._leaves(module, structs, stacked):
            writer.write(path, layer, array)
            progress(array.nbytes)
      for name in TRAVELLING:
        if (self.src / name).is_dir():
          shutil.copytree(self.src / name, result.path / name)
      read_back(result, progress)

  def _stacked(self, module: str, structs: Mapping[str, Any]) -> frozenset[str]:
    """The leaves that are merged layer by layer."""
    rules = adapter_names.leaf_rules(self.model, module)
    return frozenset(path for path in structs if path in rules and rules[path].is_stack)

  def _leaves(
    self, module: str, structs: Mapping[str, Any], stacked: frozenset[str]
  ) -> Iterator[tuple[str, int | None, np.ndarray]]:
    adapter = self.loaded.modules.get(module)
    trained = flatten(adapter.trained) if adapter is not None else {}
    if adapter is not None and not adapter.config:
      for path, leaf in trained.items():
        yield path, None, finite.convert(f'{module}/{path}', leaf, structs[path].dtype)
      return
    source = self._source(module)
    for path, struct in structs.items():
      for layer in range(struct.shape[0]) if path in stacked else (None,):
        leaf = np.asarray(source.read(path, layer))
        if adapter is not None:
          leaf = _merged(path, layer, leaf, trained, adapter)
        yield path, layer, finite.convert(f'{module}/{path}', leaf, struct.dtype, True)

  def _metadata(self) -> dict[str, Any]:
    """The checkpoint's, less what it said of files whose tensors have changed."""
    metadata = dict(self.config['metadata'])
    if 'understanding' in self.loaded.modules:
      metadata.pop('overlay', None)  # as of one that was trained here
    llama = self.loaded.modules.get('llama')
    if llama is not None and {'head', 'embedding'} & llama.trained.keys():
      metadata.pop('tied', None)
    info = self.loaded.info
    metadata['adapters'] = dict(folder=str(self.adapter), **info.get('metadata', {}))
    return metadata


def _merged(
  path: str,
  layer: int | None,
  leaf: np.ndarray,
  trained: Mapping[str, np.ndarray],
  adapter: ModuleAdapter,
) -> np.ndarray:
  """A leaf, or one layer of it, with what was trained; sums are in float32."""

  def part(name: str) -> np.ndarray:
    return trained[name] if layer is None else trained[name][layer]

  if path in trained:
    return part(path)
  beside = path.removesuffix('kernel') + lora.LORA
  if f'{beside}/a' not in trained:
    return leaf
  a, b = (part(f'{beside}/{name}').astype(np.float32) for name in 'ab')
  return leaf.astype(np.float32) + lora.kernel_change(a, b, adapter.scale)
