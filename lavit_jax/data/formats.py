"""What a record is in each format. Stores are read by index, streams from front to back.

| format        | kind   | `path`                                     | `image`              | `text`                    |
|---------------|--------|--------------------------------------------|----------------------|---------------------------|
| 'arrayrecord' | store  | folder of `lavit data pack`, or its files  | (whatever was packed)| fields, as of tars        |
| 'tfds'        | store  | name, or the folder of a version           | feature              | features                  |
| 'folder'      | store  | folder of images and captions (folders.py) | field: 'file_name'   | fields: 'text'            |
| 'tars'        | stream | WebDataset or img2dataset tars             | extensions           | extensions, 'json.key'    |
| 'parquet'     | stream | files, a row group the unit                | column of bytes      | columns                   |

A local folder of tars, Parquet or ArrayRecord files is all that end in .tar (or .tar.gz, archives.py), .parquet or .array_record;
ArrayRecord is never remote.
`text` names one field or several, of which one is chosen each time; a dot goes down into JSON, structs and lists ('json.caption',
'captions.text'). Whatever is not a record becomes a `Skip` with the reason. `names()` are what tells a source from another one, as JSON:
the files with their sizes, as far as they are cheap to have.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lavit_jax.data import archives, folders, parquets, paths, tars
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
  unit: str = 'records'  # or 'files', or 'members' of tars, which are counted only


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
    return Record(image, find_texts(head['fields'], self.text), f'{origin} ({some(head["fields"])})')

  @property
  def looked_for(self) -> str:
    return f'text in {some(self.text)}'


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
    return Record(bytes(record.get(self.image, b'')), find_texts(record, self.text), f'{self.name}: record {index} ({some(record)})')

  @property
  def looked_for(self) -> str:
    return f'image in {self.image}, text in {some(self.text)}'


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
    self.files, self.text = tar_files(path), text
    self.image = IMAGE_EXTENSIONS if image is None else tuple(extension.lower() for extension in image)
    self._kinds, self._wanted = {}, set(self.image)
    for name in text:
      parts = name.lower().split('.')
      self._wanted |= {'.'.join(parts[:count]) for count in range(1, len(parts) + 1)}

  def __len__(self) -> int:
    return len(self.files)

  def names(self) -> list:
    return paths.names_and_sizes(self.files)

  @property
  def looked_for(self) -> str:
    return f'image in {some(self.image)}, text in {some(self.text)}, where an extension is all behind the first dot of a name'

  def read(self, unit: int, start: int = 0, **options) -> Iterator[tuple[int, int, Record | Skip]]:
    """(start, end, record) of each sample from byte `start` on; at last a Skip of unit 'files'. `options` are for `paths.open_file`.

    What is not read of a sample comes before it, as a Skip of unit 'members' in the same place.
    """
    path, end = self.files[unit], start
    last = Skip('', path, 'files')
    try:
      with archives.open_tar(path, self._kinds, **options) as file:
        for sample in tars.samples(file, start, self._wanted):
          end = sample.end
          for reason, name in sample.unread:
            yield sample.start, end, Skip(reason, f'{path}: {name}', 'members')
          if sample.key is not None:
            yield sample.start, end, self.record(path, sample)
    except paths.NO_FILE:
      last = Skip('missing tar', path, 'files')
    except tars.Broken as error:
      last = Skip('broken tar', f'{path} ({error})', 'files')
    yield end, end, last

  def record(self, path: str, sample: tars.Sample) -> Record | Skip:
    origin = f'{path}: {sample.key} ({some(sample.fields)})'
    if sample.repeated:  # whose caption is whose cannot be known
      return Skip('repeated member', f'{origin}, which has {some(sample.repeated)} twice')
    image = next((sample.fields[extension] for extension in self.image if extension in sample.fields), b'')
    return Record(image, find_texts(sample.fields, self.text, lower=True), origin)


def tar_files(path: str | Sequence[str]) -> list[str]:
  """The tars that a path or several name; a local folder is all tars in it, compressed ones too.

  Raises:
    UserError: a folder or a glob without tars.
  """
  files = []
  for each in [path] if isinstance(path, (str, os.PathLike)) else path:
    folder = os.path.expanduser(os.fspath(each).removeprefix('file://'))
    if not os.path.isdir(folder):
      files += paths.expand(each, '.tar')
      continue
    names = [name for name in sorted(os.listdir(folder)) if name.lower().endswith(archives.ENDINGS) and not name.startswith('.')]
    if not names:
      raise UserError(f'{os.path.join(folder, "*.tar")} matches no file; the folder has no {", ".join(archives.ENDINGS)}; check the path')
    files += [os.path.join(folder, name) for name in names]
  if not files:
    raise UserError(f'{path!r} names no files; give a path, a glob or a list')
  return files


class Parquets:
  """Parquet files with the bytes of pictures in a column, or in a struct {bytes, path} as the Hugging Face hub has it.

  A unit is a row group; a position in it a row.
  """

  def __init__(self, path, image, text):
    self.image, self.text = image, text
    self.files = paths.expand(path, '.parquet')
    self.units = parquets.units(self.files, image, text)
    self.cost = parquets.cost(self.units)

  def __len__(self) -> int:
    return len(self.units)

  def names(self) -> list:
    return paths.names_and_sizes(self.files)

  @property
  def looked_for(self) -> str:
    return f'image in the column {self.image}, text in {some(self.text)}'

  def read(self, unit: int, start: int = 0, **options) -> Iterator[tuple[int, int, Record | Skip]]:
    """(row, row + 1, record) of each row from `start` on; at last a Skip of unit 'files'. `options` are for `paths.open_file`."""
    here, row = self.units[unit], start
    path = here.file
    last = Skip('', path, 'files')
    try:
      for values in parquets.rows(here, start, **options):
        image = parquets.image_of(values, self.image)
        origin = f'{path}, row group {here.group}, row {row}'
        yield row, row + 1, Record(image, find_texts(values, self.text), origin)
        row += 1
    except parquets.DAMAGE as error:
      last = Skip('broken parquet', f'{path}, row group {here.group} ({error})', 'files')
    yield row, row, last


# ------------------------------------------------------------------------------------------------------------------- texts

def find_texts(fields: Mapping[str, Any], names: Sequence[str], lower: bool = False) -> tuple[str, ...]:
  """All texts that the dotted names lead to; a list on the way means each of its items.

  A field may have dots in its own name ('outputs.txt'): the longest one that a name begins with is taken. With `lower`
  the fields are in lower case, and the names need not be.
  """
  found = []
  for name in names:
    field, rest = name, ''
    while field:
      key = field.lower() if lower else field
      if key in fields:
        _dig(fields[key], rest, found)
        break
      field, _, last = field.rpartition('.')
      rest = f'{last}.{rest}' if rest else last
  return tuple(found)


def some(names: Iterable[str], count: int = 8) -> str:
  """'jpg, txt, json', and of many the first `count`; for messages."""
  names = tuple(names)
  return ', '.join(names[:count]) + (f' and {len(names) - count} more' if len(names) > count else '')


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
