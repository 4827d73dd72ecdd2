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
from lavit_jax.models.noise_schedule import Scheduler


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


def number(value: Any) -> float:
  """A finite number."""
  if not _number(value):
    raise ValueError('it must be a number')
  return float(value)


def within(least: float, most: float) -> Callable[[Any], float]:
  """A number of a range, its ends included."""

  def check(value: Any) -> float:
    if not _number(value) or not least <= value <= most:
      raise ValueError(f'it must be a number in {least:g}..{most:g}')
    return float(value)

  return check


def whole(least: int, most: int) -> Callable[[Any], int]:
  """A whole number of a range, its ends included."""

  def check(value: Any) -> int:
    if not _number(value) or value != int(value) or not least <= value <= most:
      raise ValueError(f'it must be a whole number in {least}..{most}')
    return int(value)

  return check


def switch(value: Any) -> bool:
  """true or false; null, as diffusers takes it, is false."""
  if value is not None and not isinstance(value, bool):
    raise ValueError('it must be true or false')
  return bool(value)


def one_of(*words: str | None) -> Callable[[Any], str | None]:
  """One of some words."""

  def check(value: Any) -> str | None:
    if not any(value is word or (isinstance(word, str) and value == word) for word in words):
      raise ValueError(f'it must be one of {", ".join(json.dumps(word) for word in words)}')
    return value

  return check


def listed(check: Callable[[Any], Any]) -> Callable[[Any], list]:
  """A list, of one entry or more, each of which `check` takes."""

  def check_list(values: Any) -> list:
    if not isinstance(values, list | tuple) or not values:
      raise ValueError('it must be a list')
    return [check(value) for value in values]

  return check_list


def optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
  """null, or what `check` takes."""
  return lambda value: None if value is None else check(value)


UNET = dict(
  num_heads=Field(listed(count), [8, 8, 8, 8]),
  norm_eps=Field(positive, 1e-5),
  flip_sin_to_cos=Field(switch, True),
  freq_shift=Field(number, 0.0),
)
VAE = dict(
  scaling_factor=Field(positive, 0.18215),
  shift_factor=Field(number, 0.0),
  latents_mean=Field(optional(listed(number)), None),
  latents_std=Field(optional(listed(positive)), None),
)
_published = Scheduler()._asdict()


def _option(name: str, check: Callable[[Any], Any], computes: bool = False) -> Field:
  """`computes`: whether the network was trained by it; the others are options of the samplers."""
  return Field(check, _published[name], computes)


SCHEDULER = {
  name: _option(name, *rest)
  for name, *rest in (
    ('prediction_type', one_of('epsilon', 'v_prediction', 'sample'), True),
    ('beta_schedule', one_of('linear', 'scaled_linear', 'squaredcos_cap_v2'), True),
    ('beta_start', within(0, 1), True),
    ('beta_end', within(0, 1), True),
    ('num_train_timesteps', whole(1, 10**6), True),
    ('trained_betas', optional(listed(within(0, 1))), True),
    ('rescale_betas_zero_snr', switch, True),
    ('timestep_spacing', one_of('leading', 'trailing', 'linspace', None)),
    ('steps_offset', whole(0, 999)),
    ('set_alpha_to_one', switch),
    ('clip_sample', switch),
    ('clip_sample_range', positive),
    ('thresholding', switch),
    ('dynamic_thresholding_ratio', within(0, 1)),
    ('sample_max_value', positive),
    ('use_karras_sigmas', switch),
    ('use_exponential_sigmas', switch),
    ('use_beta_sigmas', switch),
    ('use_lu_lambdas', switch),
    ('interpolation_type', one_of('linear', 'log_linear')),
    ('final_sigmas_type', one_of('zero', 'sigma_min')),
    ('lambda_min_clipped', optional(number)),
  )
}

PARTS: dict[str, Part] = {
  'unet': Part('unet', UNET),
  'vae': Part('vae', VAE),
  'scheduler': Part('unet', SCHEDULER),
  'highres_unet': Part('highres_unet', UNET),
  'highres_vae': Part('highres_vae', VAE),
  'highres_scheduler': Part('highres_unet', SCHEDULER),
  'llama': Part(
    'llama',
    dict(
      rope_theta=Field(positive, 1e4),
      rope_scaling=Field(rope.check_scaling, None),
      rms_norm_eps=Field(positive, 1e-5),
      max_position_embeddings=Field(count, 4096, computes=False),
      max_sequence_length=Field(optional(count), None, computes=False),
    ),
  ),
}


def own(row: Mapping) -> dict[str, dict]:
  """The settings of a variant, whole: what its row names, and the defaults."""
  found = {}
  for name, part in PARTS.items():
    if part.owner in row:
      named = row.get(name, {})
      found[name] = {
        field: _thawed(named.get(field, spec.default)) for field, spec in part.fields.items()
      }
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
      raise UserError(
        f'settings of {name!r}: the variant {variant!r} has none of that name; it has {", ".join(known)}'
      )
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
    raise UserError(
      f'settings of {name}: unknown field {field!r};{hint} known: {", ".join(fields)}'
    )
  try:
    return fields[field].check(value)
  except ValueError as error:
    raise UserError(f'settings of {name}: {field}={value!r} is not possible: {error}') from None


def of_parts(settings: Mapping, parts) -> dict[str, dict]:
  """Those settings that go with the weights of these parts of the model."""
  return {name: dict(fields) for name, fields in settings.items() if PARTS[name].owner in parts}


def computes(name: str, field: str, settings: Mapping) -> bool:
  """Whether a field changes numbers that are computed, in a model that has these settings."""
  if (name, field) == ('llama', 'max_position_embeddings'):
    scaling = settings.get('llama', {}).get('rope_scaling') or {}
    return scaling.get('rope_type') == 'dynamic'  # whose base grows beyond that length
  return PARTS[name].fields[field].computes


def differences(first: Mapping, second: Mapping) -> list[tuple[str, str]]:
  """(part, field) of every value that is not the same in both; of settings of one variant."""
  pairs = []
  for name, part in PARTS.items():
    one, other = first.get(name, {}), second.get(name, {})
    pairs += [
      (name, field)
      for field in part.fields
      if (field in one, one.get(field)) != (field in other, other.get(field))
    ]
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


def _thawed(value: Any) -> Any:
  """A value of a row as JSON has it."""
  return list(value) if isinstance(value, tuple) else value


def _number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
