"""Config pages: a Python file with `get_config(argument)`, and `--config.key=value` on the command line."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import os
from collections.abc import Iterable, Iterator

from ml_collections import ConfigDict

from lavit_jax.errors import UserError
from lavit_jax.local_paths import expand_home

WORDS = {'true': True, 'false': False, 'none': None}


def load_config(spec: str, overrides: Iterable[tuple[str, str]] = ()) -> ConfigDict:
  """Reads `path.py[:argument]`, applies `(key, text)` overrides, and locks the config.

  An override takes the type of the value that it replaces.

  Raises:
    UserError: no such page, an argument that the page refuses, an unknown key (the nearest is named), a value of another type.
  """
  path, _, argument = spec.partition(':')
  path = expand_home(path)
  get_config = _read_page(path)
  if argument and not inspect.signature(get_config).parameters:
    raise UserError(f'--config: {path} takes no argument; leave out {":" + argument!r}')
  try:
    config = get_config(argument) if argument else get_config()
  except (KeyError, ValueError, TypeError) as error:
    raise UserError(f'--config: {path} refuses {argument!r} ({error}); see the first lines of the page') from error
  for key, text in overrides:
    override(config, key, text)
  config.lock()
  return config


def override(config: ConfigDict, key: str, text: str) -> None:
  """Sets the dotted `key` to `text`, read in the type of the value that is there. Raises UserError as `load_config`."""
  known = dict(leaves(config))
  if key not in known:
    near = [k for k in known if k.startswith(f'{key}.')][:3] or difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    hint = f'did you mean {" or ".join("--config." + k for k in near)}?' if near else 'the page names them all'
    raise UserError(f'--config.{key}: no such key; {hint}')
  *parents, name = key.split('.')
  node = config
  for parent in parents:
    node = node[parent]
  with node.unlocked(), node.ignore_type():
    node[name] = _parse(key, text, known[key], node.get_type(name))


def split_overrides(options: Iterable[str]) -> tuple[list[tuple[str, str]], list[str]]:
  """Command-line options -> ((key, text) of each `--config.key=text` or `--config.key text`, the other options)."""
  pairs, others, options = [], [], iter(options)
  for option in options:
    if not option.startswith('--config.'):
      others.append(option)
      continue
    key, equals, text = option.removeprefix('--config.').partition('=')
    text = text if equals else next(options, None)
    if text is None:
      raise UserError(f'{option}: give it a value, as in {option}=1')
    pairs.append((key, text))
  return pairs, others


def _read_page(path: str):
  if not os.path.isfile(path):
    raise UserError(f'--config: there is no file {path}; the pages of the project are configs/*.py')
  spec = importlib.util.spec_from_file_location('lavit_config_page', path)
  try:
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    return page.get_config
  except (SyntaxError, AttributeError) as error:
    raise UserError(f'--config: {path} is not a config page, which defines get_config(argument) ({error})') from error


def leaves(config: ConfigDict, prefix: str = '') -> Iterator[tuple[str, object]]:
  """('optim.learning_rate', 0.1), ..."""
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      yield from leaves(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value


def _parse(key: str, text: str, old, kind: type):
  """`text` as a `kind`; where the page left the value open (None), whatever Python literal or word it is."""
  if kind is str:
    return '' if text == 'None' else text
  try:
    value = WORDS[text.lower()] if text.lower() in WORDS else ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  if value is None and kind in (tuple, list):
    return kind()
  if value is None or kind is type(None) or type(value) is kind:  # options.py says where None may be
    return value
  if {type(value), kind} == {int, float} and kind(value) == value:
    return kind(value)
  if {type(value), kind} == {tuple, list}:
    return kind(value)
  example = f', such as {old!r}' if old is not None else ''
  raise UserError(f'--config.{key}={text}: give a value of type {kind.__name__}{example}')
