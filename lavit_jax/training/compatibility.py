"""Whether a run can continue from a checkpoint: differences of config, settings and arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath

from lavit_jax.errors import UserError
from lavit_jax.models.interfaces.variants import LAVIT
from lavit_jax.models.lavit import variant_config
from lavit_jax.models.settings import CODES, affects_outputs, differences, format_setting
from lavit_jax.training.config import config_leaves

Settings = dict[str, dict[str, Any]]
# A run sees other examples than it would have seen, when an option of these changes ...
INEXACT = ('data.', 'batch_size', 'seed')
# ... but for these; `PositionHandler` checks the shards.
HARMLESS = ('data.num_threads', 'data.max_skipped', 'data.heldout', 'data.shards')
# Settings that the config chooses: its option, and the default.
CHOSEN = {
  'interface': ('interface', LAVIT),
  'condition': ('detokenizer.condition', CODES),
  'chat': ('data.chat_template', LAVIT),
}
MAX_VALUE = 60  # characters of an option's value in a message
MAX_NAMES = 3  # names of arrays in a message


def config_changes(
  before: Mapping[str, Any], now: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
  """The options that differ between two configs.

  Returns:
    Two lists of 'key was -> is': the harmless ones, and those that change the next examples.
  """
  old = dict(config_leaves(before))
  new = dict(config_leaves(now))
  harmless = []
  inexact = []
  for key in {**old, **new}:
    if old.get(key) == new.get(key):
      continue
    line = f'{key} {_shorten(old.get(key))} -> {_shorten(new.get(key))}'
    if key.startswith(INEXACT) and key not in HARMLESS:
      inexact.append(line)
    else:
      harmless.append(line)
  return harmless, inexact


def check_identity(
  path: epath.Path, metadata: Mapping[str, Any], identity: Mapping[str, Any]
) -> None:
  """Raises UserError if a checkpoint is of another stage, variant, or sizes of the variant.

  Args:
    path: of the checkpoint.
    metadata: of the checkpoint.
    identity: 'stage', 'variant' and 'sizes' of the run.
  """
  if all(metadata[key] == value for key, value in identity.items()):
    return
  before = f'{metadata["stage"]}:{metadata["variant"]}'
  now = f'{identity["stage"]}:{identity["variant"]}'
  if before != now:
    difference = f'{before}, and this run is {now}'
  else:
    difference = f'{before} with other sizes than the variants table has now'
  raise UserError(f'{path} is a checkpoint of {difference}; choose another --workdir')


def check_settings(path: epath.Path, metadata: Mapping[str, Any], settings: Settings) -> None:
  """Raises UserError where a checkpoint was trained with other settings than the run has.

  Earlier versions saved none, and trained with the variant's own.
  """
  before = metadata.get('settings', {})
  config = variant_config(metadata['variant'])
  for name, field in differences(before, settings):
    if name in CHOSEN:
      option, default = CHOSEN[name]
      was, now = (values.get(name, {}).get(field, default) for values in (before, settings))
      raise UserError(
        f'{path} was trained with {option}={was!r}, and the config has {option}={now!r}; give '
        f'--config.{option}={was}, or choose another --workdir'
      )
    if affects_outputs(name, field, settings) or 'settings' in metadata:
      raise UserError(
        f'{path} was trained with {format_setting(before, name, field, config)} of {name}, and the '
        f'folders of this run have {format_setting(settings, name, field, config)}; name the '
        'folders that it began with, or choose another --workdir'
      )


def check_scale(path: epath.Path, metadata: Mapping[str, Any], config: Mapping[str, Any]) -> None:
  """Raises UserError where the adapters of a checkpoint would have another effect than they had.

  Args:
    path: of the checkpoint.
    metadata: of the checkpoint.
    config: of the run.
  """
  before, now = (each.get('lora', {}) for each in (metadata['config'], config))
  for key in ('alpha', 'rslora'):
    if now.get('rank') and before.get(key, now[key]) != now[key]:
      raise UserError(
        f'{path} was trained with lora.{key}={before[key]}, and the config has {now[key]}, with '
        f'which its adapters have another effect; give --config.lora.{key}={before[key]}, or '
        'choose another --workdir'
      )


def check_names(path: epath.Path, saved: set[str], expected: set[str]) -> None:
  """Raises UserError if a checkpoint has other arrays ('path [shape]') than the train state."""
  differing = sorted(saved ^ expected)
  if differing:
    raise UserError(
      f'the checkpoint {path} does not fit this config ({len(differing)} arrays differ: '
      f'{", ".join(differing[:MAX_NAMES])}); give the options that it was made with, or choose '
      'another --workdir'
    )


def types_error(
  path: epath.Path,
  saved: Mapping[str, str],
  expected: Mapping[str, str],
  config_before: Mapping[str, Any],
  config_now: Mapping[str, Any],
) -> UserError:
  """The error for a checkpoint whose arrays have other types than the train state.

  Args:
    path: of the checkpoint.
    saved: {'path [shape]': type} of its arrays.
    expected: the same of the train state.
    config_before: with which the checkpoint was saved.
    config_now: of the run.
  """
  differing = []
  for name, dtype in expected.items():
    if saved.get(name, dtype) != dtype:
      differing.append(f'{name} {saved[name]}, not {dtype}')
  before = dict(config_leaves(config_before))
  now = dict(config_leaves(config_now))
  remedy = []
  for key, value in before.items():
    if key.endswith('dtype') and key in now and value != now[key]:
      remedy.append(f'--config.{key}={value}')
  options = ' '.join(remedy) or 'the options'
  return UserError(
    f'the checkpoint {path} has other types than this config ({len(differing)} arrays differ: '
    f'{", ".join(differing[:MAX_NAMES])}); give {options}, as it was made with, or choose another '
    '--workdir'
  )


def _shorten(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= MAX_VALUE else f'{text[: MAX_VALUE - 3]}...'
