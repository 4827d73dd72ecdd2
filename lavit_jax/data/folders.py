"""A folder of images -> its entries: with a file of captions, with NAME.txt beside each, or bare.

What is read, in this order:

1. the file `captions` names, or the first of `CAPTIONS` that is there (captions_file.py);
2. every image in the folder and below it, with the captions of NAME.txt beside it, one a line;
3. if no captions are needed, every image; for use 'text', every .txt as one text.

Hidden files (also those that macOS leaves, '._NAME') are left out.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import xxhash

from lavit_jax.data import captions_file, paths
from lavit_jax.data.captions_file import IMAGE_SUFFIXES, Fields
from lavit_jax.errors import UserError
from lavit_jax.local_paths import expand_home

CAPTIONS = (
  'captions.jsonl',
  'captions.csv',
  'captions.tsv',
  'captions.json',
  'metadata.jsonl',
  'metadata.csv',
)
_BESIDE = '.txt'
_SAMPLED = 512  # images that are looked for when a folder is opened, at most
_SHOWN = 3  # names in a message


class Entry(NamedTuple):
  """An image by its name in the folder ('': none), its texts, the file with them ('': none)."""

  name: str
  texts: tuple[str, ...]
  beside: str = ''


class ImageFolder:
  """What a folder holds, each image once, in the order of the file of captions or of the names.

  Args:
    path: the folder, here or wherever fsspec reaches.
    image: the field with the name of the image; None: 'file_name'.
    texts: the fields with the texts, dotted names; (): 'text'.
    captions: the name of the file of captions; None: see above.
    use: of the source; 'text' needs no images.
    captioned: whether texts are needed.
    find_texts: (fields, dotted names) -> all texts there.

  Raises:
    UserError: no such folder or file of captions, a file that cannot be read, no images, no texts.
  """

  def __init__(
    self,
    path: str,
    image: str | None,
    texts: Sequence[str],
    captions: str | None,
    use: str,
    captioned: bool,
    find_texts: Callable[[Mapping[str, Any], Sequence[str]], tuple[str, ...]],
  ):
    self.path = _folder_path(path)
    self.is_text, self.captioned = use == 'text', captioned
    self.entries: list[Entry] = []
    self.file, data = self._open_captions(captions)
    if self.file:
      self._read_captions(data, image, texts, find_texts)
    else:
      self._list(texts)
    self._sampled = self._look()

  def place(self, name: str) -> str:
    """The path of a file that the folder or its file of captions names."""
    if paths.is_remote(name):
      return name
    if paths.is_remote(self.path):
      return f'{self.path}/{name}'
    place = os.path.join(self.path, name)
    if '\\' in name and not os.path.exists(place):  # written on Windows
      return os.path.join(self.path, name.replace('\\', '/'))
    return place

  def texts_of(self, entry: Entry) -> tuple[str, ...]:
    """The texts of an entry, read from the file beside it if there is one.

    Raises:
      UserError: that file is not UTF-8.
      paths.NO_FILE: it is not there any more.
    """
    if not entry.beside or not self.captioned:
      return entry.texts
    file = self.place(entry.beside)
    with paths.open_file(file) as opened:
      text = captions_file.decode(file, opened.read())
    if self.is_text:
      return (text,)
    return tuple(line for line in text.split('\n') if line.strip())

  def digest(self) -> str:
    """What tells the folder from one whose captions or images were changed: the texts, and the
    sizes of the images (of 512 at most).
    """
    content = xxhash.xxh64(json.dumps(self._sampled).encode())
    if self.captioned:
      for entry in self.entries:
        content.update(json.dumps(entry.texts).encode())
      for entry in _sample([entry for entry in self.entries if entry.beside]):
        content.update(json.dumps(self.texts_of(entry)).encode())
    return content.hexdigest()[:8]

  # ------------------------------------------------------------------------------ what is there

  def _open_captions(self, captions: str | None) -> tuple[str, bytes]:
    """(path of the file of captions, its content); ('', b'') if there is none."""
    present, data = [], b''
    captions = expand_home(captions) if captions else None
    for name in [captions] if captions else CAPTIONS:
      try:
        file = self.place(name)
        with paths.open_file(file) as opened:
          data = data if present else opened.read()
        present.append(file)
      except paths.NO_FILE:
        continue
    if captions and not present:
      raise UserError(f'{self.path} has no file {captions!r}; it has {self._shown()}')
    if len(present) > 1:
      others = ', '.join(os.path.basename(file) for file in present[1:])
      logging.getLogger(__name__).warning(
        '%s is read, and not %s; say which with captions=', present[0], others
      )
    return (present[0], data) if present else ('', b'')

  def _read_captions(
    self, data: bytes, image: str | None, texts: Sequence[str], find_texts: Callable
  ) -> None:
    rows = captions_file.read_rows(self.file, data, Fields(image or '', tuple(texts)))
    if not rows:
      raise UserError(f'{self.file} has no rows; give it file_name and text of each image')
    fields = captions_file.choose_fields(
      self.file, rows, image, texts, needs_name=not self.is_text, needs_text=self.captioned
    )
    found = {}
    for number, row in enumerate(rows):
      name = number if not fields.name else row.fields.get(fields.name)
      if fields.name and (not isinstance(name, str) or not name.strip()):
        where = f'{self.file}:{row.line}' if row.line else f'{self.file}: entry {number}'
        raise UserError(f'{where}: {fields.name} is {name!r}; give the name of an image')
      mine = found.setdefault(name, [])
      for each in fields.texts:
        mine += _text_of(row.fields, each, find_texts)
    for name, mine in found.items():
      self.entries.append(Entry(name.strip() if fields.name else '', tuple(mine)))
    empty = all(not text.strip() for entry in self.entries for text in entry.texts)
    if self.captioned and empty:
      raise UserError(
        f'{self.file}: none of {len(rows)} rows has a text in '
        f'{" or ".join(map(repr, fields.texts))}; name the field with text='
      )

  def _list(self, texts: Sequence[str]) -> None:
    names = self._names()
    known, beside = set(names), 0
    for name in names:
      if self.is_text:
        if name.lower().endswith(_BESIDE):
          self.entries.append(Entry('', (), name))
      elif name.lower().endswith(IMAGE_SUFFIXES):
        candidates = (os.path.splitext(name)[0] + _BESIDE, name + _BESIDE)
        text = next((each for each in candidates if each in known), '')
        self.entries.append(Entry(name, (), text))
        beside += bool(text)
    there = f'it has {_some(names)}'
    if not self.entries:
      kind = f'file that ends with {_BESIDE}' if self.is_text else 'image'
      raise UserError(
        f'{self.path} has no {" or ".join(CAPTIONS)}, nor any {kind}; {there}; check '
        'the path, or give captions=NAME'
      )
    if self.captioned and not self.is_text and not beside:
      raise UserError(
        f'{self.path} has no {" or ".join(CAPTIONS)}, nor NAME{_BESIDE} beside an '
        f'image; {there}; write one with file_name and text of each image, or give '
        'captions=NAME'
      )
    if texts and not self.is_text:
      raise UserError(
        f'{self.path} has no {" or ".join(CAPTIONS)}, whose field '
        f'text={", ".join(texts)!r} would name; {there}; leave it out'
      )

  def _names(self) -> list[str]:
    """All files in the folder and below it, relative, sorted, hidden ones left out."""
    names = []
    if paths.is_remote(self.path):
      names = paths.names_below(self.path)
    for folder, deeper, files in os.walk(self.path):
      deeper[:] = [name for name in deeper if not name.startswith('.')]
      for name in files:
        names.append(os.path.relpath(os.path.join(folder, name), self.path))
    visible = [name for name in names if not os.path.basename(name).startswith('.')]
    return sorted(visible, key=lambda name: name.split('/'))

  def _shown(self) -> str:
    return _some(self._names())

  def _look(self) -> list[tuple[str, int | None]]:
    """Name and size of the images, of 512 at most.

    Raises:
      UserError: none of them is there.
    """
    if self.is_text:
      return []
    sampled = _sample(self.entries)
    sizes = paths.names_and_sizes([self.place(entry.name) for entry in sampled])
    if all(size == -1 for _, size in sizes):
      raise UserError(
        f'{self.file} names {len(self.entries)} images, such as {sampled[0].name!r}, '
        f'and none of {len(sizes)} that were looked for is in {self.path}; it has '
        f'{self._shown()}'
      )
    return [(entry.name, size) for entry, (_, size) in zip(sampled, sizes)]


def _folder_path(path: str) -> str:
  if not isinstance(path, (str, os.PathLike)):
    raise UserError(f'path {path!r} is not one folder; give each folder a source of its own')
  path = os.fspath(path).removeprefix('file://')
  if paths.is_remote(path):
    return path.rstrip('/')
  path = expand_home(path)
  if os.path.isdir(path):
    return path.rstrip('/') or '/'
  if os.path.exists(path):
    folder, name = os.path.split(path)
    raise UserError(
      f'{path} is a file; give the folder, path={folder or "."!r}, and, if it is the '
      f'file of captions, captions={name!r}'
    )
  raise UserError(f'{path}: no such folder; check the path')


def _text_of(fields: Mapping[str, Any], name: str, find_texts: Callable) -> tuple[str, ...]:
  """The texts at a dotted name; a field of the whole name goes first."""
  if name in fields:
    return find_texts({'text': fields[name]}, ('text',))
  return find_texts(fields, (name,))


def _sample(entries: Sequence[Entry]) -> list[Entry]:
  """All, or 512 that are spread evenly."""
  if len(entries) <= _SAMPLED:
    return list(entries)
  return [entries[i * (len(entries) - 1) // (_SAMPLED - 1)] for i in range(_SAMPLED)]


def _some(names: Sequence[str]) -> str:
  """'8 files (a, b, c ...)'"""
  if not names:
    return 'no files'
  more = ' ...' if len(names) > _SHOWN else ''
  return f'{len(names)} files ({", ".join(names[:_SHOWN])}{more})'
