"""What a conversion does not take of its source: so that nothing is left out without a word."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

from lavit_jax.data.text import TextTokenizer
from lavit_jax.errors import UserError
from lavit_jax.weights.torch import formats, weight_files

LISTED = 6  # names in a line
DESCRIBED = ('llama', 'unet', 'vae', 'highres_unet', 'highres_vae')  # modules with a config.json


def notes(
  src: pathlib.Path, kind: str, found: list[formats.SourceModule], text_size: int
) -> list[str]:
  """Lines that say what of a PyTorch folder is not converted, and which of several editions is taken.

  Args:
    src, kind, found: the source, as `formats.detect` sees it.
    text_size: words of the variant's vocabulary.
  """
  lines = []
  for each in found:
    if each.others:
      lines.append(
        f'{each.place.part}: {len(each.others)} tensors of another model in the same file are left out: {_listed(each.others)}'
      )
    if each.tied:
      lines.append(
        f'{each.place.part}: {each.tied} is not in the files, for config.json has tie_word_embeddings; embedding and head are one '
        'tensor, of which the way back writes one'
      )
  return lines + (_of_folder(src, kind, found, text_size) if src.is_dir() else [])


def taken_files(found: list[formats.SourceModule]) -> set[pathlib.Path]:
  """The weight files that a conversion reads."""
  return {tensor.file for each in found for tensor in each.merged.values()}


def other_editions(src: pathlib.Path, found: list[formats.SourceModule]) -> list[pathlib.Path]:
  """Files with other editions of the weights that are taken, and the lists of the shards of these and of those."""
  places = {(src / each.place.folder, stem) for each in found for stem in each.place.stems}
  places |= {
    (src / each.place.overlay[0], each.place.overlay[1]) for each in found if each.place.overlay
  }
  known = [
    file
    for folder, stem in places
    if folder.is_dir()
    for file in folder.iterdir()
    if weight_files.parse(file.name, stem)
  ]
  return sorted(set(known) - taken_files(found))


def _of_folder(
  src: pathlib.Path, kind: str, found: list[formats.SourceModule], text_size: int
) -> list[str]:
  lines, aside = [], other_editions(src, found)
  for each in found:
    folder = src / each.place.folder
    beside = [
      file.name
      for file in aside
      if file.parent == folder and _same_place(file, each) and not file.name.endswith('.json')
    ]
    if beside and each.edition:
      lines.append(
        f'{each.place.part}: {each.edition.name} is taken, not {_listed(beside)} beside it (the rule: {weight_files.RULE}; '
        '--weights-variant chooses another)'
      )
  taken = taken_files(found) | set(aside)
  weights = [
    file
    for file in sorted(src.rglob('*'))
    if file.is_file() and weight_files.is_weights(file.name) and file not in taken
  ]
  weights = [
    file.relative_to(src).as_posix() for file in weights if not file.name.endswith('.json')
  ]
  if weights:
    lines.append(
      f'not converted, but copied as they are into torch/: {len(weights)} files with weights of other models: {_listed(weights)}'
    )
  lines += _without_description(src, kind, found)
  parts = {each.place.part for each in found}
  strange = {str(pathlib.PurePosixPath(name).parent) for name in weights}
  for part, place in formats.locations(kind).items():
    if part not in parts and place.folder == 'visual_tokenizer' and place.folder in strange:
      lines.append(
        f'{part}: {place.folder}/ holds no {place.stems[0]}, so the result has no {part}'
      )
  for part, place in formats.locations(kind).items():
    if (
      part not in parts
      and place.folder
      and place.stems[0] in weight_files.STEMS
      and (src / place.folder).is_dir()
    ):
      lines.append(f'{part}: {place.folder}/ holds no weights, so the result has no {part}')
  return lines + _of_tokenizer(src, text_size)


def _without_description(
  src: pathlib.Path, kind: str, found: list[formats.SourceModule]
) -> list[str]:
  """Lines for modules whose description is not there: nothing says whether they compute otherwise."""
  lines = []
  for each in found:
    part, folder = each.place.part, src / each.place.folder
    if part not in DESCRIBED:
      continue
    files = [folder / 'config.json']
    if part.endswith('unet'):
      files.append(folder.parent / 'scheduler' / 'scheduler_config.json')
    for file in files:
      if not file.exists():
        lines.append(
          f"{part}: {file.relative_to(src).as_posix()} is not there, so the variant's own values are taken, unchecked"
        )
  return lines


def _of_tokenizer(src: pathlib.Path, text_size: int) -> list[str]:
  for where in (src / 'language_model', src):
    if any((where / name).is_file() for name in ('tokenizer.model', 'tokenizer.json')):
      try:
        TextTokenizer.load(where, text_size)
      except UserError as error:
        return [
          f'tokenizer: the tokenizer of {where.name}/ will not open with this model ({error})'
        ]
      return []
  return []


def _same_place(file: pathlib.Path, each: formats.SourceModule) -> bool:
  return any(weight_files.parse(file.name, stem) for stem in each.place.stems)


def _listed(names: Iterable[str]) -> str:
  names = list(names)
  more = f' and {len(names) - LISTED} more' if len(names) > LISTED else ''
  return ', '.join(names[:LISTED]) + more
