"""How the descriptions in a PyTorch folder (`config.json` and its like) are read.

Equal shapes do not make equal models, so every key of a description has a rule: it is followed (it becomes a setting of the checkpoint,
models/settings.py), checked (it must be what the variant computes), or harmless (it changes nothing that is computed here, for a reason
that the rule names). A key without a rule is an error. A key that is missing means the default of the library's class, and is then followed
or checked in the same way.
"""

from __future__ import annotations

import difflib
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from lavit_jax.errors import UserError
from lavit_jax.models import lavit, settings

PRIVATE = (
  '_'  # keys that begin with it are the library's own notes: '_class_name', '_name_or_path', ...
)


class Followed(NamedTuple):
  """The value becomes the setting `field`. `read`: the library's value -> the setting's; ValueError says why it cannot be."""

  field: str
  default: Any
  read: Callable[[Any], Any] = lambda value: value


class Checked(NamedTuple):
  """The value must be what the model computes. `own`: model -> that value, or a tuple `Any of` several."""

  own: Callable[[lavit.LavitModules], Any]
  default: Any
  remedy: str = 'choose a variant, or a checkpoint, that agrees'


class AnyOf(tuple):
  """What `Checked.own` returns where several values mean the same."""


class Harmless(NamedTuple):
  """The value changes nothing that is computed here."""

  reason: str


Rule = Followed | Checked | Harmless


def constant(*values: Any) -> Callable[[lavit.LavitModules], AnyOf]:
  """What `Checked.own` is where every variant computes the same: any of these."""
  return lambda model: AnyOf(values)


class Family(NamedTuple):
  """The description of one kind of part.

  part: of the model; it lies in the folder of that part (formats.ModuleLocation).
  file: relative to that folder.
  library: the class whose description it is, for messages and for the documentation.
  rules: key -> rule.
  settings: the name under which the settings are kept; None where nothing is followed.
  complete: description -> the same in the newest spelling; ValueError says what is wrong with it.
  check: (the settings, the model): raises ValueError for settings that do not go together, or do not suit the model.
  others: why a key without a rule is harmless; None: such a key is an error.
  """

  part: str
  file: str
  library: str
  rules: Mapping[str, Rule]
  settings: str | None = None
  complete: Callable[[dict], dict] = dict
  check: Callable[[Mapping, lavit.LavitModules], None] = lambda settings, model: None
  others: str | None = None


def read(
  family: Family, description: Mapping, model: lavit.LavitModules, file: pathlib.Path
) -> dict[str, Any]:
  """The settings {field: value} that a description asks for, after all its keys have been checked.

  Args:
    description: the content of the file.
    model: the variant, with its own settings.
    file: where it was read, for messages.

  Raises:
    UserError: a key that is not known, cannot be followed, or is not what the variant computes.
  """
  try:
    description = family.complete(dict(description))
  except ValueError as error:
    raise UserError(f'{file}: {error}') from None
  for key in description:
    known = key in family.rules or key.startswith(PRIVATE)
    if not known and family.others is None:
      near = difflib.get_close_matches(key, family.rules, 1)
      hint = f' (nearest known: {near[0]})' if near else ''
      raise UserError(
        f'{file}: {key}={_short(description[key])} is no key that is known of {family.library}{hint}; '
        'remove it from the file if it changes nothing that the model computes'
      )
  found = {}
  for key, rule in family.rules.items():
    if isinstance(rule, Followed):
      found[rule.field] = _followed(family, rule, key, description.get(key, rule.default), file)
    elif isinstance(rule, Checked):
      _check(family, rule, key, description, model, file)
  try:
    family.check(found, model)
  except ValueError as error:
    raise UserError(f'{file}: {error}') from None
  return found


def _followed(family: Family, rule: Followed, key: str, value: Any, file: pathlib.Path) -> Any:
  try:
    return settings.GROUPS[family.settings].fields[rule.field].check(rule.read(value))
  except ValueError as error:
    raise UserError(f'{file}: {key}={_short(value)} cannot be followed: {error}') from None


def _check(
  family: Family,
  rule: Checked,
  key: str,
  description: Mapping,
  model: lavit.LavitModules,
  file: pathlib.Path,
) -> None:
  value, own = plain(description.get(key, rule.default)), rule.own(model)
  allowed = [plain(each) for each in own] if isinstance(own, AnyOf) else [plain(own)]
  if not any(same(value, each) for each in allowed):
    absent = (
      '' if key in description else f' (the default of {family.library}, for the key is missing)'
    )
    raise UserError(
      f'{file}: {key}={_short(value)}{absent}, but the variant {model.variant!r} computes with {_short(allowed[0])}; {rule.remedy}'
    )


def same(first: Any, second: Any) -> bool:
  """Equal as JSON values: true is not 1, though 1 is 1.0."""
  if isinstance(first, bool) or isinstance(second, bool):
    return first is second
  if isinstance(first, list) and isinstance(second, list):
    return len(first) == len(second) and all(map(same, first, second))
  return first == second


def plain(value: Any) -> Any:
  """As JSON gives it back: tuples are lists."""
  return json.loads(json.dumps(value))


def harmless(reason: str, *keys: str) -> dict[str, Harmless]:
  """The rule for each of some keys."""
  return dict.fromkeys(keys, Harmless(reason))


def read_description(file: pathlib.Path) -> dict | None:
  """A JSON object; None if there is no file. A UserError that names the file if it is damaged."""
  try:
    content = json.loads(file.read_text())
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    raise UserError(f'{file} cannot be read ({error}); download it again') from None
  if not isinstance(content, dict):
    raise UserError(f'{file} is damaged: it holds no JSON object; download it again')
  return content


def table(families: Iterable[Family]) -> list[tuple[str, str, str]]:
  """(key, what becomes of it, the setting or the reason), of all keys of some families: for the documentation and its test."""
  rows = []
  for family in families:
    for key, rule in family.rules.items():
      if isinstance(rule, Followed):
        rows.append((key, 'followed', rule.field))
      elif isinstance(rule, Checked):
        rows.append((key, 'checked', rule.remedy))
      else:
        rows.append((key, 'harmless', rule.reason))
    if family.others is not None:
      rows.append(('any other key', 'harmless', family.others))
  return rows


def _short(value: Any) -> str:
  text = json.dumps(value)
  return text if len(text) <= 80 else f'{text[:77]}...'
