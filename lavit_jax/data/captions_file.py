"""Reads files of captions as rows of fields: CSV, TSV, JSON lines and JSON in all common forms.

| file | rows |
|---|---|
| .jsonl | one JSON object a line |
| .json | a list of objects; COCO; {name: caption}; {name: {field: value}}; {field: [values]} |
| .csv | a table with a header; quoted as in RFC 4180, or not quoted at all |
| .tsv | a table with a header; not quoted, unless every quoted field needs its quotes |

The encoding is UTF-8 or, with its byte order mark, UTF-16. An error about a row names its line.
captions_table.py reads the tables; captions_fields.py chooses the fields that are used.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from typing import Any

from lavit_jax.data.captions_fields import NAME, TEXT, Fields, Row, same_field
from lavit_jax.data.captions_table import Table
from lavit_jax.data.conversations import join_vqa
from lavit_jax.errors import UserError

_EXAMPLE = '{"file_name": ..., "text": ...}'
_SAMPLE_SIZE = 4096  # bytes in which UTF-16 is detected
_MIN_NULL_SHARE = 0.1  # of UTF-16; in English text, half of the bytes are 0


def read_rows(file: str, data: bytes, fields: Fields) -> list[Row]:
  """Reads the rows of a file of captions.

  Args:
    file: its path; the suffix gives the format.
    data: its content.
    fields: the requested fields; '' and () stand for the usual ones.

  Raises:
    UserError: the content does not have the format of the suffix; the message names the line.
  """
  text = decode(file, data)
  if file.endswith('.jsonl') and not text.lstrip().startswith('['):
    return _read_json_lines(file, text)
  if file.endswith(('.json', '.jsonl')):
    return _read_json(file, text, fields.name or NAME)
  return Table(file, text).read_rows(fields)


def read_questions(file: str, data: bytes, answers: tuple[str, bytes] | None) -> list[Row] | None:
  """Reads the official files of VQA; None if `file` is no file of questions of this form.

  Args:
    file: its path.
    data: its content.
    answers: path and content of the file of annotations.

  Raises:
    UserError: as `conversations.join_vqa`; or the annotations are not JSON.
  """
  if not file.endswith('.json'):
    return None
  try:
    questions, annotations = (
      json.loads(decode(*content)) if content else None for content in ((file, data), answers)
    )
  except (ValueError, RecursionError) as error:
    raise UserError(f'{file}: it or its annotations are not JSON ({error})') from None
  if not isinstance(questions, dict) or not _is_object_list(questions.get('questions')):
    return None
  return [Row(fields, 0) for fields in join_vqa(file, questions, annotations)]


def decode(file: str, data: bytes) -> str:
  r"""Returns the text, with \n for every end of a line, without a byte order mark.

  Args:
    file: path for error messages.
    data: content.

  Raises:
    UserError: it is neither UTF-8 nor UTF-16 with a byte order mark.
  """
  is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
  if not is_utf16:
    _check_no_utf16(file, data)
  try:
    text = data.decode('utf-16' if is_utf16 else 'utf-8-sig')
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start) + 1
    encoding = 'UTF-16' if is_utf16 else 'UTF-8'
    raise UserError(f'{file}:{line}: not {encoding}; save the file as UTF-8') from None
  return text.replace('\r\n', '\n').replace('\r', '\n')


def _check_no_utf16(file: str, data: bytes) -> None:
  """Raises UserError for UTF-16 without a byte order mark: all its zero bytes are odd, or even."""
  sample = data[:_SAMPLE_SIZE]
  for encoding, high_bytes, low_bytes in (
    ('UTF-16-LE', sample[1::2], sample[::2]),
    ('UTF-16-BE', sample[::2], sample[1::2]),
  ):
    has_nulls = high_bytes.count(0) > _MIN_NULL_SHARE * len(sample)
    if has_nulls and not low_bytes.count(0):
      raise UserError(
        f'{file}: {encoding} without a byte order mark, which is not read; save the file as UTF-8'
      )


# ------------------------------------------------------------------------------------------- JSON


def _read_json_lines(file: str, text: str) -> list[Row]:
  rows = []
  for number, line in enumerate(text.split('\n'), 1):
    if not line.strip():
      continue
    try:
      fields = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise UserError(f'{file}:{number}: not JSON ({error}); give one object a line') from None
    if not isinstance(fields, dict):
      raise UserError(
        f'{file}:{number}: not an object but {type(fields).__name__}; give each line {_EXAMPLE}'
      )
    rows.append(Row(fields, number))
  return rows


def _read_json(file: str, text: str, name: str) -> list[Row]:
  """Reads a .json of any form; `name` is the field with the name of the image."""
  try:
    content = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f'{file}:{getattr(error, "lineno", 1)}: not JSON ({error})') from None
  if isinstance(content, dict):
    if _is_coco(content):
      return _read_coco(file, content)
    content = _dict_rows(file, content, name)
  if not isinstance(content, list):
    raise UserError(
      f'{file}: holds {type(content).__name__}; give a list of objects with file_name and text, '
      'or {name: caption}'
    )
  for number, fields in enumerate(content):
    if not isinstance(fields, dict):
      raise UserError(
        f'{file}: entry {number} is not an object but {type(fields).__name__}; give each {_EXAMPLE}'
      )
  return [Row(fields, 0) for fields in content]


def _is_object_list(value: Any) -> bool:
  return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _has_field(keys: Iterable[str], field: str) -> bool:
  return any(same_field(key, field) for key in keys)


def _is_coco(content: dict[str, Any]) -> bool:
  return _is_object_list(content.get('annotations')) and _is_object_list(content.get('images'))


def _read_coco(file: str, content: dict[str, Any]) -> list[Row]:
  """Reads images and annotations of COCO; the `caption` of an annotation is its text."""
  names = {image.get('id'): image.get('file_name') for image in content['images']}
  rows = []
  for number, annotation in enumerate(content['annotations']):
    name = names.get(annotation.get('image_id'))
    if name is None:
      raise UserError(
        f'{file}: annotation {number} is of the image {annotation.get("image_id")!r}, '
        'which "images" does not name'
      )
    caption = {TEXT: annotation['caption']} if 'caption' in annotation else {}
    rows.append(Row({**caption, **annotation, NAME: name}, 0))
  return rows


def _dict_rows(file: str, content: dict[str, Any], name: str) -> list[Any]:
  """Reads a JSON object as rows.

  It is {field: [values]}, {field: {index: value}} (pandas), {'data': [objects]} or {name: caption}.
  """
  columns = [key for key in content if same_field(key, name)]
  if len(columns) == 1 and isinstance(content[columns[0]], (list, dict)):
    return _transpose(file, content, columns[0])
  for value in content.values():
    if _is_object_list(value) and _has_field(value[0], name):
      return value
  rows = []
  for key, value in content.items():
    fields = value if isinstance(value, dict) else {TEXT: value}
    rows.append({**fields, name: key})
  return rows


def _transpose(file: str, columns: dict[str, Any], name: str) -> list[dict[str, Any]]:
  """Turns columns, which are lists or {index: value}, into rows; `name` is one of the columns."""
  reference = columns[name]
  indices = reference.keys() if isinstance(reference, dict) else range(len(reference))
  rows = []
  for index in indices:
    fields = {}
    for column, values in columns.items():
      if type(values) is not type(reference) or len(values) != len(reference):
        raise UserError(
          f'{file}: {column!r} has not one value for each {name!r}; '
          'give all fields the same number of values'
        )
      if isinstance(values, dict) and index not in values:
        raise UserError(f'{file}: {column!r} has no value for {index!r}')
      fields[column] = values[index]
    rows.append(fields)
  return rows
