"""The result file of a batch: JSON lines, only ever appended to."""

from __future__ import annotations

import collections
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from lavit_jax.apps.batch.tasks import Row
from lavit_jax.errors import UserError


class ResultsFile:
  """A file with one line for each finished row. Reopened, it knows which rows are finished.

  A last line without its end, which an interrupted run left, is dropped.

  Attributes:
    path: the file.
    next_number: where the numbers of further images begin: after all numbers in the file, from
      which lines may have been deleted.
  """

  def __init__(self, path: str | os.PathLike, outputs: Sequence[str], settings: dict[str, Any]):
    """Opens the file, which need not exist.

    Args:
      path: the file.
      outputs: the keys that the task writes; the other keys of a line are those of its row.
      settings: everything besides the row that a result depends on.

    Raises:
      UserError: the file holds something else, or results of other settings; it is left unchanged.
    """
    self.path = pathlib.Path(path)
    self.next_number = 0
    self._settings = settings
    self._result_keys = {*outputs, 'error', 'settings'}
    self._num_lines = 0
    self._finished: collections.Counter[int] = collections.Counter()
    self._errors: list[tuple[int, str]] = []  # (key of the row, its error)
    if self.path.exists():
      self._read()

  def missing(self, rows: Sequence[Row]) -> list[bool]:
    """Which rows have no line yet; of several equal rows, the later ones."""
    unused = self._finished.copy()
    missing = []
    for row in rows:
      key = _row_key(row)
      missing.append(unused[key] == 0)
      if unused[key]:
        unused[key] -= 1
    return missing

  def add(self, results: Sequence[Row]) -> None:
    """Appends lines; when it returns, they are in the file.

    The lines are ASCII, since the name of an image need not be valid UTF-8.
    """
    lines = [json.dumps(result | {'settings': self._settings}) + '\n' for result in results]
    self.path.parent.mkdir(parents=True, exist_ok=True)
    with open(self.path, 'ab') as file:
      file.write(''.join(lines).encode())
    for result in results:
      self._note_error(result)

  def errors(self, rows: Sequence[Row]) -> list[str]:
    """The errors of lines that belong to these rows; others may be of files that are gone."""
    keys = {_row_key(row) for row in rows}
    return [error for key, error in self._errors if key in keys]

  def _read(self) -> None:
    end = 0
    with open(self.path, 'rb') as file:
      for line in file:
        if line.endswith(b'\n'):
          self._read_line(line)
          end += len(line)
        elif self._num_lines or self._is_torn_result(line):
          os.truncate(self.path, end)
        else:
          raise self._foreign_error()

  def _read_line(self, line: bytes) -> None:
    try:
      result = json.loads(line)
      settings = {**result['settings']}
    except (ValueError, TypeError, KeyError):
      raise self._foreign_error() from None
    self._check_settings(settings)
    self._num_lines += 1
    number = re.match('[0-9]{1,9}(?=-)', str(result.get('file')))
    self.next_number = max(self.next_number, int(number[0]) if number else 0) + 1
    self._finished[self._result_row_key(result)] += 1
    self._note_error(result)

  def _check_settings(self, settings: dict[str, Any]) -> None:
    for key in self._settings | settings:
      old = settings.get(key)
      new = self._settings.get(key)
      if old != new:
        raise UserError(
          f'{self.path} holds results of {key} {json.dumps(old)}, not of {key} {json.dumps(new)}; '
          'give --out another name, or delete it to begin again'
        )

  def _result_row_key(self, result: Row) -> int:
    return _row_key({key: result[key] for key in result if key not in self._result_keys})

  def _note_error(self, result: Row) -> None:
    if 'error' in result:
      self._errors.append((self._result_row_key(result), result['error']))

  def _is_torn_result(self, line: bytes) -> bool:
    """Whether a line without an end is the beginning of a result with these settings.

    They are what is written last.
    """
    _, key, torn = line.rpartition(b', "settings": ')
    expected = json.dumps(self._settings) + '}'
    return bool(key) and expected.encode().startswith(torn)

  def _foreign_error(self) -> UserError:
    return UserError(
      f'{self.path}:{self._num_lines + 1} is not a result of this command; give --out another name'
    )


def _row_key(row: Row) -> int:
  return hash(json.dumps(row, sort_keys=True))
