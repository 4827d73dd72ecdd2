"""Settings of a checkpoint: numbers that decide what a model computes and are no shapes of its weights.

They belong to the checkpoint and travel with it, as `{part: {field: value}}` of JSON values; only what differs from the variant's own
is stored. `PARTS` names every field: how a value is checked, and what it is where the variant's row does not name it.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lavit_jax.errors import UserError
from lavit_jax.models import rope


class Field(NamedTuple):
  """`check` returns the value as it is stored, or raises ValueError with what it must be."""

  check: Callable[[Any], Any]
  default: Any
  computes: bool = True  # False: it says how a checkpoint may be used; the same numbers come out


class Part(NamedTuple):
  """`owner`: the part of the model whose weights these settings belong to, and go with."""

  owner: str
  fields: dict[str, Field]


def positive(value: Any) -> float:
  """A number above 0."""
  if not _number(value) or not value > 0:
    raise ValueError('it must be a number above 0')
  return float(value)


def count(value: Any) -> int:
  """A whole number of 1 or more."""
  if not _number(value) or value < 1 or value != int(value):
    raise ValueError('it must be a whole number of 1 or more')
  return int(value)


PARTS: dict[str, Part] = {
    'llama': Part('llama', dict(
        rope_theta=Field(positive, 1e4),
        rope_scaling=Field(rope.check_scaling, None),
        rms_norm_eps=Field(positive, 1e-5),
        max_position_embeddings=Field(count, 4096, computes=False))),
}


def own(row: Mapping) -> dict[str, dict]:
  """The settings of a variant, whole: what its row names, and the defaults."""
  found = {}
  for name, part in PARTS.items():
    if part.owner in row:
      named = row.get(name, {})
      found[name] = {field: named.get(field, spec.default) for field, spec in part.fields.items()}
  return found


def differing(variant: str, row: Mapping, settings: Mapping | None) -> dict[str, dict]:
  """Checked settings, less what is the variant's own.

  Args:
    variant: its name, for messages.
    row: of the variants table.
    settings: {part: {field: value}}, values as JSON has them.
  Raises:
    UserError: a part or a field that is not known or that the variant does not have, or a value that is out of its range.
  """
  known, found = own(row), {}
  for name, fields in (settings or {}).items():
    if name not in known:
      raise UserError(f'settings of {name!r}: the variant {variant!r} has none of that name; it has {", ".join(known)}')
    if not isinstance(fields, Mapping):
      raise UserError(f'settings of {name}: {fields!r} is not an object of fields and values')
    for field, value in fields.items():
      value = checked(name, field, value)
      if value != known[name][field]:
        found.setdefault(name, {})[field] = value
  return found


def checked(name: str, field: str, value: Any) -> Any:
  """The value of a field of the part `name` as it is stored; a UserError if it cannot be."""
  fields = PARTS[name].fields
  if field not in fields:
    near = difflib.get_close_matches(field, fields, 1)
    hint = f' did you mean {near[0]!r}?' if near else ''
    raise UserError(f'settings of {name}: unknown field {field!r};{hint} known: {", ".join(fields)}')
  try:
    return fields[field].check(value)
  except ValueError as error:
    raise UserError(f'settings of {name}: {field}={value!r} is not possible: {error}') from None


def of_parts(settings: Mapping, parts) -> dict[str, dict]:
  """Those settings that go with the weights of these parts of the model."""
  return {name: dict(fields) for name, fields in settings.items() if PARTS[name].owner in parts}


def differences(first: Mapping, second: Mapping) -> list[tuple[str, str]]:
  """(part, field) of every value that is not the same in both; of settings of one variant."""
  pairs = []
  for name, part in PARTS.items():
    one, other = first.get(name, {}), second.get(name, {})
    pairs += [(name, field) for field in part.fields if (field in one, one.get(field)) != (field in other, other.get(field))]
  return pairs


def told(settings: Mapping, name: str, field: str, row: Mapping) -> str:
  """'rope_theta=1000000.0': a field with its value, the variant's own where the settings do not name it."""
  return f'{field}={json.dumps(settings.get(name, {}).get(field, own(row)[name][field]))}'


def frozen(value: Any) -> Any:
  """A JSON value as a module's field, which must be hashable: lists become tuples, objects tuples of pairs in order."""
  if isinstance(value, Mapping):
    return tuple((key, frozen(value[key])) for key in sorted(value))
  if isinstance(value, list | tuple):
    return tuple(map(frozen, value))
  return value


def _number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
