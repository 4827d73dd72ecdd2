"""Notes of a conversion: which settings it follows, and what of its source it does not convert."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Iterable, Mapping

from lavit_jax.data.text import TextTokenizer
from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models import settings as checkpoint_settings
from lavit_jax.weights.torch import configs, formats, weight_files
from lavit_jax.weights.torch.formats import ModuleLocation, SourceModule

MAX_LISTED = 6  # names in a line
DESCRIBED = ('llama', 'unet', 'vae', 'highres_unet', 'highres_vae')  # modules with a config.json
ALWAYS_NOTED = {  # settings group -> fields that are noted even if they are the variant's own
  'llama': ('rope_theta', 'rms_norm_eps', 'max_position_embeddings'),
  'vae': ('scaling_factor',),
  'highres_vae': ('scaling_factor',),
  'scheduler': ('prediction_type',),
  'highres_scheduler': ('prediction_type',),
}


# --- Settings --------------------------------------------------------------------------------


def settings_notes(
  origins: Mapping[str, str], settings: Mapping[str, Mapping], variant: str
) -> list[str]:
  """Lines that say which settings of the model follow the source.

  Args:
    origins: settings group -> the file of the source that has it.
    settings: {group: {field: value}}, those that differ from the variant's own.
    variant: of the model.

  Returns:
    A line for each group: the fields of `ALWAYS_NOTED`, and those that differ from the variant's
    own, with that value.
  """
  lines = []
  variant_config = lavit.variant_config(variant)
  for group, file in origins.items():
    values = []
    for field in checkpoint_settings.GROUPS[group].fields:
      value = checkpoint_settings.format_setting(settings, group, field, variant_config)
      if field in settings.get(group, {}):
        own = checkpoint_settings.format_setting({}, group, field, variant_config)
        values.append(f'{value} (the variant: {own.removeprefix(f"{field}=")})')
      elif field in ALWAYS_NOTED.get(group, ()):
        values.append(value)
    if values:
      lines.append(f'{group}: {file} sets {", ".join(values)}')
  return lines


def description_names(src: pathlib.Path, folders: Mapping[str, str]) -> dict[str, str]:
  """By settings group: the description that has it, relative to a PyTorch folder.

  Args:
    src: the folder, or a single file, which has none.
    folders: module -> its folder in `src`.
  """
  files = configs.settings_files(src, folders, list(folders))
  return {group: file.relative_to(src).as_posix() for group, file in files.items()}


# --- What is not converted -------------------------------------------------------------------


def source_notes(
  src: pathlib.Path, kind: str, sources: list[SourceModule], model: lavit.LavitModules
) -> list[str]:
  """Lines that say what is not converted, and which of several editions of the weights is read.

  Args:
    src: the source.
    kind: of the source.
    sources: its modules.
    model: of the variant, with the sizes of the source.
  """
  lines = _tensor_notes(sources)
  if src.is_dir():
    lines += _edition_notes(src, sources)
    other_weights = _other_weights(src, sources)
    if other_weights:
      lines.append(
        f'not converted, but copied as they are into torch/: {len(other_weights)} files with '
        f'weights of other models: {_listed(other_weights)}'
      )
    lines += _missing_descriptions(src, sources)
    lines += _absent_modules(src, kind, sources, other_weights)
    lines += _tokenizer_notes(src, model)
  return lines


def converted_files(sources: Iterable[SourceModule]) -> set[pathlib.Path]:
  """The weight files that a conversion reads."""
  files = set()
  for source in sources:
    files.update(tensor.file for tensor in source.merged.values())
  return files


def other_editions(src: pathlib.Path, sources: list[SourceModule]) -> list[pathlib.Path]:
  """The files of other editions of the weights that are read, and the indexes of all editions."""
  stems: set[tuple[str, str]] = set()  # (folder, stem)
  for source in sources:
    location = source.location
    stems.update((location.folder, stem) for stem in location.stems)
    if location.overlay is not None:
      stems.add(location.overlay)
  files = set()
  for where, stem in stems:
    folder = src / where
    if folder.is_dir():
      files.update(file for file in folder.iterdir() if weight_files.parse(file.name, stem))
  return sorted(files - converted_files(sources))


def other_tensors(names: Collection[str]) -> str:
  """The line for tensors in the files that belong to no module."""
  return (
    f'not converted, but copied as they are into torch/: {len(names)} tensors of other models: '
    f'{_listed(names)}'
  )


def _tensor_notes(sources: list[SourceModule]) -> list[str]:
  """Lines for tensors of other models, and for tied ones."""
  lines = []
  for source in sources:
    if source.others:
      lines.append(
        f'{source.module}: {len(source.others)} tensors of another model in the same file are left '
        f'out: {_listed(source.others)}'
      )
    if source.tied:
      lines.append(
        f'{source.module}: {source.tied} is not in the files, since config.json has '
        'tie_word_embeddings; embedding and head are one tensor, and the way back writes one'
      )
  return lines


def _edition_notes(src: pathlib.Path, sources: list[SourceModule]) -> list[str]:
  """Lines for modules of which the folder has several editions."""
  lines = []
  others = [file for file in other_editions(src, sources) if file.suffix != '.json']
  for source in sources:
    folder = src / source.location.folder
    beside = [
      file.name for file in others if file.parent == folder and _has_stem(file, source.location)
    ]
    if beside and source.edition is not None:
      lines.append(
        f'{source.module}: {source.edition.name} is read, not {_listed(beside)} beside it '
        f'(the rule: {weight_files.RULE}; --weights-variant chooses another)'
      )
  return lines


def _has_stem(file: pathlib.Path, location: ModuleLocation) -> bool:
  return any(weight_files.parse(file.name, stem) for stem in location.stems)


def _other_weights(src: pathlib.Path, sources: list[SourceModule]) -> list[str]:
  """Weight files of models that are not converted, relative to the source."""
  of_modules = converted_files(sources) | set(other_editions(src, sources))
  return [
    file.relative_to(src).as_posix()
    for file in sorted(src.rglob('*'))
    if file.is_file()
    and weight_files.is_weights(file.name)
    and file.suffix != '.json'
    and file not in of_modules
  ]


def _missing_descriptions(src: pathlib.Path, sources: list[SourceModule]) -> list[str]:
  """Lines for modules without their description: nothing says whether they compute otherwise."""
  lines = []
  for source in sources:
    if source.module not in DESCRIBED:
      continue
    folder = src / source.location.folder
    files = [folder / 'config.json']
    if source.module.endswith('unet'):
      files.append(folder.parent / 'scheduler' / 'scheduler_config.json')
    lines += [
      f'{source.module}: {file.relative_to(src).as_posix()} is missing, '
      "so the variant's own values are used, unchecked"
      for file in files
      if not file.exists()
    ]
  return lines


def _absent_modules(
  src: pathlib.Path, kind: str, sources: Collection[SourceModule], other_weights: Iterable[str]
) -> list[str]:
  """Lines for modules whose folder is there without their weights."""
  converted = {source.module for source in sources}
  absent = [
    location for location in formats.locations(kind).values() if location.module not in converted
  ]
  folders_with_other_weights = {str(pathlib.PurePosixPath(file).parent) for file in other_weights}
  lines = []
  for location in absent:
    folder = location.folder
    if folder == 'visual_tokenizer' and folder in folders_with_other_weights:
      lines.append(
        f'{location.module}: {folder}/ holds no {location.stems[0]}, '
        f'so the result has no {location.module}'
      )
  for location in absent:
    has_own_folder = location.folder and location.stems[0] in weight_files.STEMS
    if has_own_folder and (src / location.folder).is_dir():
      lines.append(
        f'{location.module}: {location.folder}/ holds no weights, '
        f'so the result has no {location.module}'
      )
  return lines


def _tokenizer_notes(src: pathlib.Path, model: lavit.LavitModules) -> list[str]:
  """A line for a tokenizer that does not load with this vocabulary."""
  for folder in (src / 'language_model', src):
    if not any((folder / name).is_file() for name in ('tokenizer.model', 'tokenizer.json')):
      continue
    try:
      TextTokenizer.load(folder, model.vocabulary.text_size, model.has_padded_vocabulary)
    except UserError as error:
      return [f'tokenizer: the tokenizer of {folder.name}/ will not open with this model ({error})']
    return []
  return []


def _listed(names: Collection[str]) -> str:
  shown = ', '.join(list(names)[:MAX_LISTED])
  hidden = len(names) - MAX_LISTED
  return f'{shown} and {hidden} more' if hidden > 0 else shown
