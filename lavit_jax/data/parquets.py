"""Rows of Parquet files: which columns each file has, and its rows without loading a row group.

| column | may be |
|---|---|
| image | bytes of any kind (binary, large, fixed, dictionary), or a struct with a field `bytes` |
| text | strings of any kind, lists and structs of them, JSON in strings |
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lavit_jax.data import paths
from lavit_jax.errors import UserError

COSTS = (8, 256)  # least and most of a row group that is open, in tars (streams.py)
_A_TAR = 2 << 20  # bytes
DAMAGE = (OSError, ValueError, pa.ArrowException)
_BUFFER = 1 << 20  # bytes read at a time; without it, all of a column chunk
_BATCH_BYTES, _BATCH_ROWS = 4 << 20, 64  # of rows that are decoded together
_PAGE_ROWS, _PAGE_BYTES = 1024, 1 << 20  # pyarrow ends a page after so many rows at the earliest, others after so many bytes
_DEFAULTS = ('image', 'text')  # columns that may be absent: not every use needs both


class Unit(NamedTuple):
  """A row group of a file, and which of its columns are read; or a file that cannot be read."""

  file: str
  group: int
  columns: tuple[str, ...]
  fault: str = ''
  held: int = 0  # bytes in memory while it is open, about


class _Look(NamedTuple):
  groups: int
  types: dict[str, pa.DataType]  # of each column
  fault: str = ''
  metadata: pq.FileMetaData | None = None


def units(files: Sequence[str], image: str, text: Sequence[str]) -> list[Unit]:
  """The row groups of all `files`, in order.

  Raises:
    UserError: no file can be read; a column that is asked for is in none of them; `image` is not
      a column of bytes.
  """
  with ThreadPoolExecutor(16) as pool:  # a store far away answers slowly, not seldom
    looks = list(pool.map(_look, files))
  sound = [(file, look) for file, look in zip(files, looks) if not look.fault]
  if not sound:
    raise UserError(f'{files[0]}: not a Parquet file that can be read ({looks[0].fault}); check the path')
  known = dict.fromkeys(name for _, look in sound for name in look.types)
  asked = dict.fromkeys((image, *text))
  absent = [name for name in asked if not _column(name, known)]
  if len(absent) == len(asked) or any(name not in _DEFAULTS for name in absent):
    raise UserError(f'{sound[0][0]} has the columns {", ".join(known)}, and no file has {", ".join(absent)}; '
                    'name those of picture and text with image= and text=')
  for name in asked:
    without = [file for file, look in sound if not _column(name, look.types)]
    if without and name not in absent:
      logging.getLogger(__name__).warning('%d of %d Parquet files have no column %s, such as %s',
                                          len(without), len(sound), name, without[0])
  found = []
  for file, look in zip(files, looks):
    if look.fault:
      found.append(Unit(file, 0, (), look.fault))
      continue
    _check_image(file, image, look.types)
    columns = (_column(name, look.types) for name in asked)
    columns = tuple(dict.fromkeys(name for name in columns if name))
    found += [Unit(file, group, columns, held=_held(look.metadata, group, set(columns))) for group in range(look.groups)]
  return found


def cost(of: Sequence[Unit]) -> int:
  """What a row group costs that is open, the largest of these, in tars that wait open (streams.py)."""
  held = max((unit.held for unit in of), default=0)
  return min(max(-(-held // _A_TAR), COSTS[0]), COSTS[1])


def rows(unit: Unit, start: int, **options) -> Iterator[dict[str, Any]]:
  """Column name -> value of each row from `start` on. `options` are for `paths.open_file`.

  Beside what is read ahead it holds one batch of rows, which is about 4 MB or one row, and of each
  column a page, compressed and plain. Files of pyarrow have pages of 1,024 rows however long these are.

  Raises:
    DAMAGE: the file is damaged, or not there.
  """
  if unit.fault:
    raise ValueError(unit.fault)
  with _opened(unit.file, **options) as file:
    group = file.metadata.row_group(unit.group)
    names = set(unit.columns)
    size = _size(group, names)
    count = min(max(_BATCH_BYTES * group.num_rows // max(size, 1), 1), _BATCH_ROWS)
    if not names:
      for _ in range(start, group.num_rows):
        yield {}
      return
    for batch in file.iter_batches(count, [unit.group], list(unit.columns), use_threads=False):
      skipped = min(start, batch.num_rows)
      start -= skipped
      for row in range(skipped, batch.num_rows):
        yield {name: column[row].as_py(maps_as_pydicts='lossy') for name, column in zip(batch.schema.names, batch.columns)}


def image_of(values: Mapping[str, Any], name: str) -> bytes:
  """The bytes of a row's image; b'' where they are null or the row has no such column."""
  column = _column(name, values)
  value = values.get(column) if column else None
  for part in filter(None, name[len(column or ''):].split('.')):
    value = value.get(part) if isinstance(value, dict) else None
  if isinstance(value, dict):
    value = value.get('bytes')
  return value if isinstance(value, bytes) else b''


def _look(path: str) -> _Look:
  try:
    with _opened(path) as file:
      schema = file.schema_arrow
      return _Look(file.num_row_groups, dict(zip(schema.names, schema.types)), metadata=file.metadata)
  except DAMAGE as error:
    return _Look(0, {}, ' '.join(str(error).split()) or type(error).__name__)


def _opened(path: str, **options) -> pq.ParquetFile:
  """A file of its own for each reader: they move in it. It reads a buffer at a time."""
  return pq.ParquetFile(paths.open_file(path, **options), buffer_size=_BUFFER, pre_buffer=False)


def _column(name: str, columns) -> str:
  """The column that a dotted name begins with, the longest one; '' if there is none."""
  while name and name not in columns:
    name = name.rpartition('.')[0]
  return name


def _size(group: pq.RowGroupMetaData, columns: set[str]) -> int:
  """Plain bytes of some columns of a row group."""
  chunks = (group.column(i) for i in range(group.num_columns))
  return sum(chunk.total_uncompressed_size for chunk in chunks if _root(chunk.path_in_schema, columns))


def _held(metadata: pq.FileMetaData, number: int, columns: set[str]) -> int:
  """Bytes in memory while a row group is read: a page, compressed and plain, and a batch."""
  group = metadata.row_group(number)
  size = _size(group, columns)
  page = _PAGE_BYTES
  if 'parquet-cpp' in (metadata.created_by or ''):
    page = max(page, size * _PAGE_ROWS // max(group.num_rows, 1))
  return 2 * min(page, size) + min(_BATCH_BYTES, size)


def _root(path: str, columns: set[str]) -> bool:
  """Whether the path of a leaf ('image.bytes') belongs to one of the columns."""
  return bool(_column(path, columns))


def _check_image(file: str, name: str, types: Mapping[str, pa.DataType]) -> None:
  """Raises UserError where the image's column holds something else than bytes."""
  column = _column(name, types)
  if not column:
    return
  kind = types[column]
  for part in filter(None, name[len(column):].split('.')):
    index = kind.get_field_index(part) if pa.types.is_struct(kind) else -1
    if index < 0:
      raise UserError(f'{file}: the column {column} has no {part}: it is {kind}; name the column of the images with image=')
    kind = kind.field(index).type
  if pa.types.is_struct(kind) and kind.get_field_index('bytes') >= 0:
    kind = kind.field('bytes').type
  if pa.types.is_dictionary(kind):
    kind = kind.value_type
  bytes_of_a_kind = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary,
                     pa.types.is_binary_view, pa.types.is_null)
  if not any(is_kind(kind) for is_kind in bytes_of_a_kind):
    raise UserError(f'{file}: the column {name} is {kind}, not the bytes of images; name their column with image=')
