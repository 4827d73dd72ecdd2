"""Reads tables of captions: CSV and TSV, by the rules for quotation marks or without them.

Many files are not quoted as the rules demand. Where only one reading is plausible, it is taken;
otherwise an error names the line and the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from lavit_jax.data.captions_fields import NAME, TEXT, Fields, Row, same_field
from lavit_jax.data.images import IMAGE_SUFFIXES
from lavit_jax.errors import UserError

_NUMBER = re.compile(r'\s*[-+]?[0-9.]*\s*')
_FILE_NAME = re.compile(r'[^\n]*\.\w{2,5}\s*')
_MAX_SHOWN = 60  # characters of a row in a message


class _QuotedRow(NamedTuple):
  """A row that was read by the rules for quotation marks.

  Attributes:
    values: without their quotation marks.
    is_quoted: which of the values had them.
    end: position after the row.
  """

  values: list[str]
  is_quoted: list[bool]
  end: int


class Table:
  """A CSV or TSV file.

  Args:
    file: its path; the suffix gives the format.
    text: its content.
  """

  def __init__(self, file: str, text: str):
    self._file = file
    self._text = text
    first_line = text.lstrip('\n').partition('\n')[0]
    is_tsv = file.endswith('.tsv') or '\t' in first_line and not file.endswith('.csv')
    self._delimiter = '\t' if is_tsv else _csv_delimiter(first_line)
    # A quoted field, in which "" is a quotation mark and a line may end, or a bare one.
    delimiter = re.escape(self._delimiter)
    self._field = re.compile(
      rf' *"(?P<quoted>[^"]*(?:""[^"]*)*)" *(?={delimiter}|\n|\Z)|(?P<bare>[^{delimiter}\n]*)'
    )
    self._has_quotes = not is_tsv or self._is_quoted_throughout()

  def read_rows(self, fields: Fields) -> list[Row]:
    """Reads the rows after the header.

    Args:
      fields: the requested fields; '' and () stand for the usual ones.

    Raises:
      UserError: the header is missing, or a row does not have its fields.
    """
    header = None
    position = 0
    line = 1
    rows = []
    while position < len(self._text):
      values, end = self._read_values(position, line, header)
      if values and header is None:
        header = self._read_header(values, line)
      elif values and header is not None:
        source = self._text[position:end]
        values = self._fit_header(header, values, source, line, fields)
        rows.append(Row(dict(zip(header, values, strict=True)), line))
      line += self._text.count('\n', position, end)
      position = end
    return rows

  # ---------------------------------------------------------------------------- values of a row

  def _read_header(self, values: list[str], line: int) -> list[str]:
    header = [value.strip() for value in values]
    if any(value.lower().endswith(IMAGE_SUFFIXES) for value in header):
      raise UserError(
        f'{self._file}:{line}: the first line names an image, where the names of the columns '
        f'belong; write {self._delimiter.join((NAME, TEXT))!r} above it'
      )
    for value in header:
      if value and header.count(value) > 1:
        raise UserError(f'{self._file}:{line}: has the column {value!r} twice; rename one')
    return header

  def _read_values(
    self, position: int, line: int, header: list[str] | None
  ) -> tuple[list[str], int]:
    """Returns the values of the row at `position` ([]: a blank line), and where it ends."""
    line_end = self._line_end(position)
    bare = self._text[position:line_end].removesuffix('\n')
    if not bare.strip():
      return [], line_end
    if not self._has_quotes or '"' not in bare:
      return bare.split(self._delimiter), line_end
    row = self._read_quoted(position)
    if row is not None and self._contains_rows(line_end, row.end):
      raise UserError(
        f'{self._file}:{line}: a quotation mark opens a field here that would take in the rows '
        'below; close it, or write it twice in a field in quotation marks'
      )
    if row is not None and (header is None or len(row.values) == len(header)):
      return row.values, row.end
    if '\\"' in bare:
      raise UserError(
        f'{self._file}:{line}: has \\" in a field in quotation marks; CSV writes it as ""'
      )
    return bare.split(self._delimiter), line_end  # the quotation marks belong to the caption

  def _read_quoted(self, position: int) -> _QuotedRow | None:
    """Reads a row by the rules for quotation marks; None if a field is not closed."""
    values = []
    is_quoted = []
    while True:
      match = self._field.match(self._text, position)
      if match is None:
        return None
      quoted = match['quoted']
      if quoted is None and match['bare'].lstrip(' ').startswith('"'):
        return None
      values.append(match['bare'] if quoted is None else quoted.replace('""', '"'))
      is_quoted.append(quoted is not None)
      position = match.end()
      if self._text[position : position + 1] != self._delimiter:
        return _QuotedRow(values, is_quoted, position + 1)
      position += 1

  def _line_end(self, position: int) -> int:
    return (self._text.find('\n', position) + 1) or len(self._text)

  def _contains_rows(self, start: int, end: int) -> bool:
    """Whether a line between the positions begins as a row does, with the name of an image."""
    if end <= start:
      return False
    for line in self._text[start:end].split('\n'):
      name, delimiter, _ = line.partition(self._delimiter)
      if delimiter and name.strip(' "').lower().endswith(IMAGE_SUFFIXES):
        return True
    return False

  def _is_quoted_throughout(self) -> bool:
    """Whether the whole file follows the rules for quotation marks.

    Then every quoted field needs its quotes, or all fields have them: captions that only quote
    somebody would not look so.
    """
    position = 0
    has_bare = False
    has_needless = False  # quotes
    num_fields = None
    while position < len(self._text):
      line_end = self._line_end(position)
      if not self._text[position:line_end].strip():
        position = line_end
        continue
      row = self._read_quoted(position)
      if row is None or self._contains_rows(line_end, row.end):
        return False
      if num_fields not in (None, len(row.values)):
        return False
      num_fields = len(row.values)
      for value, is_quoted in zip(row.values, row.is_quoted, strict=True):
        if not is_quoted:
          has_bare = True
        elif not re.search(r'["\t\n]', value):
          has_needless = True
      position = row.end
    return not has_needless or not has_bare

  # -------------------------------------------------------------------------- columns of values

  def _fit_header(
    self, header: list[str], values: list[str], source: str, line: int, fields: Fields
  ) -> list[str]:
    """Returns one value for each column.

    Values in excess belong to the caption, which has delimiters, if that is the only reading.

    Raises:
      UserError: there are too few values, or more than one reading.
    """
    while len(values) > len(header) and not values[-1].strip():
      values = values[:-1]  # of delimiters at the end of the line
    excess = len(values) - len(header)
    shown = repr(source.strip()[:_MAX_SHOWN])
    if excess < 0:
      raise UserError(
        f'{self._file}:{line}: has {len(values)} of {len(header)} fields ({shown}); mend the line'
      )
    if excess == 0:
      return values
    column = _caption_column(header, fields)
    if column is not None:
      caption = self._delimiter.join(values[column : column + excess + 1])
      merged = values[:column] + [caption] + values[column + excess + 1 :]
      if _is_plausible(header, merged, column, fields):
        return merged
    raise UserError(
      f'{self._file}:{line}: has {excess} more {self._delimiter!r} than the header ({shown}), and '
      'it is not clear to which field they belong; put the field in quotation marks'
    )


def _csv_delimiter(first_line: str) -> str:
  """Returns ',', or what spreadsheets of many countries write in its place."""
  for delimiter in (',', ';', '\t'):
    if delimiter in first_line:
      return delimiter
  return ','


def _caption_column(header: Sequence[str], fields: Fields) -> int | None:
  """Returns the column of the caption; None if it is not the only candidate."""
  columns = []
  for column, key in enumerate(header):
    if any(same_field(key, field.partition('.')[0]) for field in fields.texts or (TEXT,)):
      columns.append(column)
  if not columns and len(header) == 2:
    name = fields.name or NAME
    columns = [i for i, key in enumerate(header) if not same_field(key, name)]
  return columns[0] if len(columns) == 1 else None


def _is_plausible(
  header: Sequence[str], values: Sequence[str], caption_column: int, fields: Fields
) -> bool:
  """Whether all values but the caption are plausible: the name of an image, or numbers."""
  for column, (key, value) in enumerate(zip(header, values, strict=True)):
    if column == caption_column:
      continue
    pattern = _FILE_NAME if same_field(key, fields.name or NAME) else _NUMBER
    if not pattern.fullmatch(value):
      return False
  return True
