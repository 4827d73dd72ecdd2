"""Formats with random access: ArrayRecord files, tensorflow-datasets, folders of images.

A store has `len()`, `read(index)` and `identity()`; formats.py lists what its records are.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from lavit_jax.data import folders, paths
from lavit_jax.data.conversations import IMAGE_MARK, count_marks
from lavit_jax.data.record import NO_IMAGE, Record, Skip, find_texts, format_names
from lavit_jax.data.tasks import DIALOGS
from lavit_jax.errors import UserError
from lavit_jax.local_paths import expand_home

ARRAY_RECORD = '.array_record'
_LENGTH = struct.Struct('<I')


class ArrayRecords:
  """Local ArrayRecord files written by `lavit data pack`, one after the other.

  Args:
    path: a folder, files, globs or braces (paths.expand).
    image: unused; each record has one image.
    text: the fields with texts, dotted names.

  Raises:
    UserError: a file is remote, absent or damaged.
  """

  def __init__(self, path: str | Sequence[str], image: None, text: Sequence[str]):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    files = paths.expand(path, ARRAY_RECORD)
    for file in files:
      if paths.is_remote(file):
        raise UserError(
          f'{file}: ArrayRecord reads local files only; mount the bucket (gcsfuse), or read the '
          'tars as they are'
        )
      if not os.path.isfile(file):
        raise UserError(f'{file}: no such file; make it with lavit data pack')
    try:
      self.source = ArrayRecordDataSource(files)
    except RuntimeError:  # its message does not name the file
      for file in files:
        _check_array_record(file)
      raise
    self.files = files
    self.text = text
    self.name = files[0] if len(files) == 1 else f'{files[0]} ... {files[-1]}'

  def __len__(self) -> int:
    return len(self.source)

  def identity(self) -> list:
    """Names and sizes of the files, as JSON."""
    return paths.names_and_sizes(self.files)

  def read(self, index: int) -> Record | Skip:
    """The record at an index."""
    origin = f'{self.name}: record {index}'
    try:
      head, image = unpack_record(self.source[index])
    except (ValueError, struct.error, RuntimeError):
      return Skip('broken record', origin)
    fields = head['fields']
    return Record(image, find_texts(fields, self.text), f'{origin} ({format_names(fields)})')

  @property
  def expected_fields(self) -> str:
    """Where texts are read from, for messages."""
    return f'text in {format_names(self.text)}'


def _check_array_record(file: str) -> None:
  """Raises UserError if the file cannot be opened."""
  from array_record.python.array_record_module import ArrayRecordReader

  try:
    ArrayRecordReader(file).close()
  except RuntimeError as error:
    raise UserError(
      f'{file}: no ArrayRecord, or damaged ({error}); give the folder or its *{ARRAY_RECORD}, or '
      'pack anew'
    ) from error


def pack_record(key: str, fields: Mapping[str, str], image: bytes) -> bytes:
  """The layout of a record in our ArrayRecord files.

  A little-endian u32 length, JSON {"key", "fields"} of that many bytes, the image file.
  """
  head = json.dumps({'key': key, 'fields': dict(fields)}, ensure_ascii=False)
  encoded = head.encode('utf-8', 'replace')
  return _LENGTH.pack(len(encoded)) + encoded + image


def unpack_record(record: bytes) -> tuple[dict[str, Any], bytes]:
  """({'key', 'fields'}, image file) of a record that `pack_record` laid out."""
  (length,) = _LENGTH.unpack_from(record)
  end = _LENGTH.size + length
  return json.loads(record[_LENGTH.size : end]), record[end:]


class Tfds:
  """A data set of tensorflow-datasets in a format with random access, without TensorFlow.

  Args:
    path: the name of the data set, or the folder of a version.
    image: the feature with the image.
    text: the features with texts, dotted names.
    split: the split of the data set.
    data_dir: where tensorflow-datasets finds a data set by its name.

  Raises:
    UserError: tensorflow-datasets cannot open it.
  """

  def __init__(
    self,
    path: str,
    image: str,
    text: Sequence[str],
    split: str = 'train',
    data_dir: str | None = None,
  ):
    import tensorflow_datasets as tfds  # here, because the import takes seconds

    path = os.fspath(expand_home(path))
    if data_dir:
      data_dir = os.fspath(expand_home(data_dir))
    try:
      if os.path.isdir(path):
        builder = tfds.builder_from_directory(path)
      else:
        builder = tfds.builder(path, data_dir=data_dir)
      features: Any = builder.info.features
      decoders: Any = None
      if image in features:
        decoders = {image: tfds.decode.SkipDecoding()}
      as_data_source: Any = builder.as_data_source  # its decorator hides its arguments
      self.source = as_data_source(split, decoders=decoders)
    except Exception as error:  # of many kinds, all about the arguments
      reason = ' '.join(str(error).split())[:300]
      raise UserError(
        f'tfds {path!r}, split {split!r}: {reason}; prepare it as array_record with tfds build, '
        'and give data_dir'
      ) from error
    self.name = path
    self.image = image
    self.text = text
    self.split = split
    self.info = builder.info

  def __len__(self) -> int:
    return len(self.source)

  def identity(self) -> list:
    """Full name, size in bytes and split, as JSON."""
    return [self.info.full_name, int(self.info.dataset_size), self.split]

  def read(self, index: int) -> Record | Skip:
    """The record at an index."""
    record = self.source[index]
    return Record(
      bytes(record.get(self.image, b'')),
      find_texts(record, self.text),
      f'{self.name}: record {index} ({format_names(record)})',
    )

  @property
  def expected_fields(self) -> str:
    """Where images and texts are read from, for messages."""
    return f'image in {self.image}, text in {format_names(self.text)}'


class Folder:
  """Images in a folder, with a file of captions, NAME.txt beside each, or bare (folders.py).

  Args:
    path: the folder, local or remote.
    image: the field of the file of captions with the name of the image; None: 'file_name'.
    text: the fields with texts, dotted names.
    captions: the name of the file of captions.
    use: of the source; 'text' needs no images.
    captioned: whether texts are needed.
    annotations: the name of the official file of answers to the questions of VQA in `captions`.

  Raises:
    UserError: as folders.ImageFolder.
  """

  def __init__(
    self,
    path: str,
    image: str | None,
    text: Sequence[str],
    captions: str | None = None,
    use: str = '',
    captioned: bool = True,
    annotations: str | None = None,
  ):
    texts = tuple(name for name in text or () if name)
    self.folder = folders.ImageFolder(
      path, image, texts, captions, use, captioned, annotations, find_texts
    )

  def __len__(self) -> int:
    return len(self.folder.entries)

  def identity(self) -> list:
    """The names of the images, as JSON."""
    return [' '.join((entry.name, *entry.more_names)) for entry in self.folder.entries]

  def digest(self) -> str:
    """A hash of the texts, and of the sizes of the images."""
    return self.folder.digest()

  def read(self, index: int) -> Record | Skip:
    """The record at an index."""
    entry = self.folder.entries[index]
    origin = self.folder.file_path(entry.name or entry.beside)
    try:
      texts = self.folder.read_texts(entry)
    except paths.NO_FILE_ERRORS:
      return Skip('no caption', origin)
    except UserError as error:
      return Skip('broken caption', str(error))
    if self.folder.is_text:
      return Record(b'', texts, origin)
    if self.folder.use in DIALOGS:
      names = [name for name in (entry.name, *entry.more_names) if name]
      origin = f'{self.folder.file}, record {index}'
      marks = count_marks(entry.texts, self.folder.use, len(names))
      if marks != len(names):
        return Skip('unmatched images', f'{origin} ({len(names)} images, {marks} {IMAGE_MARK})')
    else:
      names = [entry.name]
    images = []
    for name in names:
      path = self.folder.file_path(name)
      try:
        with paths.open_file(path) as file:
          images.append(file.read())
      except paths.NO_FILE_ERRORS:
        return Skip(NO_IMAGE, path)
    first, *others = images or (b'',)
    return Record(first, texts, origin, more_images=tuple(others))
