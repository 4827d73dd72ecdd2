"""Checkpoint folder of Orbax -> PyTorch folder: plans, writes tensor by tensor, and reads back."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts

from lavit_jax.data.text import complete_tokenizer_folder
from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models import settings as checkpoint_settings
from lavit_jax.weights.store import arrays as leaves
from lavit_jax.weights.store import checksums, folder
from lavit_jax.weights.store.metadata import read_checksums
from lavit_jax.weights.store.replacement import replace_folder
from lavit_jax.weights.torch import configs, finite, formats, name_tables
from lavit_jax.weights.torch.conversion_notes import settings_notes
from lavit_jax.weights.torch.conversion_plan import Conversion, Progress, conversion_item
from lavit_jax.weights.torch.descriptions import descriptions
from lavit_jax.weights.torch.digests import sha256
from lavit_jax.weights.torch.formats import ModuleLocation
from lavit_jax.weights.torch.mapping import slots_for
from lavit_jax.weights.torch.name_rules import Slot, contiguous, zeros_view
from lavit_jax.weights.torch.pickle_files import replace_by_pickles
from lavit_jax.weights.torch.safetensors_files import (
  SafetensorsWriter,
  checksum,
  open_safetensors,
)
from lavit_jax.weights.torch.state_dict_names import EMBEDDING
from lavit_jax.weights.torch.tensors import ArraySpec, LazyTensor

TargetFile = tuple[str, str]  # (folder, stem)


class _ExportedTensor(NamedTuple):
  """A tensor of the result: its file, and the slot that it is read from."""

  file: TargetFile
  slot: Slot


@dataclasses.dataclass(frozen=True)
class _ExportedModule:
  """A module of the checkpoint: its leaves, and torch name -> tensor of the result."""

  module: str
  leaves: Mapping[str, ts.TensorStore]
  tensors: Mapping[str, _ExportedTensor]


def plan_export(
  src: pathlib.Path,
  dst: pathlib.Path,
  dtype: str | None,
  pickles: bool,
  allow_nonfinite: bool,
) -> Conversion:
  """Plans the conversion of a checkpoint folder; arguments as for `plan_conversion`."""
  config = folder.read_config(src)
  settings = folder.read_settings(src)
  variant = config['variant']
  metadata = config['metadata']
  model = lavit.build(variant, settings=settings)
  kind = metadata.get('source', {}).get('kind', formats.LAVIT)
  if 'interface' in config['parts']:
    raise UserError(
      f'{src} has the interface {model.interface_name!r}, for which a {kind} folder has no place'
    )
  if 'unet' in config['parts'] and model.condition_name != checkpoint_settings.CODES:
    raise UserError(
      f'{src} has a U-Net that reads the vectors of the interface {model.condition_name!r}, for '
      f'which a {kind} folder has no place'
    )
  _check_descriptions(src, config, kind, settings)
  files: dict[TargetFile, dict[str, ArraySpec]] = {}
  modules = []
  items = []
  for location in formats.locations(kind).values():  # the tokenizer before understanding
    if location.module not in config['parts']:
      continue
    arrays = _open_module(src, location.module)
    tensors = _plan_tensors(model, location, arrays, metadata, dtype, files)
    modules.append(_ExportedModule(location.module, arrays, tensors))
    specs = [files[tensor.file][name] for name, tensor in tensors.items()]
    items.append(conversion_item(location, len(tensors), specs))
  if not modules:
    raise UserError(
      f'{src} holds {", ".join(config["parts"])}: nothing that a {kind} folder has a place for'
    )
  extras = _open_extras(src, files)
  for file, tensors in extras.items():
    files[file] |= tensors
  origins = dict.fromkeys(settings, 'config.json')
  folder_export = _FolderExport(
    src=src,
    dst=dst,
    kind=kind,
    model=model,
    config=config,
    modules=modules,
    files=files,
    extras=extras,
    dtype=dtype,
    pickles=pickles,
    allow_nonfinite=allow_nonfinite,
    notes=settings_notes(origins, settings, variant),
  )
  return Conversion('orbax -> torch', kind, variant, items, folder_export.run, folder_export.notes)


# --- Planning --------------------------------------------------------------------------------


def _open_module(src: pathlib.Path, module: str) -> dict[str, ts.TensorStore]:
  path = src / 'parts' / module
  with folder.reading_errors(path):
    return leaves.open_leaves(path, read_checksums(src, module), leaves.DIRECT)


def _plan_tensors(
  model: lavit.LavitModules,
  location: ModuleLocation,
  arrays: Mapping[str, ts.TensorStore],
  metadata: Mapping[str, Any],
  dtype: str | None,
  files: dict[TargetFile, dict[str, ArraySpec]],
) -> dict[str, _ExportedTensor]:
  """The tensors that a module becomes; adds their shapes and dtypes to `files`.

  A tensor that two modules share is written once, for the first of them; of a tied embedding and
  head the source had one.
  """
  specs = {
    path: jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype)
    for path, array in arrays.items()
  }
  table = metadata.get('tables', {}).get('chosen', {}).get(location.module, 0)
  rules = name_tables.name_rules(model, location.module)[table]
  overlay_names = metadata.get('overlay')  # None: the module was trained here
  tensors = {}
  for name, slot in slots_for(rules, specs).items():
    file = (location.folder, location.stems[0])
    in_overlay = overlay_names is None or name in overlay_names
    if location.overlay is not None and in_overlay:
      file = location.overlay
    elif name in files.get(file, {}):
      continue
    if location.module == 'llama' and name == metadata.get('tied'):
      continue
    shape = slot.tensor_from({slot.leaf: zeros_view(specs[slot.leaf])}).shape
    spec = folder.cast(jax.ShapeDtypeStruct(shape, specs[slot.leaf].dtype), dtype)
    files.setdefault(file, {})[name] = spec
    tensors[name] = _ExportedTensor(file, slot)
  return tensors


def _open_extras(
  src: pathlib.Path, files: Collection[TargetFile]
) -> dict[TargetFile, dict[str, LazyTensor]]:
  """The tensors of each file that are no leaves and travelled in `torch/`."""
  extras = {}
  for where, stem in files:
    path = src / 'torch' / where / f'{stem}.extras.safetensors'
    if path.is_file():
      extras[where, stem] = open_safetensors(path)
  return extras


def _check_descriptions(src: pathlib.Path, config: Mapping, kind: str, settings: Mapping) -> None:
  """Raises UserError where the descriptions in `torch/` contradict the checkpoint's settings."""
  variant = config['variant']
  described_in = src / 'torch'
  folders = {location.module: location.folder for location in formats.locations(kind).values()}
  description_files = configs.settings_files(described_in, folders, config['parts'])
  described = configs.read_settings(described_in, folders, config['parts'], variant)
  variant_config = lavit.variant_config(variant)
  for group, field in checkpoint_settings.differences(described, settings):
    if group not in description_files:
      continue
    in_description = checkpoint_settings.format_setting(described, group, field, variant_config)
    in_checkpoint = checkpoint_settings.format_setting(settings, group, field, variant_config)
    raise UserError(
      f'{description_files[group]} says {in_description}, but the settings in '
      f'{src / "config.json"} say {in_checkpoint} of {group}; correct one of the two'
    )


# --- Writing ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _FolderExport:
  """A planned export: see `plan_conversion` for the options.

  Attributes:
    kind: of the PyTorch folder.
    config: of the checkpoint folder.
    modules: what is read.
    files: what is written: (folder, stem) -> torch name -> shape and dtype.
    extras: (folder, stem) -> torch name -> tensor that is copied.
    notes: the conversion's; `run` adds what it lets through.
  """

  src: pathlib.Path
  dst: pathlib.Path
  kind: str
  model: lavit.LavitModules
  config: Mapping[str, Any]
  modules: list[_ExportedModule]
  files: Mapping[TargetFile, Mapping[str, ArraySpec]]
  extras: Mapping[TargetFile, Mapping[str, LazyTensor]]
  dtype: str | None
  pickles: bool
  allow_nonfinite: bool
  notes: list[str]

  def run(self, progress: Progress) -> None:
    """Writes the PyTorch folder, and reads it back."""
    ledger = finite.FiniteLedger()
    with replace_folder(self.dst, formats.EXPORT_INFO) as result:
      with contextlib.ExitStack() as stack:
        writers = {}
        for (where, stem), specs in self.files.items():
          writer = SafetensorsWriter(result / where, stem, specs)
          writers[where, stem] = stack.enter_context(writer)
        for module in self.modules:
          self._write_module(module, writers, ledger, progress)
          ledger.check(self.dtype, self.allow_nonfinite)
        for file, tensors in self.extras.items():
          for name, tensor in tensors.items():
            writers[file].write(name, np.asarray(tensor))
      for writer in writers.values():
        _read_back(writer, progress)
        if self.pickles:
          replace_by_pickles(writer.files)
      self._write_descriptions(result)
      self._write_export_info(result)
    self.notes.extend(ledger.notes())

  def _write_module(
    self,
    module: _ExportedModule,
    writers: Mapping[TargetFile, SafetensorsWriter],
    ledger: finite.FiniteLedger,
    progress: Progress,
  ) -> None:
    """Writes the tensors of a module, leaf by leaf, and checks the leaves against their sums."""
    sums = read_checksums(self.src, module.module)
    remaining = {tensor.slot.leaf: sums[tensor.slot.leaf] for tensor in module.tensors.values()}
    with folder.reading_errors(self.src / 'parts' / module.module):
      for converted in _converted_tensors(module, self.dtype):
        tensor = module.tensors[converted.name]
        ledger.add(f'{tensor.file[1]}: {converted.name}', converted.counts)
        remaining[tensor.slot.leaf] ^= converted.checksum
        writers[tensor.file].write(converted.name, converted.array)
        progress(converted.array.nbytes)
      wrong = [leaf for leaf, rest in remaining.items() if rest]
      if wrong:
        raise ValueError(f'the checksum of {wrong[0]} does not match')

  def _write_descriptions(self, result: pathlib.Path) -> None:
    """Writes the files beside the weights.

    Those that travelled in `torch/` are copied; what was trained here gets the missing ones. The
    language model's config has the sizes and dtype of the result.
    """
    travelled = self.src / 'torch'
    if travelled.is_dir():
      no_extras = shutil.ignore_patterns('*.extras.safetensors')
      shutil.copytree(travelled, result, dirs_exist_ok=True, ignore=no_extras)
    modules = self.config['parts']
    locations = formats.locations(self.kind)
    llama = locations['llama'] if 'llama' in locations and 'llama' in modules else None
    vocab_size = 0
    if llama is not None:
      vocab_size = self.files[llama.folder, llama.stems[0]][EMBEDDING].shape[0]
      folder.copy_tokenizer_files(self.src / 'tokenizer', result / llama.folder)
    trained_here = 'source' not in self.config['metadata']
    if trained_here:
      for path, content in descriptions(self.model, modules, vocab_size).items():
        if not (result / path).exists():
          (result / path).parent.mkdir(parents=True, exist_ok=True)
          (result / path).write_text(json.dumps(content, indent=2) + '\n')
      if llama is not None:
        complete_tokenizer_folder(result / llama.folder)
    if llama is not None:
      file = result / llama.folder / 'config.json'
      content = formats.read_json(file)
      content['vocab_size'] = vocab_size
      for key in ('dtype', 'torch_dtype'):
        if key in content and self.dtype:
          content[key] = self.dtype
      file.write_text(json.dumps(content, indent=2) + '\n')

  def _write_export_info(self, result: pathlib.Path) -> None:
    """Writes where the folder is from."""
    digest = sha256(self.src / 'checksums.json')
    source = dict(
      kind='lavit_jax',
      files={'checksums.json': f'sha256:{digest}'},
      metadata=self.config['metadata'],
    )
    content = dict(
      variant=self.config['variant'],
      tables=name_tables.VERSION,
      dtype=self.dtype,
      source=source,
    )
    (result / formats.EXPORT_INFO).write_text(json.dumps(content, indent=1) + '\n')


class _ConvertedTensor(NamedTuple):
  """A tensor on its way: `checksum` is that of the leaf, or layer, that it was read from."""

  name: str
  array: np.ndarray
  checksum: int
  counts: finite.Counts


def _converted_tensors(module: _ExportedModule, dtype: str | None) -> Iterator[_ConvertedTensor]:
  """Reads and converts the tensors of a module, leaf by leaf, in threads ahead of the caller."""

  def read(name: str, slot: Slot) -> _ConvertedTensor:
    store = module.leaves[slot.leaf]
    if slot.layer is None:
      leaf = store.read().result()
      leaf_checksum = checksums.checksum(leaf)
    else:
      leaf = store[slot.layer].read().result()
      leaf_checksum = checksums.checksum(leaf[None], slot.layer)
    array, counts = finite.cast(leaf, folder.cast(leaf, dtype).dtype)
    return _ConvertedTensor(name, contiguous(slot.to_tensor(array)), leaf_checksum, counts)

  by_leaf = sorted(module.tensors.items(), key=lambda item: item[1].slot.leaf)
  return leaves.prefetch(functools.partial(read, name, tensor.slot) for name, tensor in by_leaf)


def _read_back(writer: SafetensorsWriter, progress: Progress) -> None:
  """Raises UserError if the disk does not hold what was written."""

  def read(file: pathlib.Path, name: str, tensor: LazyTensor) -> tuple[pathlib.Path, str, int, int]:
    array = np.asarray(tensor)
    return file, name, checksum(array), array.nbytes

  tasks = []
  for file in writer.files:
    for name, tensor in open_safetensors(file).items():
      tasks.append(functools.partial(read, file, name, tensor))
  for file, name, total, size in leaves.prefetch(tasks):
    if total != writer.sums[name]:
      raise UserError(
        f'{name} of {file.name} is not on the disk as it was written; the disk is faulty, '
        'convert again to another disk'
      )
    progress(size)
