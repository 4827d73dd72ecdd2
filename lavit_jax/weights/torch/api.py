"""For scripts: PyTorch files straight into parameter trees, and trees into PyTorch files."""

from __future__ import annotations

import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models import settings as checkpoint_settings
from lavit_jax.renamed_keywords import accept_old_keywords
from lavit_jax.weights.store import folder
from lavit_jax.weights.store.arrays import ParameterSource, flatten, unflatten
from lavit_jax.weights.torch import (
  configs,
  files,
  finite,
  formats,
  matching,
  name_tables,
  vocabulary_growth,
)
from lavit_jax.weights.torch.descriptions import description
from lavit_jax.weights.torch.formats import SourceModule
from lavit_jax.weights.torch.mapping import slots_for
from lavit_jax.weights.torch.matching import MappedModule
from lavit_jax.weights.torch.name_rules import contiguous
from lavit_jax.weights.torch.safetensors_files import SHARD_BYTES, SafetensorsWriter

ONE_FILE_BYTES = 1 << 62  # a shard size that is never reached


@accept_old_keywords(part='module')
def from_torch(
  path: str | os.PathLike,
  module: str | None = None,
  *,
  variant: str | None = None,
  dtype: str | None = 'float32',
  grow: bool = False,
  shardings: Callable | None = None,
  allow_missing: str = '',
  allow_nonfinite: bool = False,
  settings: Mapping | None = None,
) -> Any:
  """Reads the weights of a PyTorch folder or file.

  Beside the result, one leaf at a time is in memory.

  Args:
    path: a LaVIT, LLaMA, Stable Diffusion or SDXL folder, or an EVA-CLIP file; with `module`, any
      folder or file that holds that module alone.
    module: the module to read; None reads all.
    variant: of the model; None finds the largest whose shapes the files have.
    dtype: of the floating leaves; None keeps the dtypes of the files.
    grow: add the rows of the visual tokens to a language model that has the text's only
      (vocabulary_growth.py).
    shardings: {module: tree of ShapeDtypeStructs} -> the same tree of shardings; leaves then go
      straight onto the devices.
    allow_missing: regex of torch names that may be missing.
    allow_nonfinite: read NaN and infinity in the files as they are; otherwise they are an error, as
      overflow in `dtype` is.
    settings: `torch_settings(path, module)`, which `lavit.build` and `to_torch` get too; None is
      the variant's own. A tree does not hold them, so they must be those of the folder.

  Returns:
    {module: tree of arrays}, or the tree of `module`.

  Raises:
    UserError: unknown or damaged files, or other settings.
    PortingError: the files do not fit the variant.
  """
  path = pathlib.Path(path)
  sources = _open_sources(path, module)
  model = lavit.build(variant or matching.find_variant(sources), settings=settings)
  _check_settings(path, sources, model)
  mapped = matching.map_modules(model, sources, allow_missing, mixed=dtype is not None)
  params = {}
  for name, mapping in mapped.items():
    vocab_size = model.vocabulary.size if grow and name == 'llama' else None
    source = _parameter_source(mapping, dtype, vocab_size, allow_nonfinite)
    leaf_shardings = {}
    if shardings is not None:
      leaf_shardings = flatten(shardings({name: unflatten(source.structs)})[name])
    leaves = {leaf: source.read(leaf, sharding=leaf_shardings.get(leaf)) for leaf in source.structs}
    params[name] = unflatten(leaves)
  return params[module] if module else params


@accept_old_keywords(part='module')
def torch_settings(
  path: str | os.PathLike, module: str | None = None, *, variant: str | None = None
) -> dict[str, dict]:
  """The settings of a PyTorch folder that differ from the variant's own.

  They go to `lavit.build`, `from_torch` and `to_torch`.

  Args:
    path: as for `from_torch`.
    module: the module; None is all.
    variant: of the model; None finds it.

  Returns:
    {group: {field: value}}.

  Raises:
    UserError: unknown or damaged files, or a description that asks for what the variant does not
      compute.
  """
  path = pathlib.Path(path)
  sources = _open_sources(path, module)
  return _read_settings(path, sources, variant or matching.find_variant(sources))


@accept_old_keywords(part='module')
def open_torch(
  path: str | os.PathLike, module: str, *, variant: str, dtype: str | None = 'float32'
) -> ParameterSource:
  """Opens a module to be read by leaves, or by layers of them; arguments as for `from_torch`.

  Raises:
    UserError: unknown or damaged files.
    PortingError: the files do not fit the variant.
  """
  sources = _open_sources(pathlib.Path(path), module)
  mapped = matching.map_modules(lavit.build(variant), sources, mixed=dtype is not None)
  return _parameter_source(mapped[module], dtype)


@accept_old_keywords(part='module')
def to_torch(
  params: Any,
  path: str | os.PathLike,
  module: str,
  *,
  variant: str,
  settings: Mapping | None = None,
) -> pathlib.Path:
  """Writes a module under its PyTorch names, in the dtypes of its arrays.

  Args:
    params: the tree.
    path: `FOLDER/NAME.safetensors` for one file; else a folder that `from_pretrained` of
      transformers or diffusers loads: shards of 5 GB under the published name, and the
      `config.json` of the language model, a U-Net, a VAE or the safety checker.
    module: its name.
    variant: of the model.
    settings: of the checkpoint, for the `config.json` (`torch_settings`, or
      `folder.read_settings`); None is the variant's own.

  Returns:
    The file, or the folder.

  Raises:
    UserError: it cannot be written.
    PortingError: the tree is not of this module.
  """
  path = pathlib.Path(path)
  model = lavit.build(variant, settings=settings)
  leaves = {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
  slots = slots_for(name_tables.name_rules(model, module)[0], leaves)
  tensors = {name: slot.tensor_from(leaves) for name, slot in slots.items()}  # views
  if path.suffix == '.safetensors':
    target = (path.parent, path.stem)
    shard_bytes = ONE_FILE_BYTES
    content = None
  else:
    target = (path, formats.locations(formats.LAVIT)[module].stems[0])
    shard_bytes = SHARD_BYTES
    vocab_size = len(params['embedding']) if module == 'llama' else None
    content = description(model, module, vocab_size)
  try:
    with SafetensorsWriter(*target, tensors, shard_bytes) as writer:
      for name, array in tensors.items():
        writer.write(name, contiguous(array))
    if content is not None:
      (path / 'config.json').write_text(json.dumps(content, indent=2) + '\n')
  except OSError as error:
    raise UserError(
      f'cannot write {path}: {error.strerror}; free some space or choose another place'
    ) from error
  return path


def _open_sources(path: pathlib.Path, module: str | None) -> list[SourceModule]:
  """All modules of a source, or one, which may be alone in a folder or file of any name."""
  if module is None:
    return formats.detect(path)[1]
  if module not in name_tables.TABLES:
    raise UserError(f'unknown module {module!r}; known: {", ".join(name_tables.TABLES)}')
  if path.is_dir() and formats.detect_kind(path):
    return formats.detect(path, module)[1]
  location = formats.ModuleLocation(module, '', ('',))
  return [formats.source_module(location, files.load(path), path)]


def _read_settings(
  path: pathlib.Path, sources: list[SourceModule], variant: str
) -> dict[str, dict]:
  folders = formats.module_folders(sources)
  return configs.read_settings(path, folders, list(folders), variant)


def _check_settings(
  path: pathlib.Path, sources: list[SourceModule], model: lavit.LavitModules
) -> None:
  """Raises UserError where settings of the folder and of the model differ.

  A difference that changes no computed number is a warning.
  """
  variant_config = lavit.variant_config(model.variant)
  of_folder = _read_settings(path, sources, model.variant)
  modules = [source.module for source in sources]
  of_model = checkpoint_settings.for_modules(model.settings, modules)
  for group, field in checkpoint_settings.differences(of_folder, of_model):
    in_folder = checkpoint_settings.format_setting(of_folder, group, field, variant_config)
    in_model = checkpoint_settings.format_setting(of_model, group, field, variant_config)
    message = (
      f'{path} has {in_folder} of {group}, not {in_model}; take '
      'settings = torch_settings(path, module), and give them to from_torch, lavit.build and '
      'to_torch'
    )
    if checkpoint_settings.affects_outputs(group, field, of_folder):
      raise UserError(message)
    logging.getLogger(__name__).warning(message)


def _parameter_source(
  mapping: MappedModule,
  dtype: str | None,
  vocab_size: int | None = None,
  allow_nonfinite: bool = False,
) -> ParameterSource:
  """Reads the leaves of a module, one at a time, from its files.

  Args:
    mapping: the module.
    dtype: of the floating leaves; None keeps the dtypes of the files.
    vocab_size: rows of the language model's embedding; None keeps those of the files.
    allow_nonfinite: NaN and infinity are read as they are.
  """
  structs = {
    leaf: vocabulary_growth.grown_struct(leaf, folder.cast(spec, dtype), vocab_size)
    for leaf, spec in mapping.plan.leaves.items()
  }
  names: dict[str, dict[int | None, str]] = {}  # leaf -> layer -> torch name
  for name, slot in mapping.plan.slots.items():
    names.setdefault(slot.leaf, {})[slot.layer] = name

  def read_tensor(leaf: str, layer: int | None) -> np.ndarray:
    name = names[leaf][layer]
    tensor = mapping.state[name]
    array = finite.convert(
      f'{tensor.file}: {name}', np.asarray(tensor), structs[leaf].dtype, allow_nonfinite
    )
    return contiguous(mapping.plan.slots[name].to_leaf(array))

  def read_leaf(leaf: str) -> np.ndarray:
    if leaf not in mapping.plan.stacked:
      return vocabulary_growth.grow_rows(read_tensor(leaf, None), structs[leaf].shape)
    stack = np.empty(structs[leaf].shape, structs[leaf].dtype)
    for layer in names[leaf]:
      stack[layer] = read_tensor(leaf, layer)
    return stack

  def read(
    leaf: str, row: int | None = None, sharding: jax.sharding.Sharding | None = None
  ) -> np.ndarray | jax.Array:
    array = read_leaf(leaf) if row is None else read_tensor(leaf, row)
    if sharding is None:
      return array
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  return ParameterSource(structs, read)
