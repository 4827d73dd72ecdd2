"""Settings of a checkpoint: what changes the computation and is not the variant's own.

The sizes among them are of models that were converted from other systems, which no variant has.

They belong to the checkpoint and travel with it as `{group: {field: value}}` of JSON values. A
checkpoint stores only the values that differ from its variant's own. `GROUPS` lists every field:
how a value is checked, and its default where the variant's config does not name it.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from lavit_jax.errors import UserError
from lavit_jax.models import rope
from lavit_jax.models.clip_vit import CLIP, EVA
from lavit_jax.models.interfaces.variants import LAVIT, OTHERS, SIZE_FIELDS
from lavit_jax.models.llama import Llama
from lavit_jax.models.noise_schedule import Scheduler
from lavit_jax.models.unet import UNet
from lavit_jax.models.vae import AutoencoderKL

Settings = Mapping[str, Mapping[str, Any]]


class Setting(NamedTuple):
  """One field.

  Attributes:
    check: returns the value as it is stored, or raises ValueError with the reason.
    default: the value where the variant's config has none.
    affects_outputs: False for a field that only says how a checkpoint may be used; the network
      computes the same numbers.
  """

  check: Callable[[Any], Any]
  default: Any
  affects_outputs: bool = True


class SettingsGroup(NamedTuple):
  """The fields of one group.

  Attributes:
    module: whose weights they travel with.
    fields: by name.
    in_all_variants: whether a variant has them although its config does not name the module.
  """

  module: str
  fields: dict[str, Setting]
  in_all_variants: bool = False


# --- Checks of single values ---------------------------------------------------------------------


def positive_number(value: Any) -> float:
  """Checks a number above 0."""
  if not _is_number(value) or not value > 0:
    raise ValueError('it must be a number above 0')
  return float(value)


def positive_integer(value: Any) -> int:
  """Checks a whole number of 1 or more."""
  if not _is_number(value) or value < 1 or value != int(value):
    raise ValueError('it must be a whole number of 1 or more')
  return int(value)


def finite_number(value: Any) -> float:
  """Checks a finite number."""
  if not _is_number(value):
    raise ValueError('it must be a number')
  return float(value)


def number_between(minimum: float, maximum: float) -> Callable[[Any], float]:
  """A check for numbers from minimum to maximum, inclusive."""

  def check(value: Any) -> float:
    if not _is_number(value) or not minimum <= value <= maximum:
      raise ValueError(f'it must be a number in {minimum:g}..{maximum:g}')
    return float(value)

  return check


def integer_between(minimum: int, maximum: int) -> Callable[[Any], int]:
  """A check for whole numbers from minimum to maximum, inclusive."""

  def check(value: Any) -> int:
    if not _is_number(value) or value != int(value) or not minimum <= value <= maximum:
      raise ValueError(f'it must be a whole number in {minimum}..{maximum}')
    return int(value)

  return check


def boolean(value: Any) -> bool:
  """Checks true or false; null counts as false, as in diffusers."""
  if value is not None and not isinstance(value, bool):
    raise ValueError('it must be true or false')
  return bool(value)


def one_of(*choices: str | None) -> Callable[[Any], str | None]:
  """A check for one of several strings (or None)."""

  def check(value: Any) -> str | None:
    is_choice = (value is None or isinstance(value, str)) and value in choices
    if not is_choice:
      raise ValueError(f'it must be one of {", ".join(json.dumps(choice) for choice in choices)}')
    return value

  return check


def list_of(check: Callable[[Any], Any]) -> Callable[[Any], list]:
  """A check for a list with at least one entry, each of which passes `check`."""

  def check_list(values: Any) -> list:
    if not isinstance(values, list | tuple) or not values:
      raise ValueError('it must be a list')
    return [check(value) for value in values]

  return check_list


def optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
  """A check for null or a value that passes `check`."""
  return lambda value: None if value is None else check(value)


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --- The fields of every group, with the defaults of the modules ---------------------------------


def _scheduler_fields() -> dict[str, Setting]:
  # The network was trained with the first; the others are options of the samplers.
  of_training = dict(
    prediction_type=one_of('epsilon', 'v_prediction', 'sample'),
    beta_schedule=one_of('linear', 'scaled_linear', 'squaredcos_cap_v2'),
    beta_start=number_between(0, 1),
    beta_end=number_between(0, 1),
    num_train_timesteps=integer_between(1, 10**6),
    trained_betas=optional(list_of(number_between(0, 1))),
    rescale_betas_zero_snr=boolean,
  )
  of_samplers = dict(
    timestep_spacing=one_of('leading', 'trailing', 'linspace', None),
    steps_offset=integer_between(0, 999),
    set_alpha_to_one=boolean,
    clip_sample=boolean,
    clip_sample_range=positive_number,
    thresholding=boolean,
    dynamic_thresholding_ratio=number_between(0, 1),
    sample_max_value=positive_number,
    use_karras_sigmas=boolean,
    use_exponential_sigmas=boolean,
    use_beta_sigmas=boolean,
    use_lu_lambdas=boolean,
    interpolation_type=one_of('linear', 'log_linear'),
    final_sigmas_type=one_of('zero', 'sigma_min'),
    lambda_min_clipped=optional(finite_number),
  )
  defaults = Scheduler()._asdict()
  fields = {name: Setting(check, defaults[name]) for name, check in of_training.items()}
  for name, check in of_samplers.items():
    fields[name] = Setting(check, defaults[name], affects_outputs=False)
  return fields


UNET = dict(
  num_heads=Setting(list_of(positive_integer), list(UNet.num_heads)),
  norm_eps=Setting(positive_number, UNet.norm_eps),
  flip_sin_to_cos=Setting(boolean, UNet.flip_sin_to_cos),
  freq_shift=Setting(finite_number, UNet.freq_shift),
)
VAE = dict(
  scaling_factor=Setting(positive_number, AutoencoderKL.scaling_factor),
  shift_factor=Setting(finite_number, AutoencoderKL.shift_factor),
  latents_mean=Setting(optional(list_of(finite_number)), AutoencoderKL.latents_mean),
  latents_std=Setting(optional(list_of(positive_number)), AutoencoderKL.latents_std),
)
SCHEDULER = _scheduler_fields()
SIZE = Setting(positive_integer, None)  # None: that of the variant
LLAMA = dict(
  rope_theta=Setting(positive_number, Llama.rope_theta),
  rope_scaling=Setting(rope.check_scaling, Llama.rope_scaling),
  rms_norm_eps=Setting(positive_number, Llama.rms_norm_eps),
  max_position_embeddings=Setting(
    positive_integer, Llama.max_position_embeddings, affects_outputs=False
  ),
  max_sequence_length=Setting(
    optional(positive_integer), Llama.max_sequence_length, affects_outputs=False
  ),
  text_vocab_size=SIZE,
  **dict.fromkeys(
    ('hidden_size', 'num_layers', 'num_heads', 'num_kv_heads', 'head_dim', 'mlp_dim'), SIZE
  ),
)
VIT = dict(
  architecture=Setting(one_of(EVA, CLIP), EVA),
  **dict.fromkeys(
    (
      'image_size',
      'patch_size',
      'hidden_size',
      'num_layers',
      'num_heads',
      'head_dim',
      'mlp_dim',
      'output_dim',
    ),
    SIZE,
  ),
)
# How the language model sees images, if it is not LaVIT's way (models/interfaces).
INTERFACE = dict(
  name=Setting(one_of(LAVIT, *OTHERS), LAVIT),
  **dict.fromkeys(SIZE_FIELDS, SIZE),
  cut=Setting(optional(integer_between(0, 99)), None),  # of the image encoder (towers.py)
  final_norm=Setting(optional(boolean), None),
)
# What the U-Net reads: features that are rebuilt from codes, or the vectors of an interface.
CODES = 'codes'
CONDITIONS = (CODES, 'emu')
CONDITION = dict(name=Setting(one_of(*CONDITIONS), CODES))
# How conversations are written for the language model (data/chat.py).
VICUNA = 'vicuna'
LLAVA_V1 = 'llava_v1'
CHAT_TEMPLATES = (LAVIT, VICUNA, LLAVA_V1, 'plain')
CHAT = dict(template=Setting(one_of(*CHAT_TEMPLATES), LAVIT, affects_outputs=False))

GROUPS: dict[str, SettingsGroup] = {
  'vit': SettingsGroup('vit', VIT),
  'unet': SettingsGroup('unet', UNET),
  'vae': SettingsGroup('vae', VAE),
  'scheduler': SettingsGroup('unet', SCHEDULER),
  'highres_unet': SettingsGroup('highres_unet', UNET),
  'highres_vae': SettingsGroup('highres_vae', VAE),
  'highres_scheduler': SettingsGroup('highres_unet', SCHEDULER),
  'llama': SettingsGroup('llama', LLAMA),
  'interface': SettingsGroup('interface', INTERFACE, in_all_variants=True),
  'condition': SettingsGroup('unet', CONDITION),
  'chat': SettingsGroup('llama', CHAT, in_all_variants=True),
}


# --- Settings of a checkpoint --------------------------------------------------------------------


def variant_settings(config: Mapping) -> dict[str, dict]:
  """All settings of a variant: the values in its config (`lavit.variant_config`), else defaults."""
  settings = {}
  for name, group in GROUPS.items():
    if group.module not in config and not group.in_all_variants:
      continue
    configured = config.get(name, {})
    if name == 'llama':
      configured = {'text_vocab_size': config.get('text_vocab_size'), **configured}
    settings[name] = {
      field: _to_json(configured.get(field, setting.default))
      for field, setting in group.fields.items()
    }
  return settings


def validate(variant: str, config: Mapping, settings: Settings | None) -> dict[str, dict]:
  """Checks settings, and returns those that differ from the variant's own.

  Args:
    variant: its name, for messages.
    config: of the variant (`lavit.variant_config`).
    settings: {group: {field: value}} of JSON values.

  Raises:
    UserError: an unknown group or field, one that the variant does not have, or a value out of
      range.
  """
  own = variant_settings(config)
  different = {}
  for name, fields in (settings or {}).items():
    if name not in own:
      raise UserError(
        f'settings of {name!r}: the variant {variant!r} has none of that name; '
        f'it has {", ".join(own)}'
      )
    if not isinstance(fields, Mapping):
      raise UserError(f'settings of {name}: {fields!r} is not an object of fields and values')
    for field, value in fields.items():
      value = validate_field(name, field, value)
      if value != own[name][field]:
        different.setdefault(name, {})[field] = value
  return different


def validate_field(group: str, field: str, value: Any) -> Any:
  """Checks one value, and returns it as it is stored.

  Raises:
    UserError: an unknown field of this group, or a value out of range.
  """
  fields = GROUPS[group].fields
  if field not in fields:
    near = difflib.get_close_matches(field, fields, 1)
    hint = f' did you mean {near[0]!r}?' if near else ''
    raise UserError(
      f'settings of {group}: unknown field {field!r};{hint} known: {", ".join(fields)}'
    )
  try:
    return fields[field].check(value)
  except ValueError as error:
    raise UserError(f'settings of {group}: {field}={value!r} is not possible: {error}') from None


def for_modules(settings: Settings, modules: Collection[str]) -> dict[str, dict]:
  """The settings that travel with the weights of these modules."""
  return {name: dict(fields) for name, fields in settings.items() if GROUPS[name].module in modules}


def affects_outputs(group: str, field: str, settings: Settings) -> bool:
  """Whether a field changes computed numbers in a model that has these settings."""
  if group == 'llama' and field == 'max_position_embeddings':
    scaling = settings.get('llama', {}).get('rope_scaling') or {}
    return scaling.get('rope_type') == 'dynamic'  # beyond that length its base grows
  return GROUPS[group].fields[field].affects_outputs


def differences(first: Settings, second: Settings) -> list[tuple[str, str]]:
  """(group, field) of every value that differs between two settings of one variant."""
  missing = object()
  pairs = []
  for name, group in GROUPS.items():
    first_fields = first.get(name, {})
    second_fields = second.get(name, {})
    for field in group.fields:
      if first_fields.get(field, missing) != second_fields.get(field, missing):
        pairs.append((name, field))
  return pairs


def format_setting(settings: Settings, group: str, field: str, config: Mapping) -> str:
  """'rope_theta=1000000.0': a field and its value, the variant's own if `settings` has none."""
  own = variant_settings(config)[group][field]
  value = settings.get(group, {}).get(field, own)
  return f'{field}={json.dumps(value)}'


def freeze(value: Any) -> Any:
  """A hashable form of a JSON value: lists become tuples, objects sorted tuples of pairs."""
  if isinstance(value, Mapping):
    return tuple((key, freeze(value[key])) for key in sorted(value))
  if isinstance(value, list | tuple):
    return tuple(freeze(item) for item in value)
  return value


def _to_json(value: Any) -> Any:
  """A value of a variant's config in its JSON form."""
  return list(value) if isinstance(value, tuple) else value
