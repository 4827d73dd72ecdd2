"""Lists the entries of a folder of images: with a file of captions, with NAME.txt files, or bare.

The sources of the entries, in this order:

1. the file that `captions` names, or the first of `CAPTIONS` that exists (captions_file.py);
2. every image in the folder and below it, with the captions of NAME.txt beside it, one a line;
3. if no captions are needed, every image; for use 'text', every .txt as one text.

For the uses 'chat' and 'answer' there is a file of conversations or questions instead, and an entry
is one of these (conversations.py).

Hidden files are left out, also those that macOS writes ('._NAME').
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import xxhash

from lavit_jax.data import captions_file, paths
from lavit_jax.data.captions_fields import Fields, Row, choose_fields
from lavit_jax.data.conversations import read_dialogs
from lavit_jax.data.images import IMAGE_SUFFIXES
from lavit_jax.data.tasks import DIALOGS
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
_TEXT_SUFFIX = '.txt'
_MAX_SAMPLES = 512  # images that are looked up when a folder is opened
_MAX_SHOWN_NAMES = 3  # in a message

FindTexts = Callable[[Mapping[str, Any], Sequence[str]], tuple[str, ...]]


class Entry(NamedTuple):
  """One image of a folder, or one text.

  Attributes:
    name: of the image in the folder; '' for a text.
    texts: from the file of captions.
    beside: name of the file with its texts; '' if there is none.
    more_names: of the images after the first, of a conversation.
  """

  name: str
  texts: tuple[str, ...]
  beside: str = ''
  more_names: tuple[str, ...] = ()


class ImageFolder:
  """The entries of a folder, each image once, in the order of the file of captions or of the names.

  Args:
    path: the folder, here or wherever fsspec reaches.
    image: the field with the name of the image; None stands for 'file_name'.
    texts: the fields with the texts, dotted names; () stands for 'text'.
    captions: the name of the file of captions; None to look for one.
    use: of the source; 'text' needs no images.
    captioned: whether texts are needed.
    annotations: the name of the official file of answers, if `captions` has questions of VQA.
    find_texts: (fields of a row, dotted names) -> all texts under these names.

  Attributes:
    path: the folder.
    file: path of the file of captions; '' if there is none.
    is_text: whether the entries are texts without images.
    entries: what the folder has.

  Raises:
    UserError: there is no such folder or file of captions, a file cannot be read, or there are no
      images or no texts.
  """

  def __init__(
    self,
    path: str,
    image: str | None,
    texts: Sequence[str],
    captions: str | None,
    use: str,
    captioned: bool,
    annotations: str | None,
    find_texts: FindTexts,
  ):
    self.path = _check_folder(path)
    self.is_text = use == 'text'
    self.captioned = captioned
    self.use = use
    self.file, data = self._open_captions(captions)
    if use in DIALOGS:
      self.entries = self._read_dialogs(data, image, texts, annotations, find_texts)
    elif self.file:
      self.entries = self._read_captions(data, image, texts, find_texts)
    else:
      self.entries = self._list_entries(texts)
    self._sample_sizes = self._look_up_images()

  def file_path(self, name: str) -> str:
    """Returns the path of a file that the folder or its file of captions names."""
    if paths.is_remote(name):
      return name
    if paths.is_remote(self.path):
      return f'{self.path}/{name}'
    path = os.path.join(self.path, name)
    if '\\' in name and not os.path.exists(path):  # a path as Windows writes it
      return os.path.join(self.path, name.replace('\\', '/'))
    return path

  def read_texts(self, entry: Entry) -> tuple[str, ...]:
    """Returns the texts of an entry; those in a file beside it are read now.

    Raises:
      UserError: that file is not UTF-8.
      paths.NO_FILE_ERRORS: that file does not exist any more.
    """
    if not entry.beside or not self.captioned:
      return entry.texts
    path = self.file_path(entry.beside)
    with paths.open_file(path) as file:
      text = captions_file.decode(path, file.read())
    if self.is_text:
      return (text,)
    return tuple(line for line in text.split('\n') if line.strip())

  def digest(self) -> str:
    """Returns a digest that changes with the captions and with the sizes of up to 512 images."""
    content = xxhash.xxh64(json.dumps(self._sample_sizes).encode())
    if self.captioned:
      for entry in self.entries:
        content.update(json.dumps(entry.texts).encode())
      for entry in _sample([entry for entry in self.entries if entry.beside]):
        content.update(json.dumps(self.read_texts(entry)).encode())
    return content.hexdigest()[:8]

  # --------------------------------------------------------------------------- file of captions

  def _open_captions(self, captions: str | None) -> tuple[str, bytes]:
    """Returns path and content of the file of captions; ('', b'') if there is none."""
    requested = expand_home(captions) if captions else None
    existing = []
    content = b''
    for name in [requested] if requested else CAPTIONS:
      path = self.file_path(name)
      try:
        with paths.open_file(path) as file:
          if not existing:
            content = file.read()
      except paths.NO_FILE_ERRORS:
        continue
      existing.append(path)
    if not existing:
      if requested:
        raise UserError(f'{self.path} has no file {requested!r}; it has {self._describe_files()}')
      return '', b''
    if len(existing) > 1:
      others = ', '.join(os.path.basename(path) for path in existing[1:])
      logging.getLogger(__name__).warning(
        '%s is read, and not %s; say which with captions=', existing[0], others
      )
    return existing[0], content

  def _read_captions(
    self, data: bytes, image: str | None, texts: Sequence[str], find_texts: FindTexts
  ) -> list[Entry]:
    """Reads the entries of the file of captions."""
    rows = captions_file.read_rows(self.file, data, Fields(image or '', tuple(texts)))
    if not rows:
      raise UserError(f'{self.file} has no rows; give it file_name and text of each image')
    fields = choose_fields(
      self.file, rows, image, texts, needs_name=not self.is_text, needs_text=self.captioned
    )
    texts_by_name = {}  # a text without an image has its number as a key
    for number, row in enumerate(rows):
      name = self._image_name(row, number, fields.name) if fields.name else number
      row_texts = texts_by_name.setdefault(name, [])
      for field in fields.texts:
        row_texts += _find_field_texts(row.fields, field, find_texts)
    entries = []
    for name, row_texts in texts_by_name.items():
      entries.append(Entry(name.strip() if fields.name else '', tuple(row_texts)))
    has_text = any(text.strip() for entry in entries for text in entry.texts)
    if self.captioned and not has_text:
      raise UserError(
        f'{self.file}: none of {len(rows)} rows has a text in '
        f'{" or ".join(map(repr, fields.texts))}; name the field with text='
      )
    return entries

  def _read_dialogs(
    self,
    data: bytes,
    image: str | None,
    texts: Sequence[str],
    annotations: str | None,
    find_texts: FindTexts,
  ) -> list[Entry]:
    """Reads conversations or questions."""
    if not self.file:
      raise UserError(
        f'{self.path} has no {" or ".join(CAPTIONS)}, and use {self.use!r} needs a file of '
        f'{"conversations" if self.use == "chat" else "questions"}; it has '
        f'{self._describe_files()}; name the file with captions='
      )
    rows = None
    if self.use == 'answer':
      answers = self._open_captions(annotations) if annotations else None
      rows = captions_file.read_questions(self.file, data, answers)
    if rows is None:
      rows = captions_file.read_rows(self.file, data, Fields(image or 'image', tuple(texts)))
    dialogs = read_dialogs(self.file, rows, self.use, image, texts, find_texts)
    if not dialogs:
      raise UserError(f'{self.file} is empty; give it conversations or questions')
    entries = []
    for images, dialog_texts in dialogs:
      first, *others = images or ('',)
      entries.append(Entry(first, dialog_texts, more_names=tuple(others)))
    return entries

  def _image_name(self, row: Row, number: int, field: str) -> str:
    name = row.fields.get(field)
    if not isinstance(name, str) or not name.strip():
      position = f'{self.file}:{row.line}' if row.line else f'{self.file}: entry {number}'
      raise UserError(f'{position}: {field} is {name!r}; give the name of an image')
    return name

  # ------------------------------------------------------------------------ files of the folder

  def _list_entries(self, texts: Sequence[str]) -> list[Entry]:
    """Lists the images with the texts beside them, or, for use 'text', the texts."""
    names = self._file_names()
    if self.is_text:
      entries = [Entry('', (), name) for name in names if name.lower().endswith(_TEXT_SUFFIX)]
    else:
      entries = _image_entries(names)
    lacks_captions = f'{self.path} has no {" or ".join(CAPTIONS)}'
    existing = f'it has {_describe(names)}'
    if not entries:
      kind = f'file that ends with {_TEXT_SUFFIX}' if self.is_text else 'image'
      raise UserError(
        f'{lacks_captions}, nor any {kind}; {existing}; check the path, or give captions=NAME'
      )
    if self.is_text:
      return entries
    if self.captioned and not any(entry.beside for entry in entries):
      raise UserError(
        f'{lacks_captions}, nor NAME{_TEXT_SUFFIX} beside an image; {existing}; write one with '
        'file_name and text of each image, or give captions=NAME'
      )
    if texts:
      raise UserError(
        f'{lacks_captions}, whose field text={", ".join(texts)!r} would name; {existing}; '
        'leave it out'
      )
    return entries

  def _file_names(self) -> list[str]:
    """Lists all files in the folder and below it, relative to it, sorted, without hidden ones."""
    if paths.is_remote(self.path):
      names = paths.list_files(self.path)
    else:
      names = []
      for folder, subfolders, files in os.walk(self.path):
        subfolders[:] = [name for name in subfolders if not name.startswith('.')]
        names += [os.path.relpath(os.path.join(folder, name), self.path) for name in files]
    visible = [name for name in names if not os.path.basename(name).startswith('.')]
    return sorted(visible, key=lambda name: name.split('/'))

  def _describe_files(self) -> str:
    return _describe(self._file_names())

  def _look_up_images(self) -> list[tuple[str, int | None]]:
    """Returns names and sizes of the images, of 512 at most.

    Raises:
      UserError: none of them exists.
    """
    if self.is_text:
      return []
    sample = _sample([entry for entry in self.entries if entry.name])
    if not sample:
      return []
    files = [self.file_path(entry.name) for entry in sample]
    sizes = [size for _, size in paths.names_and_sizes(files)]
    if all(size == -1 for size in sizes):
      raise UserError(
        f'{self.file} names {len(self.entries)} images, such as {sample[0].name!r}, and none of '
        f'{len(sizes)} that were looked for is in {self.path}; it has {self._describe_files()}'
      )
    return [(entry.name, size) for entry, size in zip(sample, sizes, strict=True)]


def _image_entries(names: Sequence[str]) -> list[Entry]:
  """Returns the images among the files, with the text files beside them."""
  existing = set(names)
  entries = []
  for name in names:
    if name.lower().endswith(IMAGE_SUFFIXES):
      beside = ''
      for candidate in (os.path.splitext(name)[0] + _TEXT_SUFFIX, name + _TEXT_SUFFIX):
        if candidate in existing:
          beside = candidate
          break
      entries.append(Entry(name, (), beside))
  return entries


def _check_folder(path: str) -> str:
  """Returns the path of a folder without 'file://' and '~'.

  Raises:
    UserError: it is no folder.
  """
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
      f'{path} is a file; give the folder, path={folder or "."!r}, '
      f'and, if it is the file of captions, captions={name!r}'
    )
  raise UserError(f'{path}: no such folder; check the path')


def _find_field_texts(
  fields: Mapping[str, Any], name: str, find_texts: FindTexts
) -> tuple[str, ...]:
  """Returns the texts under a dotted name; a field of that whole name goes first."""
  if name in fields:
    return find_texts({'text': fields[name]}, ('text',))
  return find_texts(fields, (name,))


def _sample(entries: Sequence[Entry]) -> list[Entry]:
  """Returns all entries, or 512 that are spread evenly."""
  if len(entries) <= _MAX_SAMPLES:
    return list(entries)
  last = len(entries) - 1
  return [entries[i * last // (_MAX_SAMPLES - 1)] for i in range(_MAX_SAMPLES)]


def _describe(names: Sequence[str]) -> str:
  """Describes files, as in '8 files (a, b, c ...)'."""
  if not names:
    return 'no files'
  more = ' ...' if len(names) > _MAX_SHOWN_NAMES else ''
  return f'{len(names)} files ({", ".join(names[:_MAX_SHOWN_NAMES])}{more})'
