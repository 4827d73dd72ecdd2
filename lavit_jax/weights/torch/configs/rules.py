"""Rules for the config files of a PyTorch folder (`config.json` and similar ones).

Models of equal shapes can compute differently, so every key of a config file has a rule. It is

  - followed: it becomes a setting of the checkpoint (models/settings.py);
  - checked: it must be what the variant computes; or
  - harmless: it changes nothing that is computed here, for the reason that the rule gives.

A key without a rule is an error. A missing key stands for the default of the library's class, which
is then followed or checked in the same way.
"""

from __future__ import annotations

import difflib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lavit_jax.errors import UserError
from lavit_jax.models import settings
from lavit_jax.models.lavit import LavitModules

PRIVATE_PREFIX = '_'  # of the library's own notes: '_class_name', '_name_or_path', ...
MAX_VALUE_LENGTH = 80  # of a value in a message


class Followed(NamedTuple):
  """The value becomes a setting.

  Attributes:
    field: the name of the setting.
    default: the value of a missing key.
    convert: from the library's value to the setting's; ValueError gives the reason if it cannot.
  """

  field: str
  default: Any
  convert: Callable[[Any], Any] = lambda value: value


class Checked(NamedTuple):
  """The value must be what the model computes.

  Attributes:
    expected: model -> that value, or `AnyOf` several.
    default: the value of a missing key.
    remedy: what to do about another value.
  """

  expected: Callable[[LavitModules], Any]
  default: Any
  remedy: str = 'choose a variant, or a checkpoint, that agrees'


class AnyOf(tuple):
  """Several values that are all expected."""


class Harmless(NamedTuple):
  """The value changes nothing that is computed here."""

  reason: str


Rule = Followed | Checked | Harmless


def constant(*values: Any) -> Callable[[LavitModules], AnyOf]:
  """For `Checked.expected`: any of these values, whatever the variant."""
  return lambda model: AnyOf(values)


def harmless(reason: str, *keys: str) -> dict[str, Harmless]:
  """The same rule for several keys."""
  return dict.fromkeys(keys, Harmless(reason))


class ConfigFile(NamedTuple):
  """A config file of one module, and its rules.

  Attributes:
    module: the name of the module.
    file: its path relative to the folder of the module (formats.ModuleLocation).
    library: the class whose config it is, for messages.
    rules: key -> rule.
    settings_group: of the settings that are followed; None if none are.
    complete: config -> the same in the newest spelling; ValueError gives the reason if it cannot.
    check: (settings, model) -> None; raises ValueError for settings that contradict each other or
      do not suit the model.
    other_keys: why a key without a rule is harmless; None if it is an error.
  """

  module: str
  file: str
  library: str
  rules: Mapping[str, Rule]
  settings_group: str | None = None
  complete: Callable[[dict[str, Any]], dict[str, Any]] = dict
  check: Callable[[Mapping[str, Any], LavitModules], None] = lambda settings, model: None
  other_keys: str | None = None


def read_json_object(file: pathlib.Path) -> dict[str, Any]:
  """Reads a config file.

  Raises:
    UserError: it is damaged; the message names it.
  """
  try:
    content = json.loads(file.read_text())
  except (OSError, ValueError) as error:
    raise UserError(f'{file} cannot be read ({error}); download it again') from None
  if not isinstance(content, dict):
    raise UserError(f'{file} is damaged: it holds no JSON object; download it again')
  return content


def apply_rules(
  config_file: ConfigFile, config: Mapping[str, Any], model: LavitModules, file: pathlib.Path
) -> dict[str, Any]:
  """Checks all keys of a config.

  Args:
    config_file: the rules.
    config: the content of the file.
    model: the variant, with its own settings.
    file: for messages.

  Returns:
    {field: value} of the settings that are followed.

  Raises:
    UserError: a key is unknown, cannot be followed, or is not what the variant computes.
  """
  try:
    config = config_file.complete(dict(config))
  except ValueError as error:
    raise UserError(f'{file}: {error}') from None
  if config_file.other_keys is None:
    _check_known(config_file, config, file)
  followed = {}
  for key, rule in config_file.rules.items():
    if isinstance(rule, Followed):
      value = config.get(key, rule.default)
      followed[rule.field] = _follow(config_file, rule, key, value, file)
    elif isinstance(rule, Checked):
      _check(config_file, rule, key, config, model, file)
  try:
    config_file.check(followed, model)
  except ValueError as error:
    raise UserError(f'{file}: {error}') from None
  return followed


def _check_known(config_file: ConfigFile, config: Mapping[str, Any], file: pathlib.Path) -> None:
  """Raises UserError for a key without a rule."""
  for key, value in config.items():
    if key in config_file.rules or key.startswith(PRIVATE_PREFIX):
      continue
    nearest = difflib.get_close_matches(key, config_file.rules, 1)
    hint = f' (nearest known: {nearest[0]})' if nearest else ''
    raise UserError(
      f'{file}: {key}={_abbreviate(value)} is not a known key of {config_file.library}{hint}; '
      'remove it from the file if it changes nothing that the model computes'
    )


def _follow(
  config_file: ConfigFile, rule: Followed, key: str, value: Any, file: pathlib.Path
) -> Any:
  """The value of a setting, checked."""
  assert config_file.settings_group is not None
  fields = settings.GROUPS[config_file.settings_group].fields
  try:
    return fields[rule.field].check(rule.convert(value))
  except ValueError as error:
    raise UserError(f'{file}: {key}={_abbreviate(value)} cannot be followed: {error}') from None


def _check(
  config_file: ConfigFile,
  rule: Checked,
  key: str,
  config: Mapping[str, Any],
  model: LavitModules,
  file: pathlib.Path,
) -> None:
  """Raises UserError for a value that is not what the model computes."""
  value = to_json_value(config.get(key, rule.default))
  expected = rule.expected(model)
  if not isinstance(expected, AnyOf):
    expected = AnyOf((expected,))
  allowed = [to_json_value(choice) for choice in expected]
  if any(json_equal(value, choice) for choice in allowed):
    return
  origin = ''
  if key not in config:
    origin = f' (the default of {config_file.library}, for the key is missing)'
  raise UserError(
    f'{file}: {key}={_abbreviate(value)}{origin}, but the variant {model.variant!r} '
    f'computes with {_abbreviate(allowed[0])}; {rule.remedy}'
  )


def json_equal(first: Any, second: Any) -> bool:
  """Whether JSON values are equal: 1 equals 1.0, but not true."""
  if isinstance(first, bool) or isinstance(second, bool):
    return first is second
  if isinstance(first, list) and isinstance(second, list):
    return len(first) == len(second) and all(map(json_equal, first, second))
  return first == second


def to_json_value(value: Any) -> Any:
  """The value that JSON reads back: tuples become lists."""
  return json.loads(json.dumps(value))


def _abbreviate(value: Any) -> str:
  text = json.dumps(value)
  if len(text) <= MAX_VALUE_LENGTH:
    return text
  return f'{text[: MAX_VALUE_LENGTH - 3]}...'
