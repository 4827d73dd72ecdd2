"""Files of captions -> rows of fields: CSV, TSV, JSON lines and JSON as people write them.

| file | rows |
|---|---|
| .jsonl | a JSON object a line |
| .json | a list of objects; COCO; {name: caption}; {name: {field: value}}; {field: [values]} |
| .csv | a table with a header; quoted as RFC 4180, or not quoted at all |
| .tsv | a table with a header; not quoted, unless every quoted field needs its quotes |

UTF-8 or, with its byte order mark, UTF-16. A row that cannot be read is an error that names its
line. `Fields.name` and `Fields.texts` say which fields are used; see `choose_fields`.
"""

from __future__ import annotations

import codecs
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lavit_jax.errors import UserError

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff')
NAME, TEXT = 'file_name', 'text'
_NUMBER = re.compile(r'\s*[-+]?[0-9.]*\s*')
_FILE_NAME = re.compile(r'[^\n]*\.\w{2,5}\s*')


class Row(NamedTuple):
  """The fields of one row, and the line of the file where it begins (0: unknown)."""

  fields: Mapping[str, Any]
  line: int


class Fields(NamedTuple):
  """The field with the name of the image ('': none), and those with its texts."""

  name: str
  texts: tuple[str, ...]


def read_rows(file: str, data: bytes, fields: Fields) -> list[Row]:
  """The rows of a file of captions.

  Args:
    file: its path, whose suffix says what it is.
    data: its content.
    fields: those that were chosen, '' and () for the usual ones.

  Raises:
    UserError: it is not what its suffix says, by its line.
  """
  text = decode(file, data)
  if file.endswith('.jsonl') and not text.lstrip().startswith('['):
    return _json_lines(file, text)
  if file.endswith(('.json', '.jsonl')):
    return _json_rows(file, text, fields.name)
  return _Table(file, text).rows(fields)


def choose_fields(
  file: str,
  rows: Sequence[Row],
  name: str | None,
  texts: Sequence[str],
  needs_name: bool = True,
  needs_text: bool = True,
) -> Fields:
  """Which fields of the rows hold the name of the image and its texts.

  Args:
    name: the option `image`; None: 'file_name'.
    texts: the option `text`, dotted names; (): 'text'.

  Returns:
    The fields as they are spelled in the file. The exact name comes first; else one that differs
    from it in case, spaces, '_' and '-' only, if there is just one.

  Raises:
    UserError: a field that is needed is in no row.
  """
  known = dict.fromkeys(key for row in rows for key in row.fields if isinstance(key, str))
  found = _find(file, known, name or NAME, 'image') if name or needs_name else ''
  wanted = tuple(texts) or (TEXT,)
  if not needs_text and not texts:
    return Fields(found, ())
  chosen = []
  for each in wanted:
    first, dot, rest = each.partition('.')
    whole = each in known
    chosen.append(each if whole else _find(file, known, first, 'text') + dot + rest)
  return Fields(found, tuple(chosen))


def _find(file: str, known: Mapping[str, None], wanted: str, option: str) -> str:
  if wanted in known:
    return wanted
  alike = [key for key in known if _plain(key) == _plain(wanted)]
  if len(alike) == 1:
    return alike[0]
  if len(alike) > 1:
    raise UserError(
      f'{file} has several fields like {wanted!r}: {", ".join(map(repr, alike))}; '
      f'say which with {option}='
    )
  near = difflib.get_close_matches(wanted, known, n=1)
  hint = f' ({near[0]!r} is near)' if near else ''
  raise UserError(
    f'{file} has no field {wanted!r}{hint}; its fields are '
    f'{", ".join(map(repr, list(known)[:20])) or "none"}; name the one to use with '
    f'{option}='
  )


def _plain(key: str) -> str:
  return re.sub(r'[\s_-]', '', key).lower()


def decode(file: str, data: bytes) -> str:
  """The text, with \\n for every end of a line, without a byte order mark.

  Raises:
    UserError: it is not UTF-8, nor UTF-16 with a byte order mark.
  """
  wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
  try:
    text = data.decode('utf-16' if wide else 'utf-8-sig')
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start) + 1
    raise UserError(
      f'{file}:{line}: not {"UTF-16" if wide else "UTF-8"}; save the file as UTF-8'
    ) from None
  return text.replace('\r\n', '\n').replace('\r', '\n')


# -------------------------------------------------------------------------------------------- JSON


def _json_lines(file: str, text: str) -> list[Row]:
  rows = []
  for line, each in enumerate(text.split('\n'), 1):
    if not each.strip():
      continue
    try:
      fields = json.loads(each)
    except (ValueError, RecursionError) as error:
      raise UserError(f'{file}:{line}: not JSON ({error}); give one object a line') from None
    if not isinstance(fields, dict):
      raise UserError(
        f'{file}:{line}: not an object but {type(fields).__name__}; give each line '
        '{"file_name": ..., "text": ...}'
      )
    rows.append(Row(fields, line))
  return rows


def _json_rows(file: str, text: str, name: str) -> list[Row]:
  try:
    content = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f'{file}:{getattr(error, "lineno", 1)}: not JSON ({error})') from None
  if isinstance(content, dict) and _is_list_of_objects(content.get('annotations')):
    if _is_list_of_objects(content.get('images')):
      return _coco(file, content)
  if isinstance(content, dict):
    content = _dict_rows(file, content, name)
  if not isinstance(content, list):
    raise UserError(
      f'{file}: holds {type(content).__name__}; give a list of objects with '
      'file_name and text, or {name: caption}'
    )
  for number, fields in enumerate(content):
    if not isinstance(fields, dict):
      raise UserError(
        f'{file}: entry {number} is not an object but {type(fields).__name__}; give '
        'each {"file_name": ..., "text": ...}'
      )
  return [Row(fields, 0) for fields in content]


def _is_list_of_objects(value) -> bool:
  return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _coco(file: str, content: dict) -> list[Row]:
  """Images and annotations of COCO; `caption` of an annotation is its text."""
  images = {}
  for image in content['images']:
    images[image.get('id')] = image.get('file_name')
  rows = []
  for number, fields in enumerate(content['annotations']):
    name = images.get(fields.get('image_id'))
    if name is None:
      raise UserError(
        f'{file}: annotation {number} is of the image {fields.get("image_id")!r}, '
        'which "images" does not name'
      )
    usual = {TEXT: fields['caption']} if 'caption' in fields else {}
    rows.append(Row({**usual, **fields, NAME: name}, 0))
  return rows


def _dict_rows(file: str, content: dict, name: str) -> list[dict]:
  """{field: [values]}, {field: {row: value}} (pandas), {'data': [objects]}, {name: caption}."""
  columns = [key for key in content if _plain(key) == _plain(name or NAME)]
  if len(columns) == 1 and isinstance(content[columns[0]], (list, dict)):
    return _columns(file, content, columns[0])
  for value in content.values():
    if _is_list_of_objects(value) and any(_plain(key) == _plain(name or NAME) for key in value[0]):
      return value
  rows = []
  for key, value in content.items():
    fields = value if isinstance(value, dict) else {TEXT: value}
    rows.append({**fields, (name or NAME): key})
  return rows


def _columns(file: str, content: dict, name: str) -> list[dict]:
  keys = content[name].keys() if isinstance(content[name], dict) else range(len(content[name]))
  rows = []
  for key in keys:
    fields = {}
    for column, values in content.items():
      if type(values) is not type(content[name]) or len(values) != len(content[name]):
        raise UserError(
          f'{file}: {column!r} has not one value for each {name!r}; give all fields '
          'the same number of values'
        )
      if isinstance(values, dict) and key not in values:
        raise UserError(f'{file}: {column!r} has no value for {key!r}')
      fields[column] = values[key]
    rows.append(fields)
  return rows


# ------------------------------------------------------------------------------------------ tables


class _Table:
  """A CSV or TSV file, whose rows are read one after the other."""

  def __init__(self, file: str, text: str):
    self.file, self.text = file, text
    first = text.lstrip('\n').partition('\n')[0]
    self.is_tsv = file.endswith('.tsv') or '\t' in first and not file.endswith('.csv')
    self.delimiter = '\t' if self.is_tsv else ','
    if not self.is_tsv and ',' not in first:  # as spreadsheets of many countries write CSV
      self.delimiter = next((each for each in ';\t' if each in first), ',')
    mark = re.escape(self.delimiter)
    # A quoted field, in which "" is a quotation mark and a line may end, or a bare one.
    self.field = re.compile(
      rf' *"(?P<quoted>[^"]*(?:""[^"]*)*)" *(?={mark}|\n|\Z)|(?P<bare>[^{mark}\n]*)'
    )
    self.quotes = not self.is_tsv or self._is_quoted()

  def rows(self, fields: Fields) -> list[Row]:
    """Of each line behind the header its fields.

    Raises:
      UserError: a line that has not the fields of the header.
    """
    header, place, line = None, 0, 1
    rows = []
    while place < len(self.text):
      values, after = self._record(place, line, header)
      if values and header is None:
        header = self._header(values, line)
      elif values:
        rows.append(Row(self._fit(header, values, place, after, line, fields), line))
      line += self.text.count('\n', place, after)
      place = after
    return rows

  def _header(self, values: list[str], line: int) -> list[str]:
    header = [value.strip() for value in values]
    if any(value.lower().endswith(IMAGE_SUFFIXES) for value in header):
      raise UserError(
        f'{self.file}:{line}: the first line names an image, where the names of the '
        f'columns belong; write {self.delimiter.join((NAME, TEXT))!r} above it'
      )
    for value in header:
      if value and header.count(value) > 1:
        raise UserError(f'{self.file}:{line}: has the column {value!r} twice; rename one')
    return header

  def _record(self, place: int, line: int, header: list[str] | None) -> tuple[list[str], int]:
    """The values of the row that begins at `place` ([]: a blank line), and where the next does."""
    end = self._end_of_line(place)
    bare = self.text[place:end].removesuffix('\n')
    if not bare.strip():
      return [], end
    if not self.quotes or '"' not in bare:
      return bare.split(self.delimiter), end
    values, _, after = self._quoted(place)
    if after > end and self._swallows_rows(end, after):
      raise UserError(
        f'{self.file}:{line}: a quotation mark opens a field here that would take '
        'in the rows below; close it, or write it twice in a field in quotation '
        'marks'
      )
    if values is None or header is not None and len(values) != len(header):
      if '\\"' in bare:
        raise UserError(
          f'{self.file}:{line}: has \\" in a field in quotation marks; CSV writes it as ""'
        )
      return bare.split(self.delimiter), end  # quotation marks of the caption itself
    return values, after

  def _quoted(self, place: int) -> tuple[list[str] | None, list[bool], int]:
    """(values of the row at `place` by the rules for quotes, which were in quotes, its end).

    The values are None where a quotation mark opens a field and none closes it.
    """
    values, flags = [], []
    while True:
      match = self.field.match(self.text, place)
      quoted = match['quoted'] is not None
      if not quoted and match['bare'].lstrip(' ').startswith('"'):
        return None, [], place
      values.append(match['quoted'].replace('""', '"') if quoted else match['bare'])
      flags.append(quoted)
      place = match.end()
      if self.text[place : place + 1] != self.delimiter:
        return values, flags, place + 1
      place += 1

  def _end_of_line(self, place: int) -> int:
    return (self.text.find('\n', place) + 1) or len(self.text)

  def _swallows_rows(self, place: int, end: int) -> bool:
    """Whether a line from `place` to `end` begins as a row does, with the name of an image."""
    for line in self.text[place:end].split('\n'):
      name, mark, _ = line.partition(self.delimiter)
      if mark and name.strip(' "').lower().endswith(IMAGE_SUFFIXES):
        return True
    return False

  def _is_quoted(self) -> bool:
    """Whether the whole file keeps the rules for quotes, and its quoted fields need them, or all
    fields are quoted, as no caption that only quotes somebody would make it.
    """
    place, needless, bare, count = 0, 0, 0, None
    while place < len(self.text):
      end = self._end_of_line(place)
      if not self.text[place:end].strip():
        place = end
        continue
      values, flags, after = self._quoted(place)
      if values is None or (count or len(values)) != len(values):
        return False
      if after > end and self._swallows_rows(end, after):
        return False
      count = len(values)
      for value, quoted in zip(values, flags):
        bare += not quoted
        needless += quoted and not re.search(r'["\t\n]', value)
      place = after
    return not needless or not bare

  def _fit(
    self, header: list[str], values: list[str], place: int, after: int, line: int, fields: Fields
  ) -> dict[str, str]:
    """The values by their columns; more of them than columns belong to the caption, where that
    is the only reading.

    Raises:
      UserError: too few, or more than one reading.
    """
    while len(values) > len(header) and not values[-1].strip():
      values = values[:-1]  # of delimiters at the end of the line
    extra = len(values) - len(header)
    if extra < 0:
      raise UserError(
        f'{self.file}:{line}: has {len(values)} of {len(header)} fields '
        f'({self.text[place:after].strip()[:60]!r}); mend the line'
      )
    if extra:
      column = self._caption_column(header, fields)
      if column is not None:
        middle = self.delimiter.join(values[column : column + extra + 1])
        values = values[:column] + [middle] + values[column + extra + 1 :]
      if column is None or not self._is_plausible(header, values, column, fields):
        raise UserError(
          f'{self.file}:{line}: has {extra} more {self.delimiter!r} than the header '
          f'({self.text[place:after].strip()[:60]!r}), and it is not clear to which '
          'field they belong; put the field in quotation marks'
        )
    return dict(zip(header, values))

  def _caption_column(self, header: list[str], fields: Fields) -> int | None:
    wanted = [_plain(each.partition('.')[0]) for each in fields.texts or (TEXT,)]
    places = [i for i, key in enumerate(header) if _plain(key) in wanted]
    if not places and len(header) == 2:
      name = _plain(fields.name or NAME)
      places = [i for i, key in enumerate(header) if _plain(key) != name]
    return places[0] if len(places) == 1 else None

  def _is_plausible(
    self, header: list[str], values: list[str], column: int, fields: Fields
  ) -> bool:
    """Whether the other fields can be what they would be: a name of an image, and numbers."""
    for i, (key, value) in enumerate(zip(header, values)):
      if i == column:
        continue
      if _plain(key) == _plain(fields.name or NAME):
        if not _FILE_NAME.fullmatch(value):
          return False
      elif not _NUMBER.fullmatch(value):
        return False
    return True
