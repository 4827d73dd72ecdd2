"""The fields of a file of captions: which one names the image, and which ones have its texts."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lavit_jax.errors import UserError

NAME = 'file_name'
TEXT = 'text'
_MAX_SHOWN_FIELDS = 20


class Row(NamedTuple):
  """The fields of one row, and the line of the file where it begins (0: unknown)."""

  fields: Mapping[str, Any]
  line: int


class Fields(NamedTuple):
  """The field with the name of the image ('': none), and those with its texts."""

  name: str
  texts: tuple[str, ...]


def choose_fields(
  file: str,
  rows: Sequence[Row],
  name: str | None,
  texts: Sequence[str],
  needs_name: bool = True,
  needs_text: bool = True,
) -> Fields:
  """Finds the fields with the name of the image and its texts.

  Args:
    file: path for error messages.
    rows: of the file.
    name: the option `image`; None stands for 'file_name'.
    texts: the option `text`, dotted names; () stands for 'text'.
    needs_name: whether the field with the name must exist.
    needs_text: whether the fields with texts must exist.

  Returns:
    The fields as the file spells them: the exact name, or else the only one that differs just in
    case, spaces, '_' and '-'.

  Raises:
    UserError: a field that is needed is in no row.
  """
  all_keys = itertools.chain.from_iterable(row.fields for row in rows)
  keys = list(dict.fromkeys(key for key in all_keys if isinstance(key, str)))
  name_field = _find_field(file, keys, name or NAME, 'image') if name or needs_name else ''
  if not needs_text and not texts:
    return Fields(name_field, ())
  text_fields = []
  for field in tuple(texts) or (TEXT,):
    if field not in keys:
      first, dot, rest = field.partition('.')
      field = _find_field(file, keys, first, 'text') + dot + rest
    text_fields.append(field)
  return Fields(name_field, tuple(text_fields))


def _find_field(file: str, keys: Sequence[str], field: str, option: str) -> str:
  """Returns the spelling of a field in the file; `option` is for the error message."""
  if field in keys:
    return field
  similar = [key for key in keys if same_field(key, field)]
  if len(similar) == 1:
    return similar[0]
  if similar:
    raise UserError(
      f'{file} has several fields like {field!r}: {", ".join(map(repr, similar))}; '
      f'say which with {option}='
    )
  near = difflib.get_close_matches(field, keys, n=1)
  hint = f' ({near[0]!r} is near)' if near else ''
  shown = ', '.join(map(repr, keys[:_MAX_SHOWN_FIELDS])) or 'none'
  raise UserError(
    f'{file} has no field {field!r}{hint}; its fields are {shown}; '
    f'name the one to use with {option}='
  )


def same_field(key: str, field: str) -> bool:
  """Whether two names of fields differ at most in case, spaces, '_' and '-'."""
  return _plain(key) == _plain(field)


def _plain(key: str) -> str:
  return re.sub(r'[\s_-]', '', key).lower()
