"""The options of the language model: their names, defaults and limits, checked in one place.

Names and meanings follow `transformers.GenerationConfig`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
from jax import Array

from lavit_jax.errors import UserError

# (height, width) in pixels (specification, Image decoders).
HIGHRES_SIZES = (
  (1024, 1024),
  (896, 1152),
  (832, 1216),
  (768, 1344),
  (1216, 832),
  (1152, 896),
)


class VariantDefaults(NamedTuple):
  """Defaults that depend on how a variant was trained.

  Attributes:
    caption_tokens: (fewest, most) new tokens of a caption.
    answer_tokens: (fewest, most) new tokens of an answer.
    image_tokens: (fewest, most) new tokens of an image.
    output_size: side of the square images that Stable Diffusion 1.5 generates, in pixels.
    highres_sizes: (height, width) of the images that SDXL generates, in pixels.
    bracketed: whether the codes of an image in a prompt stand between [IMG] and [/IMG]; the
      released weights were trained with bare codes.
  """

  caption_tokens: tuple[int, int] = (8, 36)
  answer_tokens: tuple[int, int] = (2, 10)
  image_tokens: tuple[int, int] = (20, 200)
  output_size: int = 512
  highres_sizes: tuple[tuple[int, int], ...] = HIGHRES_SIZES
  bracketed: bool = False


VARIANT_DEFAULTS = {
  'tiny': VariantDefaults(
    caption_tokens=(4, 36),
    answer_tokens=(1, 16),
    image_tokens=(16, 50),
    output_size=64,
    bracketed=True,
  )
}


class SamplingOptions(TypedDict, total=False):
  """The fields of `GenerationConfig` that tasks take which always sample."""

  min_new_tokens: int
  max_new_tokens: int
  temperature: float
  top_k: int | None
  top_p: float | None
  repetition_penalty: float | None
  num_return_sequences: int


class GenerationOptions(SamplingOptions, total=False):
  """The fields of `GenerationConfig` that tasks take which search or sample."""

  num_beams: int
  do_sample: bool
  length_penalty: float
  early_stopping: bool | Literal['never']


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
  """How the language model continues a prompt.

  Attributes:
    min_new_tokens: fewest new tokens, before which no sequence ends.
    max_new_tokens: most new tokens.
    num_beams: beams of the search; 1 is greedy.
    do_sample: sample instead of searching.
    length_penalty: exponent of the length by which the score of a finished beam is divided.
    early_stopping: when the search ends: False, True or 'never' (`beam_search.beam_search`).
    temperature: divides the logits before sampling.
    top_k: sample among so many most probable tokens; None among all.
    top_p: sample among the most probable tokens that together reach this probability; None among
      all.
    repetition_penalty: penalty above 1 for tokens that were generated before; None for none.
    num_return_sequences: sequences for each prompt: the best beams, or samples.
    guidance_scale: classifier-free guidance of sampled codes; None for none.
  """

  min_new_tokens: int
  max_new_tokens: int
  num_beams: int = 1
  do_sample: bool = False
  length_penalty: float = 1.0
  early_stopping: bool | Literal['never'] = False
  temperature: float = 1.0
  top_k: int | None = 50
  top_p: float | None = None
  repetition_penalty: float | None = None
  num_return_sequences: int = 1
  guidance_scale: float | None = None


FIELD_NAMES = tuple(field.name for field in dataclasses.fields(GenerationConfig))
SEARCH_FIELDS = ('num_beams', 'length_penalty', 'early_stopping')
SAMPLING_FIELDS = ('temperature', 'top_k', 'top_p')
# At these values an option has no effect. It is then turned off, so that it costs nothing.
_NEUTRAL_VALUES = {'top_p': 1, 'repetition_penalty': 1, 'guidance_scale': 1}


class Limit(NamedTuple):
  """The values that an option can have.

  Attributes:
    type: int, float, or None for any.
    description: of the values, for error messages.
    accepts: whether a value of that type is allowed.
    optional: whether None is allowed.
  """

  type: type[int] | type[float] | None
  description: str
  accepts: Callable[[Any], bool]
  optional: bool = False


POSITIVE_INTEGER = Limit(int, 'a whole number from 1 up', lambda x: x >= 1)
_LIMITS = {
  'min_new_tokens': Limit(int, 'a whole number from 0 up', lambda x: x >= 0),
  'max_new_tokens': POSITIVE_INTEGER,
  'num_beams': POSITIVE_INTEGER,
  'do_sample': Limit(None, 'True or False', lambda x: isinstance(x, (bool, np.bool_))),
  'length_penalty': Limit(float, 'a number', lambda x: True),
  'early_stopping': Limit(
    None,
    "False, True or 'never'",
    lambda x: isinstance(x, (bool, str)) and x in (False, True, 'never'),
  ),
  'temperature': Limit(float, 'a number above 0', lambda x: x > 0),
  'top_k': POSITIVE_INTEGER._replace(optional=True),
  'top_p': Limit(float, 'a number above 0 and at most 1', lambda x: 0 < x <= 1, optional=True),
  'repetition_penalty': Limit(float, 'a number above 0', lambda x: x > 0, optional=True),
  'num_return_sequences': POSITIVE_INTEGER,
  'guidance_scale': Limit(float, 'a number from 0 up', lambda x: x >= 0, optional=True),
}


def resolve_generation_config(
  defaults: GenerationConfig, options: Mapping[str, Any], max_tokens: int
) -> GenerationConfig:
  """Applies a user's options to the defaults of a task, and checks them.

  Args:
    defaults: of the task. If these sample, the task cannot search. If they have no guidance, it has
      none.
    options: fields of `GenerationConfig` by name.
    max_tokens: most tokens that the task has room for.

  Raises:
    UserError: an unknown name, a value that is not allowed, or an option without effect.
  """
  names = _option_names(defaults)
  check_names(options, names)
  do_sample = bool(
    check_value('do_sample', options.get('do_sample', defaults.do_sample), _LIMITS['do_sample'])
  )
  _check_effect(options, do_sample, can_search=not defaults.do_sample)
  config = dataclasses.replace(defaults, **options)
  values: dict[str, Any] = {}
  for name in FIELD_NAMES:
    value = check_value(name, getattr(config, name), _LIMITS[name])
    values[name] = None if name in _NEUTRAL_VALUES and value == _NEUTRAL_VALUES[name] else value
  if do_sample:
    values['num_beams'] = 1
  config = GenerationConfig(**values)
  _check_counts(config, max_tokens)
  return config


def check_names(names: Collection[str], allowed: Collection[str]) -> None:
  """Raises UserError if a name is not allowed; the message has the nearest name and all of them."""
  unknown = sorted(set(names) - set(allowed))
  if not unknown:
    return
  nearest = difflib.get_close_matches(unknown[0], allowed, 1)
  hint = f'did you mean {nearest[0]}? ' if nearest else ''
  raise UserError(f'no such option: {", ".join(unknown)}; {hint}choose among {", ".join(allowed)}')


def check_value(name: str, value: Any, limit: Limit) -> Any:
  """Checks the value of an option.

  Args:
    name: of the option, for the message.
    value: an array scalar is allowed in place of a number.
    limit: the values that are allowed.

  Returns:
    The value as `limit.type`, so that equal numbers of several types compile one program.

  Raises:
    UserError: the value is not allowed.
  """
  if value is None and limit.optional:
    return None
  item: Any = value
  if isinstance(value, (np.ndarray, Array)) and value.ndim == 0:
    item = value.item()
  if not _has_type(item, limit.type) or not limit.accepts(item):
    optional = ', or None' if limit.optional else ''
    raise UserError(f'{name}={item!r} is not allowed; choose {limit.description}{optional}')
  return limit.type(item) if limit.type else item


def _has_type(value: Any, expected: type | None) -> bool:
  if expected is None:
    return True
  if isinstance(value, bool):
    return False
  if expected is int:
    return isinstance(value, numbers.Integral)
  return isinstance(value, numbers.Real) and math.isfinite(value)


def _option_names(defaults: GenerationConfig) -> list[str]:
  hidden = set()
  if defaults.guidance_scale is None:
    hidden.add('guidance_scale')
  if defaults.do_sample:
    hidden.add('do_sample')
  return [name for name in FIELD_NAMES if name not in hidden]


def _check_effect(options: Mapping[str, Any], do_sample: bool, can_search: bool) -> None:
  """Refuses options that have no effect: those of the search in sampling, or the reverse."""
  if not do_sample:
    for name in SAMPLING_FIELDS:
      if options.get(name) is not None:
        raise UserError(f'{name} has no effect in beam search; set do_sample=True too')
    return
  for name in SEARCH_FIELDS:
    if options.get(name) is not None:
      remedy = 'leave it out, or do_sample' if can_search else 'leave it out'
      raise UserError(f'{name} has no effect in sampling; {remedy}')


def _check_counts(config: GenerationConfig, max_tokens: int) -> None:
  if not config.min_new_tokens <= config.max_new_tokens <= max_tokens:
    raise UserError(
      f'min_new_tokens={config.min_new_tokens} with max_new_tokens={config.max_new_tokens} is not '
      f'allowed; choose min_new_tokens <= max_new_tokens <= {max_tokens}'
    )
  if not config.do_sample and config.num_return_sequences > config.num_beams:
    raise UserError(
      f'num_return_sequences={config.num_return_sequences} of num_beams={config.num_beams} is not '
      'allowed; choose as many beams, or set do_sample=True'
    )
