"""Configs: Python files with `get_config(argument)`, and `--config.key=value` options."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from ml_collections import ConfigDict, FieldReference

from lavit_jax.errors import UserError
from lavit_jax.local_paths import expand_home

LITERALS = {'true': True, 'false': False, 'none': None}
OPTION_PREFIX = '--config.'
T = TypeVar('T')


def load_config(spec: str, overrides: Iterable[tuple[str, str]] = ()) -> ConfigDict:
  """Reads a config file, applies overrides, and locks the config.

  Args:
    spec: 'path.py' or 'path.py:argument'.
    overrides: (dotted key, text); the text is read in the type of the value that it replaces.

  Raises:
    UserError: there is no such file, it refuses the argument, a key is unknown (the nearest is
      named), or a value has another type.
  """
  path, _, argument = spec.partition(':')
  path = expand_home(path)
  get_config = _load_get_config(path)
  if argument and not inspect.signature(get_config).parameters:
    raise UserError(f'--config: {path} takes no argument; leave out {":" + argument!r}')
  try:
    config = get_config(argument) if argument else get_config()
  except (KeyError, ValueError, TypeError) as error:
    raise UserError(
      f'--config: {path} refuses {argument!r} ({error}); see the first lines of the file'
    ) from error
  for key, text in overrides:
    override(config, key, text)
  config.lock()
  return config


class _Operation(NamedTuple):
  """What a `FieldReference` applies to its value when it is read."""

  fn: Callable[..., Any]
  args: list[Any]


def derived(option: FieldReference, function: Callable[[Any], T]) -> FieldReference:
  """A value that follows another option of a config until it is set itself.

  Args:
    option: the other one, as a reference that the config holds too.
    function: its value -> this value, always of one type.
  """
  value = function(option.get())
  operation = _Operation(lambda _, of_option: function(of_option), [option])
  return FieldReference(value, field_type=type(value), op=operation)


def override(config: ConfigDict, key: str, text: str) -> None:
  """Sets the dotted `key` to `text`, read in the type of the present value.

  Raises:
    UserError: as `load_config`.
  """
  values = dict(config_leaves(config))
  if key not in values:
    raise UserError(f'{OPTION_PREFIX}{key}: no such key; {_suggest(key, values)}')
  *parents, name = key.split('.')
  node: Any = config
  for parent in parents:
    node = node[parent]
  with node.unlocked(), node.ignore_type():
    node[name] = _parse(key, text, values[key], node.get_type(name))


def split_overrides(options: Iterable[str]) -> tuple[list[tuple[str, str]], list[str]]:
  """Splits command-line options.

  Args:
    options: of the command line, `--config.key=text` and `--config.key text` among them.

  Returns:
    ((key, text) of these, the other options).

  Raises:
    UserError: a key has no value.
  """
  pairs = []
  others = []
  options = iter(options)
  for option in options:
    if not option.startswith(OPTION_PREFIX):
      others.append(option)
      continue
    key, equals, text = option.removeprefix(OPTION_PREFIX).partition('=')
    value = text if equals else next(options, None)
    if value is None:
      raise UserError(f'{option}: give it a value, as in {option}=1')
    pairs.append((key, value))
  return pairs, others


def config_leaves(
  config: ConfigDict | Mapping[str, Any], prefix: str = ''
) -> Iterator[tuple[str, Any]]:
  """('optim.learning_rate', 0.1), ... of a config, or of its JSON."""
  for key, value in config.items():
    if isinstance(value, ConfigDict | Mapping):
      yield from config_leaves(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value


def read_options(kind: type[T], values: Mapping[str, Any], section: str = '') -> T:
  """Makes a dataclass of the options that a section of a config names like its fields.

  Args:
    kind: a dataclass; its defaults hold where the config has no such option.
    values: the options of the section.
    section: its name, for messages; '' for the config itself.

  Raises:
    UserError: the config lacks an option that has no default.
  """
  chosen = {}
  for field in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
    if field.name in values:
      chosen[field.name] = values[field.name]
    elif field.default is dataclasses.MISSING:
      name = f'{section}.{field.name}' if section else field.name
      raise UserError(f'the config has no {name}; compare it with the files in configs/')
  return kind(**chosen)


def _suggest(key: str, values: Mapping[str, Any]) -> str:
  """Keys that may have been meant."""
  inside = [name for name in values if name.startswith(f'{key}.')]
  near = inside[:3] or difflib.get_close_matches(key, values, n=1, cutoff=0.4)
  if not near:
    return 'the config file names them all'
  return f'did you mean {" or ".join(OPTION_PREFIX + name for name in near)}?'


def _load_get_config(path: str) -> Callable[..., ConfigDict]:
  if not os.path.isfile(path):
    raise UserError(
      f'--config: there is no file {path}; the config files of the project are configs/*.py'
    )
  spec = importlib.util.spec_from_file_location('lavit_config_file', path)
  try:
    if spec is None or spec.loader is None:
      raise AttributeError('its name does not end in .py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config
  except (SyntaxError, AttributeError) as error:
    raise UserError(
      f'--config: {path} is not a config file, which defines get_config(argument) ({error})'
    ) from error


def _parse(key: str, text: str, old: Any, kind: type) -> Any:
  """`text` as a `kind`; any Python literal or text where the config left the value open (None)."""
  if kind is str:
    return '' if text == 'None' else text
  try:
    value = LITERALS[text.lower()] if text.lower() in LITERALS else ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  if value is None and kind in (tuple, list):
    return kind()
  # options.py checks where None may be.
  if value is None or kind is type(None) or type(value) is kind:
    return value
  if {type(value), kind} == {int, float} and kind(value) == value:
    return kind(value)
  if {type(value), kind} == {tuple, list}:
    return kind(value)
  example = f', such as {old!r}' if old is not None else ''
  raise UserError(f'{OPTION_PREFIX}{key}={text}: give a value of type {kind.__name__}{example}')
