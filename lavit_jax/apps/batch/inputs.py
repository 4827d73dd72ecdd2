"""The rows of a batch: from the arguments of a command, or from a file of JSON lines."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lavit_jax.apps.batch.tasks import Row, Task
from lavit_jax.data.images import IMAGE_SUFFIXES, read_images
from lavit_jax.errors import UserError
from lavit_jax.local_paths import expand_home

EXAMPLES = {
  'image': 'cat.png',
  'question': 'What is this?',
  'prompt': 'a cat',
  'parts': ['cat.png', 'on a red background'],
}
ARGUMENTS = {'image': 'IMAGE', 'question': 'QUESTION', 'prompt': 'TEXT', 'parts': 'IMAGE or TEXT'}


class Inputs(NamedTuple):
  """The rows of a batch.

  Attributes:
    rows: one dict for each, with the keys that the task reads.
    folder: the folder that the relative paths of images refer to.
    many: whether a row with an error gets a result line with an 'error', and the others go on;
      otherwise the error ends the run.
  """

  rows: list[Row]
  folder: pathlib.Path
  many: bool


def resolve_inputs(
  task: Task, arguments: Sequence[str], path: str | None, out: str | None
) -> Inputs:
  """The rows of a command.

  Args:
    task: what they are for.
    arguments: images, folders and texts on the command line; a folder stands for all its images.
    path: a file of JSON lines, in place of `arguments`.
    out: the destination of the results; images in it are not inputs.

  Raises:
    UserError: neither arguments nor a file are given, or both; an image where a question should be;
      what `read_rows` and `find_images` raise.
  """
  if path is not None:
    if arguments:
      raise UserError(f'both {arguments[0]!r} and --input {path} are given; give one of them')
    return Inputs(read_rows(path, task.inputs, task.outputs), pathlib.Path(path).parent, True)
  required = [ARGUMENTS[key] for key in task.inputs]
  missing = required[len(arguments) :]
  if missing:
    raise UserError(f'required: {", ".join(missing)}; name it, or give rows by --input ROWS.jsonl')
  folders = [os.path.isdir(expand_home(argument)) for argument in arguments]
  here = pathlib.Path()
  if task.inputs == ('prompt',):
    return Inputs([{'prompt': text} for text in arguments], here, False)
  if task.inputs == ('parts',):
    return Inputs(_parts_rows(arguments, folders, out), here, any(folders))
  if 'question' in task.inputs:
    return Inputs(_question_rows(task, arguments, out), here, folders[0])
  rows = [{'image': image} for image in find_images(arguments, out)]
  return Inputs(rows, here, any(folders) or len(arguments) > 1)


def _parts_rows(arguments: Sequence[str], folders: Sequence[bool], out: str | None) -> list[Row]:
  """One prompt; with a folder among the arguments, one for each of its images."""
  if sum(folders) > 1:
    raise UserError('several folders are given; name one folder, and images and texts besides it')
  choices = []
  for argument, is_folder in zip(arguments, folders, strict=True):
    choices.append(find_images([argument], out) if is_folder else [argument])
  return [{'parts': list(parts)} for parts in itertools.product(*choices)]


def _question_rows(task: Task, arguments: Sequence[str], out: str | None) -> list[Row]:
  """Every question about every image."""
  source, *questions = arguments
  for question in questions:
    if is_image_path(question) or os.path.exists(question):
      raise UserError(
        f'{question!r} is an image or a file, not a question; name one image or folder at a time, '
        f'IMAGE QUESTION ..., or give rows by --input ROWS.jsonl: {example_row(task.inputs)}'
      )
  rows = []
  for image in find_images([source], out):
    rows += [{'image': image, 'question': question} for question in questions]
  return rows


def find_images(paths: Sequence[str], exclude: str | None = None) -> list[str]:
  """Image files: files as they are, folders as the images in them.

  Images are found at any depth, by suffix, ordered by path; hidden files and folders are skipped.

  Args:
    paths: files and folders.
    exclude: the folder that results go to, which is skipped inside a folder.

  Raises:
    UserError: a folder has no images, or is `exclude` itself.
  """
  excluded = os.path.realpath(exclude) if exclude else None
  images = []
  for path in map(expand_home, paths):
    if not os.path.isdir(path):
      images.append(path)
      continue
    if os.path.realpath(path) == excluded:
      raise UserError(f'{path} is both read and written; give --out another folder')
    inside = _images_in_folder(path, excluded)
    if not inside:
      raise UserError(
        f'{path}: no images in this folder; their names end in {", ".join(IMAGE_SUFFIXES)}'
      )
    images += inside
  return images


def _images_in_folder(path: str, excluded: str | None) -> list[str]:
  images = []
  for folder, subfolders, names in os.walk(path):
    visible = [name for name in subfolders if not name.startswith('.')]
    subfolders[:] = [  # os.walk goes on into these
      name for name in visible if os.path.realpath(os.path.join(folder, name)) != excluded
    ]
    for name in names:
      if is_image_path(name) and not name.startswith('.'):
        images.append(os.path.join(folder, name))
  return sorted(images, key=lambda image: image.split(os.sep))


def is_image_path(path: str) -> bool:
  """Whether a name or path has the suffix of an image file."""
  return path.lower().endswith(IMAGE_SUFFIXES)


def read_rows(path: str, keys: Sequence[str], outputs: Sequence[str]) -> list[Row]:
  """The rows of a file of JSON lines; blank lines are skipped, keys of no task are kept.

  Args:
    path: the file.
    keys: the keys that every row must have: 'image', 'question', 'prompt' (texts), 'parts' (a
      list of texts).
    outputs: the keys that the task writes, which no row may have.

  Raises:
    UserError: the file cannot be read or has no rows; the number of a line that is no such row.
  """
  try:
    lines = pathlib.Path(path).read_text(encoding='utf-8').split('\n')
  except (OSError, UnicodeDecodeError) as error:
    reason = getattr(error, 'strerror', 'not UTF-8')
    raise UserError(
      f'{path} cannot be read ({reason}); give --input a file of JSON lines'
    ) from None
  rows = []
  for number, line in enumerate(lines, 1):
    if line.strip():
      rows.append(_parse_row(f'{path}:{number}', line, keys, outputs))
  if not rows:
    raise UserError(f'{path} has no rows; give it lines such as {example_row(keys)}')
  return rows


def _parse_row(where: str, line: str, keys: Sequence[str], outputs: Sequence[str]) -> Row:
  try:
    row = json.loads(line)
  except ValueError as error:
    raise UserError(f'{where} is not JSON ({error}); give one object on each line') from None
  for key in keys:
    if not isinstance(row, dict) or not _is_valid(key, row.get(key)):
      kind = 'list of texts' if key == 'parts' else 'text'
      raise UserError(
        f'{where} has no {key!r} that is a {kind}; give each line {example_row(keys)}'
      )
  reserved = sorted(row.keys() & {*outputs, 'error', 'settings'})
  if reserved:
    raise UserError(f'{where} has the key {reserved[0]!r}, which the result has too; rename it')
  return row


def _is_valid(key: str, value: Any) -> bool:
  if key != 'parts':
    return isinstance(value, str)
  return isinstance(value, list) and bool(value) and all(isinstance(part, str) for part in value)


def example_row(keys: Sequence[str]) -> str:
  """A row of --input with these keys, for error messages."""
  return json.dumps({key: EXAMPLES[key] for key in keys})


def load_inputs(row: Row, keys: Sequence[str], folder: pathlib.Path, size: int) -> dict[str, Any]:
  """The inputs of a row, with images read.

  Args:
    row: texts under `keys`.
    keys: what to load: 'image' is an image; a text of 'parts' is an image if it is a file or has
      the suffix of one.
    folder: the folder of relative paths.
    size: images become uint8[size, size, 3].

  Raises:
    UserError: what `read_images` raises; a text that JSON can hold and UTF-8 cannot, such as half
      a surrogate pair.
  """
  inputs = {}
  for key in keys:
    if key == 'parts':
      inputs[key] = [_load_input(key, text, folder, size) for text in row[key]]
    else:
      inputs[key] = _load_input(key, row[key], folder, size)
  return inputs


def _load_input(key: str, text: str, folder: pathlib.Path, size: int) -> str | np.ndarray:
  path = text if text.startswith('file:') else folder / expand_home(text)
  try:
    is_image = key == 'image'
    if key == 'parts':
      is_image = is_image_path(text) or os.path.isfile(path)
    if is_image:
      return read_images(path, size)[0]
    return text.encode().decode()
  except ValueError as error:
    raise UserError(f'{text!r} is not a valid text or path ({error}); correct it') from None
