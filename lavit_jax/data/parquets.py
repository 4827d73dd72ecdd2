"""The rows of Parquet files, read without loading a row group; and which columns each file has.

| column | may be |
|---|---|
| image | bytes of any type (binary, large, fixed, dictionary), or a struct with a field `bytes` |
| text | strings of any type, lists and structs of them, JSON in strings |
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lavit_jax.data import paths
from lavit_jax.errors import UserError

DAMAGE = (OSError, ValueError, pa.ArrowException)
_MIN_COST = 8  # of an open row group, in open tars (open_units.py)
_MAX_COST = 256
_BYTES_PER_COST = 2 << 20
_BUFFER = 1 << 20  # bytes read at a time; without a buffer, a whole column chunk
_BATCH_BYTES = 4 << 20  # of rows that are decoded together
_BATCH_ROWS = 64
_PAGE_ROWS = 1024  # pyarrow ends a page after this many rows at the earliest
_PAGE_BYTES = 1 << 20  # other writers end it after this many bytes
# Columns that may be absent: not every use needs both image and text, and codes may have no errors.
_OPTIONAL = ('image', 'text', 'error')


class Unit(NamedTuple):
  """A row group of a file, or a file that cannot be read.

  Attributes:
    file: its path.
    group: the number of the row group.
    columns: the columns that are read.
    fault: why the file cannot be read.
    memory: bytes that are held while the row group is open, about.
  """

  file: str
  group: int
  columns: tuple[str, ...]
  fault: str = ''
  memory: int = 0


class _FileInfo(NamedTuple):
  """The types of a file's columns and its metadata, or why it cannot be read."""

  types: dict[str, pa.DataType]
  metadata: pq.FileMetaData | None = None
  fault: str = ''


def list_units(files: Sequence[str], image: str | None, others: Sequence[str]) -> list[Unit]:
  """The row groups of all `files`, in order, and the files that cannot be read.

  Args:
    files: their paths.
    image: the column with the images, a dotted name; None of files without images.
    others: further columns, such as those with texts, dotted names.

  Raises:
    UserError: no file can be read, a requested column is in none of them, or `image` is not a
      column of bytes.
  """
  with ThreadPoolExecutor(16) as pool:  # remote stores have a high latency
    infos = dict(zip(files, pool.map(_read_info, files), strict=True))
  readable = {file: info for file, info in infos.items() if not info.fault}
  if not readable:
    raise UserError(
      f'{files[0]}: not a Parquet file that can be read ({infos[files[0]].fault}); check the path'
    )
  requested = list(dict.fromkeys((*(() if image is None else (image,)), *others)))
  _check_columns(readable, requested)
  units = []
  for file in files:
    info = infos[file]
    if info.metadata is None:
      units.append(Unit(file, 0, (), info.fault))
      continue
    if image is not None:
      _check_image(file, image, info.types)
    columns = [_column(name, info.types) for name in requested]
    columns = tuple(dict.fromkeys(name for name in columns if name))
    for group in range(info.metadata.num_row_groups):
      memory = _memory(info.metadata, group, set(columns))
      units.append(Unit(file, group, columns, memory=memory))
  return units


def unit_cost(units: Sequence[Unit]) -> int:
  """The cost of the largest unit while it is open, in open tars (open_units.py)."""
  memory = max((unit.memory for unit in units), default=0)
  return min(max(-(-memory // _BYTES_PER_COST), _MIN_COST), _MAX_COST)


def read_rows(unit: Unit, start: int, **open_options: int) -> Iterator[dict[str, Any]]:
  """{column: value} of each row from `start` on. `open_options` are for `paths.open_file`.

  Beside what is read ahead it holds one batch of rows, which is about 4 MB or one row, and of each
  column a page, compressed and plain. pyarrow writes pages of 1,024 rows however long these are.

  Raises:
    DAMAGE: the file is damaged, or does not exist.
  """
  if unit.fault:
    raise ValueError(unit.fault)
  with _open(unit.file, **open_options) as file:
    group = file.metadata.row_group(unit.group)
    columns = set(unit.columns)
    if not columns:
      for _ in range(start, group.num_rows):
        yield {}
      return
    rows_that_fit = _BATCH_BYTES * group.num_rows // max(_plain_size(group, columns), 1)
    batch_size = min(max(rows_that_fit, 1), _BATCH_ROWS)
    batches = file.iter_batches(batch_size, [unit.group], list(unit.columns), use_threads=False)
    for batch in batches:
      skipped = min(start, batch.num_rows)
      start -= skipped
      for row in range(skipped, batch.num_rows):
        yield {
          name: column[row].as_py(maps_as_pydicts='lossy')
          for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }


def image_of(row: Mapping[str, Any], name: str) -> bytes:
  """The bytes of a row's image; b'' where they are null or the row has no such column."""
  column = _column(name, row)
  value = row.get(column) if column else None
  for field in _fields_below(name, column):
    value = value.get(field) if isinstance(value, dict) else None
  if isinstance(value, dict):
    value = value.get('bytes')
  return value if isinstance(value, bytes) else b''


def _read_info(path: str) -> _FileInfo:
  try:
    with _open(path) as file:
      schema = file.schema_arrow
      return _FileInfo(dict(zip(schema.names, schema.types, strict=True)), file.metadata)
  except DAMAGE as error:
    return _FileInfo({}, fault=' '.join(str(error).split()) or type(error).__name__)


def _open(path: str, **open_options: int) -> pq.ParquetFile:
  """A file object for one reader, which moves in it. It reads a buffer at a time."""
  return pq.ParquetFile(
    paths.open_file(path, **open_options), buffer_size=_BUFFER, pre_buffer=False
  )


def _column(name: str, columns: Container[str]) -> str:
  """The longest column that a dotted name begins with; '' if there is none."""
  while name and name not in columns:
    name = name.rpartition('.')[0]
  return name


def _fields_below(name: str, column: str) -> list[str]:
  """The fields that a dotted name goes down to after its column: 'a.b.c', 'a' -> ['b', 'c']."""
  return [field for field in name[len(column) :].split('.') if field]


def _plain_size(group: pq.RowGroupMetaData, columns: Container[str]) -> int:
  """Uncompressed bytes of some columns of a row group."""
  size = 0
  for i in range(group.num_columns):
    chunk = group.column(i)
    if _column(chunk.path_in_schema, columns):  # the path of a leaf, such as image.bytes
      size += chunk.total_uncompressed_size
  return size


def _memory(metadata: pq.FileMetaData, number: int, columns: Container[str]) -> int:
  """Bytes that are held while a row group is read: a page, compressed and plain, and a batch."""
  group = metadata.row_group(number)
  size = _plain_size(group, columns)
  page = _PAGE_BYTES
  if 'parquet-cpp' in (metadata.created_by or ''):
    page = max(page, size * _PAGE_ROWS // max(group.num_rows, 1))
  return 2 * min(page, size) + min(_BATCH_BYTES, size)


def _check_columns(infos: Mapping[str, _FileInfo], requested: Sequence[str]) -> None:
  """Checks that each requested column is in some file; logs which ones are not in all.

  Raises:
    UserError: a column is in none of them.
  """
  columns = dict.fromkeys(name for info in infos.values() for name in info.types)
  absent = [name for name in requested if not _column(name, columns)]
  if len(absent) == len(requested) or any(name not in _OPTIONAL for name in absent):
    raise UserError(
      f'{next(iter(infos))} has the columns {", ".join(columns)}, and no file has '
      f'{", ".join(absent)}; name those of image and text with image= and text='
    )
  for name in requested:
    without = [file for file, info in infos.items() if not _column(name, info.types)]
    if without and name not in absent:
      logging.getLogger(__name__).warning(
        '%d of %d Parquet files have no column %s, such as %s',
        len(without),
        len(infos),
        name,
        without[0],
      )


def _check_image(file: str, name: str, types: Mapping[str, pa.DataType]) -> None:
  """Raises UserError where the image's column holds something other than bytes."""
  column = _column(name, types)
  if not column:
    return
  kind: Any = types[column]
  for field in _fields_below(name, column):
    index = kind.get_field_index(field) if pa.types.is_struct(kind) else -1
    if index < 0:
      raise UserError(
        f'{file}: the column {column} has no {field}: it is {kind}; name the column of the images '
        'with image='
      )
    kind = kind.field(index).type
  if pa.types.is_struct(kind) and kind.get_field_index('bytes') >= 0:
    kind = kind.field('bytes').type
  if pa.types.is_dictionary(kind):
    kind = kind.value_type
  is_bytes = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
    pa.types.is_binary_view,
    pa.types.is_null,
  )
  if not any(is_kind(kind) for is_kind in is_bytes):
    raise UserError(
      f'{file}: the column {name} is {kind}, not the bytes of images; name their column with image='
    )
