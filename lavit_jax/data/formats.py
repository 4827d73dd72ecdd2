"""What a record is in each format. Stores are read by index, streams from front to back.

| format        | kind   | `path`                                     | `image`              | `text`                    |
|---------------|--------|--------------------------------------------|----------------------|---------------------------|
| 'arrayrecord' | store  | folder of `lavit data pack`, or its files  | (whatever was packed)| fields, as of tars        |
| 'tfds'        | store  | name, or the folder of a version           | feature              | features                  |
| 'folder'      | store  | folder of images and captions (folders.py) | field: 'file_name'   | fields: 'text'            |
| 'tars'        | stream | WebDataset or img2dataset tars             | extensions           | extensions, 'json.key'    |
| 'parquet'     | stream | files, a row group the unit                | column of bytes      | columns                   |

A local folder of tars, Parquet or ArrayRecord files is all that end in .tar, .parquet or .array_record; ArrayRecord is never remote.
`text` names one field or several, of which one is chosen each time; a dot goes down into JSON, structs and lists ('json.caption',
'captions.text'). Whatever is not a record becomes a `Skip` with the reason. `names()` are what tells a source from another one, as JSON:
the files with their sizes, as far as they are cheap to have.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow.parquet

from lavit_jax.data import folders, paths, tars
from lavit_jax.errors import UserError
from lavit_jax.local_paths import expand_home

ARRAY_RECORD = '.array_record'
IMAGE_EXTENSIONS = ('jpg', 'jpeg', 'png', 'webp', 'gif', 'bmp', 'tif', 'tiff')
_LENGTH = struct.Struct('<I')


class Record(NamedTuple):
  """One example as it is stored: the bytes of a picture's file (b'': none), and its texts."""

  image: bytes
  texts: tuple[str, ...]
  origin: str  # for messages


class Skip(NamedTuple):
  """What was no record and why. With an empty `reason` and unit 'files': a file that was read to its end."""

  reason: str
  origin: str
  unit: str = 'records'


# ------------------------------------------------------------------------------------------------------------------ stores

class ArrayRecords:
  """Local files that `pack_record` filled, one record behind the other."""

  def __init__(self, path, image, text):
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    files = paths.expand(path, ARRAY_RECORD)
    for file in files:
      if paths.is_remote(file):
        raise UserError(f'{file}: ArrayRecord reads local files only; mount the bucket (gcsfuse), or read the tars as they are')
      if not os.path.isfile(file):
        raise UserError(f'{file}: no such file; make it with lavit data pack')
    try:
      self.source = ArrayRecordDataSource(files)
    except RuntimeError:  # which does not say of which file
      for file in files:
        _look_at_array_record(file)
      raise
    self.files, self.text = files, text
    self.name = files[0] if len(files) == 1 else f'{files[0]} ... {files[-1]}'

  def __len__(self) -> int:
    return len(self.source)

  def names(self) -> list:
    return paths.names_and_sizes(self.files)

  def read(self, index: int) -> Record | Skip:
    origin = f'{self.name}: record {index}'
    try:
      head, image = unpack_record(self.source[index])
    except (ValueError, struct.error, RuntimeError):
      return Skip('broken record', origin)
    return Record(image, find_texts(head['fields'], self.text), origin)


def _look_at_array_record(file: str) -> None:
  from array_record.python.array_record_module import ArrayRecordReader
  try:
    ArrayRecordReader(file).close()
  except RuntimeError as error:
    raise UserError(f'{file}: no ArrayRecord, or damaged ({error}); give the folder or its *{ARRAY_RECORD}, or pack anew') from error


def pack_record(key: str, fields: Mapping[str, str], image: bytes) -> bytes:
  """The layout of our ArrayRecords: u32 length (little endian), JSON {"key", "fields"} of that length, the picture's file."""
  head = json.dumps({'key': key, 'fields': dict(fields)}, ensure_ascii=False).encode('utf-8', 'replace')
  return _LENGTH.pack(len(head)) + head + image


def unpack_record(record: bytes) -> tuple[dict, bytes]:
  (length,), start = _LENGTH.unpack_from(record), _LENGTH.size
  return json.loads(record[start:start + length]), record[start + length:]


class Tfds:
  """A data set of tensorflow-datasets in a format with random access; TensorFlow is not needed."""

  def __init__(self, path, image, text, split='train', data_dir=None):
    import tensorflow_datasets as tfds  # Here, because it takes seconds.
    path, data_dir = expand_home(path), data_dir and expand_home(data_dir)
    try:
      builder = tfds.builder_from_directory(path) if os.path.isdir(path) else tfds.builder(path, data_dir=data_dir)
      decoders = {image: tfds.decode.SkipDecoding()} if image in builder.info.features else None
      self.source = builder.as_data_source(split, decoders=decoders)
    except Exception as error:  # of many kinds, all about what was asked for
      reason = ' '.join(str(error).split())[:300]
      raise UserError(f'tfds {path!r}, split {split!r}: {reason}; prepare it as array_record with tfds build, and give data_dir') from error
    self.name, self.image, self.text, self.split, self.info = path, image, text, split, builder.info

  def __len__(self) -> int:
    return len(self.source)

  def names(self) -> list:
    return [self.info.full_name, int(self.info.dataset_size), self.split]

  def read(self, index: int) -> Record | Skip:
    record = self.source[index]
    return Record(bytes(record.get(self.image, b'')), find_texts(record, self.text), f'{self.name}: record {index}')


class Folder:
  """Images in a folder, with a file of captions, NAME.txt beside each, or bare (folders.py)."""

  def __init__(self, path, image, text, captions=None, use='', captioned=True):
    texts = tuple(name for name in text or () if name)
    self.folder = folders.ImageFolder(path, image, texts, captions, use, captioned, find_texts)

  def __len__(self) -> int:
    return len(self.folder.entries)

  def names(self) -> list:
    return [entry.name for entry in self.folder.entries]

  def digest(self) -> str:
    return self.folder.digest()

  def read(self, index: int) -> Record | Skip:
    entry = self.folder.entries[index]
    origin = self.folder.place(entry.name or entry.beside)
    try:
      texts = self.folder.texts_of(entry)
    except paths.NO_FILE:
      return Skip('no caption', origin)
    except UserError as error:
      return Skip('broken caption', str(error))
    if not entry.name or self.folder.is_text:
      return Record(b'', texts, origin)
    try:
      with paths.open_file(origin) as file:
        return Record(file.read(), texts, origin)
    except paths.NO_FILE:
      return Skip('no image', origin)


# ----------------------------------------------------------------------------------------------------------------- streams

class Tars:
  """Tars as they are. A unit is a tar, a position in it a byte."""

  cost = 1  # of a unit that waits open (streams.py)

  def __init__(self, path, image, text):
    self.files, self.text = paths.expand(path, '.tar'), text
    self.image = IMAGE_EXTENSIONS if image is None else image

  def __len__(self) -> int:
    return len(self.files)

  def names(self) -> list:
    return paths.names_and_sizes(self.files)

  def read(self, unit: int, start: int = 0, **options) -> Iterator[tuple[int, int, Record | Skip]]:
    """(start, end, record) of each sample from byte `start` on; at last a Skip of unit 'files'. `options` are for `paths.open_file`."""
    path, end = self.files[unit], start
    last = Skip('', path, 'files')
    try:
      with paths.open_file(path, **options) as file:
        for start, end, key, sample in tars.samples(file, start):
          yield start, end, self.record(f'{path}: {key}', sample)
    except paths.NO_FILE:
      last = Skip('missing tar', path, 'files')
    except tars.Broken as error:
      last = Skip('broken tar', f'{path} ({error})', 'files')
    yield end, end, last

  def record(self, origin: str, sample: Mapping[str, bytes]) -> Record | Skip:
    image = next((sample[extension] for extension in self.image if extension in sample), b'')
    return Record(image, find_texts(sample, self.text), origin)


class Parquets:
  """Parquet files with the bytes of pictures in a column, or in a struct {bytes, path} as the Hugging Face hub has it.

  A unit is a row group, because less cannot be read; a position in it a row.
  """

  cost = 8  # it is held whole

  def __init__(self, path, image, text):
    self.image, self.text = image, text
    self.files = files = paths.expand(path, '.parquet')
    with ThreadPoolExecutor(16) as pool:  # a store far away answers slowly, not seldom
      counts, columns = zip(*pool.map(self._look, files))
    self.columns = [name for name in dict.fromkeys((image, *(name.split('.')[0] for name in text))) if name in columns[0]]
    if not self.columns:
      raise UserError(f'{files[0]} has the columns {", ".join(columns[0])}; name those of picture and text with image= and text=')
    self.units = [(file, group) for file, count in zip(files, counts) for group in range(count)]

  def __len__(self) -> int:
    return len(self.units)

  def names(self) -> list:
    return paths.names_and_sizes(self.files)

  def read(self, unit: int, start: int = 0, **options) -> Iterator[tuple[int, int, Record | Skip]]:
    path, group = self.units[unit]
    last, row = Skip('', path, 'files'), start
    try:
      with _parquet(path, **options) as file:
        for batch in file.iter_batches(64, [group], self.columns):
          if start >= batch.num_rows:
            start -= batch.num_rows
            continue
          for values in batch.slice(start).to_pylist():
            image = values.get(self.image) or b''
            image = (image.get('bytes') or b'') if isinstance(image, dict) else image
            yield row, row + 1, Record(image, find_texts(values, self.text), f'{path}, row group {group}, row {row}')
            row += 1
          start = 0
    except (OSError, ValueError) as error:
      last = Skip('broken parquet', f'{path}, row group {group} ({error})', 'files')
    yield row, row, last

  def _look(self, path: str) -> tuple[int, list[str]]:
    try:
      with _parquet(path) as file:
        return file.num_row_groups, file.schema_arrow.names
    except (OSError, ValueError) as error:
      raise UserError(f'{path}: not a Parquet file that can be read ({error}); check the path') from error


def _parquet(path: str, **options):
  return pyarrow.parquet.ParquetFile(paths.open_file(path, **options))  # one for each that reads: they move in it


# ------------------------------------------------------------------------------------------------------------------- texts

def find_texts(fields: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...]:
  """All texts that the dotted names lead to; a list on the way means each of its items."""
  found = []
  for name in names:
    field, _, rest = name.partition('.')
    if field in fields:
      _dig(fields[field], rest, found)
  return tuple(found)


def _dig(value, path: str, found: list[str]) -> None:
  if hasattr(value, 'tolist'):  # numpy's strings and arrays
    value = value.tolist()
  if isinstance(value, bytes):
    value = value.decode('utf-8', 'replace')
  if isinstance(value, (list, tuple)):
    for item in value:
      _dig(item, path, found)
  elif path and isinstance(value, str):
    _dig(_json(value), path, found)
  elif path and isinstance(value, Mapping):
    name, _, rest = path.partition('.')
    _dig(value.get(name), rest, found)
  elif isinstance(value, str):
    found.append(value)


def _json(value: str):
  try:
    return json.loads(value)
  except ValueError:
    return None


FORMATS = {'arrayrecord': ArrayRecords, 'tfds': Tfds, 'folder': Folder, 'tars': Tars, 'parquet': Parquets}
DEFAULTS = {  # of image and text
    'arrayrecord': (None, 'txt'), 'tfds': ('image', 'text'), 'folder': (None, ''), 'tars': (None, 'txt'), 'parquet': ('image', 'text')}
