"""For scripts: PyTorch files straight into parameter trees, and trees into PyTorch files."""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np

from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models import settings as checkpoint_settings
from lavit_jax.weights.store import folder
from lavit_jax.weights.store.arrays import ParameterSource, flatten, unflatten
from lavit_jax.weights.torch import configs, files, finite, formats, mapping, vocabulary_growth


def from_torch(
  path,
  part: str | None = None,
  *,
  variant: str | None = None,
  dtype: str | None = 'float32',
  grow: bool = False,
  shardings: Callable | None = None,
  allow_missing: str = '',
  allow_nonfinite: bool = False,
  settings: Mapping | None = None,
):
  """Reads the weights of a PyTorch folder or file (weights/torch/formats.py), one leaf in memory at a time beside the result.

  Args:
    path: a LaVIT, LLaMA, Stable Diffusion or SDXL folder, or an EVA-CLIP file; with `part`, any folder or file that holds that part alone.
    part: what to read; None reads all there is.
    variant: a row of the variants table; None finds the largest whose shapes the files have.
    dtype: of the floating leaves; None keeps those of the files.
    grow: a language model with the text's rows only gets those of the visual tokens (weights/torch/vocabulary_growth.py).
    shardings: {part: tree of ShapeDtypeStructs} -> the same tree of shardings: leaves then go straight onto the devices.
    allow_missing: regex of torch names that may be missing.
    allow_nonfinite: NaN and infinity in the files are read as they are; otherwise they are an error, as overflow in `dtype` is.
    settings: those that the caller will give `lavit.build` and `to_torch`, `torch_settings(path, part)`; None: the variant's own. A tree
      does not hold them, so they must be those of the folder.

  Returns:
    {part: tree of arrays}, or the tree of `part`.

  Raises:
    UserError: unknown or damaged files, or other settings; PortingError: they do not fit the variant.
  """
  path = pathlib.Path(path)
  found = _of_part(path, part) if part else formats.detect(path)[1]
  model = lavit.build(variant or formats.find_variant(found), settings=settings)
  _check_settings(path, found, model)
  parts = {}
  for name, fit in formats.map_modules(
    model, found, allow_missing, mixed=dtype is not None
  ).items():
    rows = model.vocabulary.size if grow and name == 'llama' else None
    source = _source(fit, dtype, rows, allow_nonfinite)
    places = (
      {} if shardings is None else flatten(shardings({name: unflatten(source.structs)})[name])
    )
    parts[name] = unflatten(
      {leaf: source.read(leaf, sharding=places.get(leaf)) for leaf in source.structs}
    )
  return parts[part] if part else parts


def torch_settings(path, part: str | None = None, *, variant: str | None = None) -> dict[str, dict]:
  """The settings {part: {field: value}} of a PyTorch folder, for `lavit.build`, `from_torch` and `to_torch`, where they are not the variant's own.

  Args:
    path, part, variant: as for `from_torch`.

  Raises:
    UserError: unknown or damaged files, or a description that asks for what the variant does not compute.
  """
  path = pathlib.Path(path)
  found = _of_part(path, part) if part else formats.detect(path)[1]
  return _settings_of(path, found, variant or formats.find_variant(found))


def _settings_of(
  path: pathlib.Path, found: list[formats.SourceModule], variant: str
) -> dict[str, dict]:
  return configs.read_settings(
    path,
    {each.place.part: each.place.folder for each in found},
    [each.place.part for each in found],
    variant,
  )


def _check_settings(
  path: pathlib.Path, found: list[formats.SourceModule], model: lavit.LavitModules
) -> None:
  """Raises UserError where the folder's settings are not the model's; what changes no number that is computed is a warning."""
  row, theirs = lavit.variant_config(model.variant), _settings_of(path, found, model.variant)
  ours = checkpoint_settings.for_modules(model.settings, [each.place.part for each in found])
  for name, field in checkpoint_settings.differences(theirs, ours):
    message = (
      f'{path} has {checkpoint_settings.format_setting(theirs, name, field, row)} of {name}, not {checkpoint_settings.format_setting(ours, name, field, row)}; take '
      'settings = torch_settings(path, part), and give them to from_torch, lavit.build and to_torch'
    )
    if checkpoint_settings.affects_outputs(name, field, theirs):
      raise UserError(message)
    logging.getLogger(__name__).warning(message)


def open_torch(path, part: str, *, variant: str, dtype: str | None = 'float32') -> ParameterSource:
  """A part of a PyTorch folder or file, to be read a leaf or a layer of it at a time. The arguments, and what is raised: as for `from_torch`."""
  found = _of_part(pathlib.Path(path), part)
  return _source(
    formats.map_modules(lavit.build(variant), found, mixed=dtype is not None)[part], dtype
  )


def _source(
  fit: formats.MappedModule,
  dtype: str | None,
  rows: int | None = None,
  allow_nonfinite: bool = False,
) -> ParameterSource:
  """`rows`: of the vocabulary that a language model grows to; None leaves it alone."""
  structs = {
    leaf: vocabulary_growth.grown_struct(leaf, folder.cast(x, dtype), rows)
    for leaf, x in fit.plan.leaves.items()
  }
  slots = {}  # leaf -> layer, or None -> (name, slot, tensor)
  for name, slot in fit.plan.slots.items():
    slots.setdefault(slot.leaf, {})[slot.layer] = name, slot, fit.state[name]

  def one(leaf, layer):
    name, slot, tensor = slots[leaf][layer]
    array = finite.convert(
      f'{tensor.file}: {name}', np.asarray(tensor), structs[leaf].dtype, allow_nonfinite
    )
    return mapping.contiguous(slot.row_of(array))

  def read(leaf, row=None, sharding=None):
    if row is not None or leaf not in fit.plan.stacked:
      array = one(leaf, row)
    else:
      array = np.empty(structs[leaf].shape, structs[leaf].dtype)
      for layer in slots[leaf]:
        array[layer] = one(leaf, layer)
    array = vocabulary_growth.grow_rows(array, structs[leaf].shape) if row is None else array
    return (
      array
      if sharding is None
      else jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    )

  return ParameterSource(structs, read)


def to_torch(
  params, path, part: str, *, variant: str, settings: Mapping | None = None
) -> pathlib.Path:
  """Writes one part under its PyTorch names, in the types of its arrays.

  Args:
    params: the tree.
    path: `FOLDER/NAME.safetensors` for one file; else a folder, that `from_pretrained` of transformers or diffusers loads: shards of
      5 GB under the published name, and the `config.json` of the language model, a U-Net, a VAE or the safety checker.
    settings: of the checkpoint (`torch_settings`, or `folder.read_settings`), which the `config.json` says; None: the variant's own.

  Returns:
    The file, or the folder.

  Raises:
    UserError: it cannot be written; PortingError: the tree is not of this part.
  """
  path, model = pathlib.Path(path), lavit.build(variant, settings=settings)
  file = path.suffix == '.safetensors'
  leaves = {name: np.asarray(x) for name, x in flatten(params).items()}
  tensors = {
    name: slot.array(leaves)
    for name, slot in mapping.slots_of(formats.name_rules(model, part)[0], leaves).items()
  }  # views
  where = (
    (path.parent, path.stem, tensors, 1 << 62)
    if file
    else (path, formats.locations('LaVIT')[part].stems[0], tensors)
  )
  try:
    with files.Writer(*where) as writer:
      for name, array in tensors.items():
        writer.write(name, mapping.contiguous(array))
    if not file and (
      about := formats.description(
        model, part, len(params['embedding']) if part == 'llama' else None
      )
    ):
      (path / 'config.json').write_text(json.dumps(about, indent=2) + '\n')
  except OSError as error:
    raise UserError(
      f'cannot write {path}: {error.strerror}; free some space or choose another place'
    ) from error
  return path


def _of_part(path: pathlib.Path, part: str) -> list[formats.SourceModule]:
  if part not in formats.TABLES:
    raise UserError(f'unknown part {part!r}; known: {", ".join(formats.TABLES)}')
  if path.is_dir() and formats.detect_kind(path):
    return formats.detect(path, part)[1]
  return [formats.found_in(formats.ModuleLocation(part, '', ('',)), files.load(path), path)]
