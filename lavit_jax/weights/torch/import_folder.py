"""PyTorch folder -> checkpoint folder of Orbax: plans, writes tensor by tensor, and reads back."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lavit_jax.errors import UserError
from lavit_jax.weights.store import arrays as leaves
from lavit_jax.weights.store import folder
from lavit_jax.weights.store.checksums import checksums
from lavit_jax.weights.torch import (
  conversion_notes,
  finite,
  formats,
  interface_folders,
  name_tables,
  vocabulary_growth,
)
from lavit_jax.weights.torch.conversion_plan import Conversion, Progress, conversion_item
from lavit_jax.weights.torch.digests import FileDigests
from lavit_jax.weights.torch.formats import SourceModule
from lavit_jax.weights.torch.matching import MappedModule
from lavit_jax.weights.torch.name_rules import Slot, contiguous
from lavit_jax.weights.torch.safetensors_files import SafetensorsWriter
from lavit_jax.weights.torch.tensors import LazyTensor

LeafSpecs = dict[str, jax.ShapeDtypeStruct]  # path -> shape and dtype


def plan_import(
  src: pathlib.Path,
  dst: pathlib.Path,
  *,
  variant: str | None,
  dtype: str | None,
  allow_missing: str,
  grow: bool,
  weights_variant: str | None,
  allow_nonfinite: bool,
) -> Conversion:
  """Plans the conversion of a PyTorch folder or file; arguments as for `plan_conversion`."""
  mixed = dtype is not None
  interface = interface_folders.find(src, weights_variant)
  if interface is not None:
    opened = interface_folders.open_source(interface, variant, allow_missing, mixed)
  else:
    opened = interface_folders.open_lavit(src, variant, allow_missing, mixed, weights_variant)
  model = opened.model
  specs = {}
  for module, mapping in opened.mapped.items():
    vocab_size = model.vocabulary.size if grow and module == 'llama' else None
    specs[module] = {
      path: vocabulary_growth.grown_struct(path, folder.cast(leaf, dtype), vocab_size)
      for path, leaf in mapping.plan.leaves.items()
    }
  items = []
  for source in opened.sources:
    tensors = len(opened.mapped[source.module].plan.slots)
    items.append(conversion_item(source.location, tensors, specs[source.module].values()))
  folder_import = _FolderImport(
    src=src,
    dst=dst,
    kind=opened.kind,
    variant=model.variant,
    sources=opened.sources,
    mapped=opened.mapped,
    specs=specs,
    settings=opened.settings,
    dtype=dtype,
    allow_missing=allow_missing,
    allow_nonfinite=allow_nonfinite,
    notes=opened.notes,
    origin=opened.origin,
  )
  return Conversion(
    'torch -> orbax', opened.kind, model.variant, items, folder_import.run, opened.notes
  )


@dataclasses.dataclass(frozen=True)
class _FolderImport:
  """A planned import: see `plan_conversion` for the options.

  Attributes:
    sources: the modules of the source.
    mapped: module -> how its tensors become leaves.
    specs: module -> the leaves of the result.
    settings: of the checkpoint.
    notes: the conversion's; `run` adds what it lets through.
    origin: metadata of the checkpoint, for the way back.
  """

  src: pathlib.Path
  dst: pathlib.Path
  kind: str
  variant: str
  sources: list[SourceModule]
  mapped: dict[str, MappedModule]
  specs: dict[str, LeafSpecs]
  settings: dict[str, dict]
  dtype: str | None
  allow_missing: str
  allow_nonfinite: bool
  notes: list[str]
  origin: dict[str, Any]

  def run(self, progress: Progress) -> None:
    """Writes the checkpoint folder, and reads it back."""
    ledger = finite.FiniteLedger()
    with (
      folder.open_writer(self.dst, self.variant, settings=self.settings) as result,
      FileDigests() as digests,
    ):
      for module, mapping in self.mapped.items():
        specs = self.specs[module]
        with result.open_module(module, specs, mapping.plan.stacked) as writer:
          for tensor in _converted_tensors(mapping, specs, digests):
            ledger.add(f'{module}: {tensor.name}', tensor.counts)
            writer.write(tensor.slot.leaf, tensor.slot.layer, tensor.array)
            progress(tensor.array.nbytes)
        ledger.check(self.dtype, self.allow_nonfinite)
      self._write_extras(result.path)
      self._copy_other_files(result.path)
      result.config['metadata'] = self._metadata(digests)
      read_back(result, progress)
    self.notes.extend(ledger.notes())

  def _write_extras(self, result: pathlib.Path) -> None:
    """Writes the tensors that become no leaf into `torch/`, beside where their files were."""
    if self.kind == formats.EVA_CLIP:
      return
    for (where, stem), extras in self._extras().items():
      if extras:
        with SafetensorsWriter(result / 'torch' / where, f'{stem}.extras', extras) as writer:
          for name, tensor in extras.items():
            writer.write(name, np.asarray(tensor))

  def _extras(self) -> dict[tuple[str, str], dict[str, LazyTensor]]:
    """By file (folder, stem): the tensors that become no leaf of any module."""
    files: dict[tuple[str, str], Mapping[str, LazyTensor]] = {}
    converted: dict[tuple[str, str], set[str]] = {}
    for source in self.sources:
      mapping = self.mapped[source.module]
      states = [((source.location.folder, source.location.stems[0]), source.state)]
      if source.location.overlay is not None:
        states.append((source.location.overlay, source.overlay))
      for file, state in states:
        if state:
          files[file] = state
          # By identity, since a tensor under an overlay does not become a leaf of this module.
          names = {name for name in mapping.plan.slots if mapping.state[name] is state.get(name)}
          converted.setdefault(file, set()).update(names)
    extras = {}
    for file, state in files.items():
      extras[file] = {name: state[name] for name in state if name not in converted[file]}
    return extras

  def _copy_other_files(self, result: pathlib.Path) -> None:
    """Copies what holds no converted weights into `torch/`, and the tokenizer to `tokenizer/`."""
    if not self.src.is_dir():
      return
    weights = conversion_notes.converted_files(self.sources)
    weights |= set(conversion_notes.other_editions(self.src, self.sources))
    for file in sorted(self.src.rglob('*')):
      if not file.is_file() or file in weights or file == self.src / formats.EXPORT_INFO:
        continue
      target = result / 'torch' / file.relative_to(self.src)
      target.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(file, target)
    for tokenizer in (self.src, self.src / 'language_model'):
      folder.copy_tokenizer_files(tokenizer, result / 'tokenizer')

  def _metadata(self, digests: FileDigests) -> dict[str, Any]:
    """Where the checkpoint is from, and what the way back needs to know."""
    files = {}
    for file in sorted(conversion_notes.converted_files(self.sources)):
      name = file.name if self.src.is_file() else file.relative_to(self.src).as_posix()
      files[name] = f'sha256:{digests.hexdigest(file)}'
    overlays = [list(source.overlay) for source in self.sources if source.module == 'understanding']
    tied = [source.tied for source in self.sources if source.tied]
    tables = {module: mapping.table for module, mapping in self.mapped.items() if mapping.table}
    # Of a folder that was exported from a checkpoint: that one's metadata.
    exported = formats.read_json(self.src / formats.EXPORT_INFO)
    earlier = exported.get('source', {}).get('metadata', {})
    return earlier | dict(
      source=dict(kind=self.kind, files=files),
      tables=dict(version=name_tables.VERSION, chosen=tables),
      overlay=overlays[0] if overlays else None,
      tied=tied[0] if tied else None,
      dtype=self.dtype,
      allow_missing=self.allow_missing or None,
      grown=vocabulary_growth.RULE if self._is_grown() else None,
      **self.origin,
    )

  def _is_grown(self) -> bool:
    """Whether the language model gets rows."""
    if 'llama' not in self.mapped:
      return False
    plan = self.mapped['llama'].plan
    return any(spec.shape != plan.leaves[path].shape for path, spec in self.specs['llama'].items())


class _ReadTensor(NamedTuple):
  """A tensor that has been read; `hashed` is done when `array` may be released."""

  name: str
  array: np.ndarray
  hashed: concurrent.futures.Future | None = None


class _ConvertedTensor(NamedTuple):
  """A tensor as it is written: `array` is the leaf, or a layer of it."""

  name: str
  slot: Slot
  array: np.ndarray
  counts: finite.Counts


def _converted_tensors(
  mapping: MappedModule, specs: LeafSpecs, digests: FileDigests
) -> Iterator[_ConvertedTensor]:
  """Reads and converts the tensors of a module in the order of the files.

  Reading, hashing and conversion go on in threads, ahead of the caller.
  """
  slots = mapping.plan.slots

  def read(name: str, tensor: LazyTensor) -> _ReadTensor:
    return _ReadTensor(name, np.asarray(tensor))

  def convert(tensor: _ReadTensor) -> _ConvertedTensor:
    slot = slots[tensor.name]
    spec = specs[slot.leaf]
    array, counts = finite.cast(tensor.array, spec.dtype)
    array = contiguous(slot.to_leaf(array))
    if tensor.hashed is not None:
      tensor.hashed.result()
    if slot.layer is None:
      array = vocabulary_growth.grow_rows(array, spec.shape)
    return _ConvertedTensor(tensor.name, slot, array, counts)

  reads = [
    functools.partial(read, name, tensor) for name, tensor in mapping.state.items() if name in slots
  ]

  def conversions() -> Iterator[Callable[[], _ConvertedTensor]]:
    for tensor in leaves.prefetch(reads):
      hashed = digests.add(mapping.state[tensor.name], tensor.array)
      yield functools.partial(convert, tensor._replace(hashed=hashed))

  return leaves.prefetch(conversions())


def read_back(result: folder.FolderWriter, progress: Progress) -> None:
  """Raises UserError if the disk does not hold what was written."""
  for module, sums in result.sums.items():
    remaining = dict(sums)
    path = result.path / 'parts' / module
    for leaf, checksum, size in checksums(path, sums):
      remaining[leaf] ^= checksum
      progress(size)
    wrong = [leaf for leaf, rest in remaining.items() if rest]
    if wrong:
      raise UserError(
        f'{module}/{wrong[0]} is not on the disk as it was written; the disk is faulty, '
        'convert again to another disk'
      )
