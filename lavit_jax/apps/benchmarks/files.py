"""What to evaluate: annotations as JSON, images in folders, and digests of both."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from lavit_jax.errors import UserError

T = TypeVar('T')


class Record(NamedTuple):
  """One image to caption, or one question about an image.

  Attributes:
    id: of the image or of the question, as in the official file.
    image: name of the image file.
    references: the captions or answers of annotators.
    question: empty for captions.
    groups: name of a kind -> the record's, such as {'answer_type': 'number'}; the metrics are also
      computed for each.
  """

  id: int | str
  image: str
  references: list[str]
  question: str = ''
  groups: Mapping[str, str] = {}


class DataSet(NamedTuple):
  """The records of a benchmark.

  Attributes:
    records: in the order of the official file.
    files: what was read.
  """

  records: list[Record]
  files: list[pathlib.Path]


class Request(NamedTuple):
  """What to evaluate, and where.

  Attributes:
    benchmark: a name of `BENCHMARKS`.
    protocol: 'lavit' or 'standard'.
    data: the folder of the annotation files.
    images: the folder of the images; not read by GenEval.
    out: the folder for results.
    share: (i, n) computes the i-th of n shares.
    limit: the number of records, the first; None for all.
    inception: the weights of the FID's network.
    clip: the folder of a CLIP.
  """

  benchmark: str
  protocol: str
  data: pathlib.Path
  images: pathlib.Path
  out: pathlib.Path
  share: tuple[int, int] = (0, 1)
  limit: int | None = None
  inception: pathlib.Path | None = None
  clip: pathlib.Path | None = None


class Official(NamedTuple):
  """An official annotation file.

  Attributes:
    name: of the file.
    origin: the page that has it.
    key: what its JSON object has; '' if the file is another object or a list.
  """

  name: str
  origin: str
  key: str = ''

  def read(self, folder: pathlib.Path) -> Any:
    """Reads the file in a folder; returns the value of `key`, or the whole.

    Raises:
      UserError: the file is missing, not JSON, or another one.
    """
    path = folder / self.name
    try:
      content = json.loads(path.read_bytes())
    except OSError as error:
      raise UserError(
        f'{path} cannot be read ({error.strerror}); it comes from {self.origin}, unpacked as it is'
      ) from None
    except ValueError as error:
      raise self.wrong(folder, f'is not JSON ({error})') from None
    if not self.key:
      return content
    if not isinstance(content, dict) or not isinstance(content.get(self.key), list):
      raise self.wrong(folder, f'has no list {self.key!r}')
    return content[self.key]

  def wrong(self, folder: pathlib.Path, reason: str) -> UserError:
    """The error for a file that is another one than the official."""
    return UserError(f'{folder / self.name} {reason}; take the file as it comes from {self.origin}')

  def parse(
    self, folder: pathlib.Path, items: Any, parse_item: Callable[[Any], Record]
  ) -> list[Record]:
    """Makes a record of each item of the file.

    Raises:
      UserError: there are none, or an item lacks a field; the error has its index.
    """
    records = []
    for index, item in enumerate(items):
      try:
        records.append(parse_item(item))
      except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise self.wrong(folder, f'has an unexpected item {index} ({error!r})') from None
    if not records:
      raise self.wrong(folder, 'has no items')
    return records


def by_group(records: Sequence[Record], values: Sequence[T]) -> dict[str, dict[str, list[T]]]:
  """Sorts values of records by the groups of these: kind -> group -> values."""
  sorted_values: dict[str, dict[str, list[T]]] = {}
  for record, value in zip(records, values, strict=True):
    for kind, group in record.groups.items():
      sorted_values.setdefault(kind, {}).setdefault(group, []).append(value)
  return {kind: dict(sorted(groups.items())) for kind, groups in sorted_values.items()}


def find_images(
  folder: pathlib.Path, names: Sequence[str], subfolders: Sequence[str], origin: str
) -> list[str]:
  """Returns the paths of images, relative to the folder.

  Args:
    folder: of all images.
    names: of the image files.
    subfolders: where the files may be instead; the first that has the first image is taken.
    origin: the page that has the images.

  Raises:
    UserError: images are missing; the error has their number and the first.
  """
  chosen = next((sub for sub in subfolders if (folder / sub / names[0]).exists()), subfolders[0])
  listings: dict[str, set[str]] = {}
  paths = []
  missing = []
  for name in names:
    path = os.path.join(chosen, name)
    parent, base = os.path.split(path)
    if parent not in listings:
      place = folder / parent
      listings[parent] = set(os.listdir(place)) if place.is_dir() else set()
    if base not in listings[parent]:
      missing.append(path)
    paths.append(path)
  if missing:
    raise UserError(
      f'{folder} lacks {len(missing)} of {len(names)} images, the first: {missing[0]}; '
      f'they come from {origin}'
    )
  return paths


def file_digest(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def folder_digest(folder: str | os.PathLike) -> str:
  """Returns the SHA-256 of the paths and contents of all files of a folder but hidden ones."""
  digest = hashlib.sha256()
  for path in sorted(pathlib.Path(folder).rglob('*')):
    relative = path.relative_to(folder)
    if path.is_file() and not any(part.startswith('.') for part in relative.parts):
      digest.update(f'{relative.as_posix()}\0{file_digest(path)}\n'.encode())
  return digest.hexdigest()
