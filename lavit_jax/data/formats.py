"""The formats of data: what a record is in each. Stores are read by index, streams in order.

| format      | kind   | `path`                           | `image`           | `text`             |
|-------------|--------|----------------------------------|-------------------|--------------------|
| arrayrecord | store  | files of `lavit data pack`       | (as packed)       | fields, as of tars |
| tfds        | store  | name, or the folder of a version | feature           | features           |
| folder      | store  | folder of images and captions    | field 'file_name' | fields, 'text'     |
| tars        | stream | WebDataset or img2dataset tars   | extensions        | extensions         |
| parquet     | stream | files; a row group is a unit     | column of bytes   | columns            |
| codes       | stream | Parquet files, of `lavit         | (codes: column    | columns            |
|             |        | tokenize`                        | 'codes')          |                    |

A local folder of tars, Parquet or ArrayRecord files stands for all its files that end in .tar (or
.tar.gz and so on, archives.py), .parquet or .array_record; ArrayRecord files are always local.

`text` names one field or several, of which one is chosen each time; a dot goes down into JSON,
structs and lists ('json.caption', 'captions.text'). What is not a record becomes a `Skip` with the
reason. `identity()` distinguishes a source from another one, as JSON: its files with their sizes,
as far as these are cheap to ask for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from lavit_jax.data import archives, parquets, paths, tars
from lavit_jax.data.record import IMAGE_EXTENSIONS, Record, Skip, find_texts, format_names
from lavit_jax.data.stores import ArrayRecords, Folder, Tfds
from lavit_jax.errors import UserError


class StreamFormat(Protocol):
  """A format that is read in order, unit by unit.

  Attributes:
    cost: what an open unit costs, in open tars (open_units.py).
  """

  cost: int

  def __len__(self) -> int:
    """The number of units."""
    ...

  def read(
    self, unit: int, start: int = 0, **open_options: int
  ) -> Iterator[tuple[int, int, Record | Skip]]:
    """(start, end, record or skip) of each record of a unit, from position `start` on.

    The last item is a Skip of the unit 'files'. `open_options` are for `paths.open_file`.
    """
    ...


class Tars:
  """Tars as they are. A unit is a tar, a position in it a byte.

  Args:
    path: a folder, files, globs or braces.
    image: extensions of images, of which a sample's first counts; None: IMAGE_EXTENSIONS.
    text: the extensions with texts, dotted names.

  Raises:
    UserError: no tars at the path.
  """

  cost = 1

  def __init__(self, path: str | Sequence[str], image: Sequence[str] | None, text: Sequence[str]):
    self.files = tar_files(path)
    self.text = text
    if image is None:
      self.image = IMAGE_EXTENSIONS
    else:
      self.image = tuple(extension.lower() for extension in image)
    self._compression: dict[str, str] = {}  # by path, as the tars are opened
    self._extensions = set(self.image)
    for name in text:
      parts = name.lower().split('.')
      for count in range(1, len(parts) + 1):
        self._extensions.add('.'.join(parts[:count]))

  def __len__(self) -> int:
    return len(self.files)

  def identity(self) -> list:
    """Names and sizes of the tars, as JSON."""
    return paths.names_and_sizes(self.files)

  @property
  def expected_fields(self) -> str:
    """Where images and texts are read from, for messages."""
    return (
      f'image in {format_names(self.image)}, text in {format_names(self.text)}, where an '
      'extension is all after the first dot of a name'
    )

  def read(
    self, unit: int, start: int = 0, **open_options: int
  ) -> Iterator[tuple[int, int, Record | Skip]]:
    """(start, end, record or skip) of each sample from byte `start` on (see StreamFormat.read).

    Members of a sample that are not read come before it, each a Skip of the unit 'members' with
    the same positions.
    """
    path = self.files[unit]
    end = start
    last = Skip('', path, 'files')
    try:
      with archives.open_tar(path, self._compression, **open_options) as file:
        for sample in tars.samples(file, start, self._extensions):
          end = sample.end
          for reason, name in sample.unread:
            yield sample.start, end, Skip(reason, f'{path}: {name}', 'members')
          if sample.key is not None:
            yield sample.start, end, self.record(path, sample)
    except paths.NO_FILE_ERRORS:
      last = Skip('missing tar', path, 'files')
    except tars.Broken as error:
      last = Skip('broken tar', f'{path} ({error})', 'files')
    yield end, end, last

  def record(self, path: str, sample: tars.Sample) -> Record | Skip:
    """The record of a sample; a Skip if the sample has an extension twice."""
    origin = f'{path}: {sample.key} ({format_names(sample.fields)})'
    if sample.repeated:  # which caption belongs to which image cannot be known
      repeated = format_names(sample.repeated)
      return Skip('repeated member', f'{origin}, which has {repeated} twice')
    images = (sample.fields[extension] for extension in self.image if extension in sample.fields)
    texts = find_texts(sample.fields, self.text, lower=True)
    return Record(next(images, b''), texts, origin, sample.key or '')


def tar_files(path: str | Sequence[str]) -> list[str]:
  """The tars at a path or several; a local folder stands for all its tars, compressed or not.

  Raises:
    UserError: a folder or a glob without tars.
  """
  files = []
  for item in [path] if isinstance(path, (str, os.PathLike)) else path:
    folder = os.path.expanduser(os.fspath(item).removeprefix('file://'))
    if not os.path.isdir(folder):
      files += paths.expand(item, '.tar')
      continue
    names = [name for name in sorted(os.listdir(folder)) if _is_tar_name(name)]
    if not names:
      raise UserError(
        f'{os.path.join(folder, "*.tar")} matches no file; the folder has no '
        f'{", ".join(archives.ENDINGS)}; check the path'
      )
    files += [os.path.join(folder, name) for name in names]
  if not files:
    raise UserError(f'{path!r} names no files; give a path, a glob or a list')
  return files


def _is_tar_name(name: str) -> bool:
  return name.lower().endswith(archives.ENDINGS) and not name.startswith('.')


class Parquets:
  """Parquet files with image files in a column of bytes, or of structs {bytes, path}.

  A unit is a row group, or a file that cannot be read; a position in it is a row.

  Args:
    path: a folder, files, globs or braces.
    image: the column with the images, a dotted name.
    text: the columns with texts, dotted names.

  Raises:
    UserError: as parquets.list_units.
  """

  def __init__(self, path: str | Sequence[str], image: str, text: Sequence[str]):
    self.image = image
    self.text = text
    self.files = paths.expand(path, '.parquet')
    self.units = parquets.list_units(self.files, image, text)
    self.cost = parquets.unit_cost(self.units)

  def __len__(self) -> int:
    return len(self.units)

  def identity(self) -> list:
    """Names and sizes of the files, as JSON."""
    return paths.names_and_sizes(self.files)

  @property
  def expected_fields(self) -> str:
    """Where images and texts are read from, for messages."""
    return f'image in the column {self.image}, text in {format_names(self.text)}'

  def read(
    self, unit: int, start: int = 0, **open_options: int
  ) -> Iterator[tuple[int, int, Record | Skip]]:
    """(row, row + 1, record) of each row from `start` on (see StreamFormat.read)."""
    group = self.units[unit]
    row = start
    last = Skip('', group.file, 'files')
    try:
      for values in parquets.read_rows(group, start, **open_options):
        origin = f'{group.file}, row group {group.group}, row {row}'
        key = f'{os.path.splitext(os.path.basename(group.file))[0]}/{group.group}/{row}'
        yield row, row + 1, self.record(values, origin, key)
        row += 1
    except parquets.DAMAGE as error:
      last = Skip('broken parquet', f'{group.file}, row group {group.group} ({error})', 'files')
    yield row, row, last

  def record(self, values: dict[str, Any], origin: str, key: str) -> Record | Skip:
    """The record of a row's values by column."""
    image = parquets.image_of(values, self.image)
    return Record(image, find_texts(values, self.text), origin, key)


class Codes(Parquets):
  """Parquet files with the codes of images, which `lavit tokenize` writes (apps/batch/shards.py).

  Args:
    path: a folder, files, globs or braces.
    image: nothing.
    text: the columns with texts, dotted names.

  Raises:
    UserError: as parquets.list_units.
  """

  def __init__(self, path: str | Sequence[str], image: None, text: Sequence[str]):
    del image
    self.text = text
    self.files = paths.expand(path, '.parquet')
    self.units = parquets.list_units(self.files, None, (*text, 'codes', 'error'))
    self.cost = parquets.unit_cost(self.units)

  @property
  def expected_fields(self) -> str:
    """Where codes and texts are read from, for messages."""
    return f'codes in the column codes, text in {format_names(self.text)}'

  def record(self, values: dict[str, Any], origin: str, key: str) -> Record | Skip:
    """The record of a row's values by column; a Skip if the row has an error in place of codes."""
    codes = values.get('codes')
    if not isinstance(codes, list) or not all(isinstance(code, int) for code in codes):
      return Skip('no codes', f'{origin} ({values.get("error") or "the column codes has none"})')
    return Record(b'', find_texts(values, self.text), origin, key, codes)


FORMATS = {
  'arrayrecord': ArrayRecords,
  'tfds': Tfds,
  'folder': Folder,
  'tars': Tars,
  'parquet': Parquets,
  'codes': Codes,
}
DEFAULT_FIELDS = {  # format -> (image, text)
  'arrayrecord': (None, 'txt'),
  'tfds': ('image', 'text'),
  'folder': (None, ''),
  'tars': (None, 'txt'),
  'parquet': ('image', 'text'),
  'codes': (None, 'text'),
}
