"""A record as it is stored, the reasons why there is none, and the texts in a record's fields."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

NO_IMAGE = 'no image'
EMPTY_CAPTION = 'empty caption'
IMAGE_EXTENSIONS = ('jpg', 'jpeg', 'png', 'webp', 'gif', 'bmp', 'tif', 'tiff')


class Record(NamedTuple):
  """One example as it is stored.

  Attributes:
    image: the bytes of an image file; b'' if the record has no image.
    texts: all texts of the record, not cleaned.
    origin: file and position, for messages.
    key: what the file calls it; '' where records have no names.
    codes: of its image, where these are stored in place of the image.
    more_images: those after the first, of a conversation.
  """

  image: bytes
  texts: tuple[str, ...]
  origin: str
  key: str = ''
  codes: Sequence[int] = ()
  more_images: tuple[bytes, ...] = ()


class Skip(NamedTuple):
  """Something that is not a record.

  Attributes:
    reason: why it is skipped; '' with the unit 'files' if the file was read to its end.
    origin: file and position, for messages.
    unit: what was skipped: 'records', 'files', or 'members' of tars, which are only counted.
  """

  reason: str
  origin: str
  unit: str = 'records'


def find_texts(
  fields: Mapping[str, Any], names: Sequence[str], lower: bool = False
) -> tuple[str, ...]:
  """All texts at the dotted names; a list on the way stands for each of its items.

  A field may have dots in its own name ('outputs.txt'): the longest field that a name begins with
  is read.

  Args:
    fields: a record's fields by name.
    names: dotted names, which go down into mappings, lists and strings of JSON.
    lower: the names of the fields are in lower case, and `names` may be in any case.
  """
  texts: list[str] = []
  for name in names:
    field = name
    rest = ''
    while field:
      key = field.lower() if lower else field
      if key in fields:
        _collect(fields[key], rest, texts)
        break
      field, _, last = field.rpartition('.')
      rest = f'{last}.{rest}' if rest else last
  return tuple(texts)


def format_names(names: Iterable[str], count: int = 8) -> str:
  """'jpg, txt, json', or the first `count` and the number of the others; for messages."""
  names = tuple(names)
  line = ', '.join(names[:count])
  if len(names) > count:
    line += f' and {len(names) - count} more'
  return line


def _collect(value: Any, path: str, texts: list[str]) -> None:
  """Appends the texts at the dotted `path` in `value` to `texts`."""
  if hasattr(value, 'tolist'):  # NumPy's strings and arrays
    value = value.tolist()
  if isinstance(value, bytes):
    value = value.decode('utf-8', 'replace')
  if isinstance(value, (list, tuple)):
    for item in value:
      _collect(item, path, texts)
  elif path and isinstance(value, str):
    _collect(_parse_json(value), path, texts)
  elif path and isinstance(value, Mapping):
    name, _, rest = path.partition('.')
    _collect(value.get(name), rest, texts)
  elif isinstance(value, str):
    texts.append(value)


def _parse_json(text: str) -> Any:
  """The value of a JSON text; None if it is not JSON."""
  try:
    return json.loads(text)
  except ValueError:
    return None
