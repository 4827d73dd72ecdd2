"""What a user may ask for: the settings of a model and of the language model's writing, texts and prompts, checked here; and the
random keys of a seed.
"""

from __future__ import annotations

import contextlib
import enum
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.data.images import is_single_image
from lavit_jax.errors import InputError, UserError

# ---------------------------------------------------------------------------------------------------------------- settings


HIGHRES_SIZES = (
  (1024, 1024),
  (896, 1152),
  (832, 1216),
  (768, 1344),
  (1216, 832),
  (1152, 896),
)  # (height, width), specification, Image decoders


class VariantDefaults(NamedTuple):
  """What depends on how a model was trained: (fewest, most) new tokens, the sizes of what it draws, the form of a prompt."""

  caption_tokens: tuple[int, int] = (8, 36)
  answer_tokens: tuple[int, int] = (2, 10)
  image_tokens: tuple[int, int] = (20, 200)
  drawn_size: int = 512  # side of the square
  highres_sizes: tuple[tuple[int, int], ...] = HIGHRES_SIZES  # (height, width)
  bracketed: bool = False  # pictures of a prompt to draw from are [IMG] codes [/IMG]; the released weights are given bare codes


VARIANT_DEFAULTS = {'tiny': VariantDefaults((4, 36), (1, 16), (16, 50), 64, bracketed=True)}


class GenerationConfig(NamedTuple):
  """How the language model continues a prompt: by beam search, or, where `beams` is None, by sampling."""

  min_tokens: int
  max_tokens: int
  beams: int | None = None
  length_penalty: float = 1.0  # of finished beams
  early_stopping: bool | str = False  # of the search: False, True or 'never' (`decode.beam_search`)
  temperature: float = 1.0
  top_k: int | None = 50  # None: all
  top_p: float | None = None  # None: all
  repetition_penalty: float | None = None  # None: none
  num_samples: int = 1  # continuations of each prompt: the best beams, or so many samples
  guidance: float | None = None  # of sampled codes; None: none


SEARCHING, SAMPLING = (
  ('beams', 'length_penalty', 'early_stopping'),
  ('temperature', 'top_k', 'top_p'),
)
_LIMITS = dict(  # what a setting is, which of these it may be, and how to say it
  min_tokens=(int, lambda x: x >= 0, 'a whole number from 0 up'),
  max_tokens=(int, lambda x: x >= 1, 'a whole number from 1 up'),
  beams=(int, lambda x: x >= 1, 'a whole number from 1 up'),
  length_penalty=(float, lambda x: True, 'a number'),
  early_stopping=(None, lambda x: x in (False, True, 'never'), "False, True or 'never'"),
  temperature=(float, lambda x: x > 0, 'a number above 0'),
  top_k=(int, lambda x: x >= 1, 'a whole number from 1 up, or None'),
  top_p=(float, lambda x: 0 < x <= 1, 'a number above 0 and at most 1, or None'),
  repetition_penalty=(float, lambda x: x > 0, 'a number above 0, or None'),
  num_samples=(int, lambda x: x >= 1, 'a whole number from 1 up'),
  guidance=(float, lambda x: x >= 0, 'a number from 0 up, or None'),
)
_OFF = dict(
  top_p=1, repetition_penalty=1, guidance=1
)  # settings that change nothing at this value, and then cost nothing


def resolve_generation_config(
  task: GenerationConfig, asked: Mapping, most: int
) -> GenerationConfig:
  """The settings of a task, changed by those that are asked for. The one place that checks them.

  Args:
    asked: fields of `GenerationConfig` by name; of a task that searches also `sample`: whether to sample instead.
    most: tokens that the task has room for.

  Raises:
    UserError: a name that is none of these, a value that cannot be, or one that would play no part.
  """
  asked = dict(asked)
  searches = task.beams is not None and not asked.pop('sample', False)
  known = [
    name for name in GenerationConfig._fields if name != 'guidance' or task.guidance is not None
  ]
  unknown = asked.keys() - {*known}
  if unknown:
    raise UserError(
      f'no such setting: {", ".join(sorted(unknown))}; choose among {", ".join(known)}'
      + ', sample' * (task.beams is not None)
    )
  for name in SAMPLING if searches else SEARCHING:
    if asked.get(name) is not None:
      raise UserError(
        f'{name} plays no part in '
        + (
          'beam search; ask for sampling too'
          if searches
          else 'sampling; leave it out' + (', or do not sample' if task.beams else '')
        )
      )
  chosen = task._replace(**asked)._asdict() | ({} if searches else dict(beams=None))
  writing = GenerationConfig(
    **{
      name: check_value(name, value, _LIMITS[name])
      for name, value in chosen.items()
      if name != 'beams' or searches
    }
  )
  if not writing.min_tokens <= writing.max_tokens <= most:
    raise UserError(
      f'min_tokens={writing.min_tokens} to max_tokens={writing.max_tokens} cannot be; choose min_tokens and max_tokens in '
      f'order, and at most {most}'
    )
  if searches and writing.num_samples > writing.beams:
    raise UserError(
      f'num_samples={writing.num_samples} of {writing.beams} beams cannot be; choose as many beams, or sample'
    )
  return writing._replace(
    **{name: None for name, off in _OFF.items() if getattr(writing, name) == off}
  )


def check_value(name: str, value, limits: tuple):
  """A value, as the int or float that it is: the types of what compiled programs are given stay the same. Raises UserError.

  `limits`: its type, which of that it may be, and how to say it, with 'None' at the end where that is allowed.
  """
  kind, fits, form = limits
  if value is None and form.endswith('None'):
    return None
  if isinstance(value, (np.ndarray, Array)) and value.ndim == 0:
    value = value.item()
  known = {int: numbers.Integral, float: numbers.Real, None: object}[kind]
  if (
    not isinstance(value, known)
    or kind
    and isinstance(value, bool)
    or kind is float
    and not math.isfinite(value)
    or not fits(value)
  ):
    raise UserError(f'{name}={value!r} cannot be; choose {form}')
  return kind(value) if kind else value


# ------------------------------------------------------------------------------------------------------- texts and prompts


def as_texts(given, name: str) -> list:
  """One text, or several in a sequence, as a list. Raises UserError if it is neither."""
  try:
    return [given] if isinstance(given, str) else list(given)
  except TypeError:
    raise UserError(f'{name}={given!r} cannot be; give a text, or a list of them') from None


def as_prompts(given) -> list[Sequence]:
  """Prompts, each a list of parts; of one that has words and pictures and stands without brackets, a list of it. Raises UserError."""
  parts = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
  words = [isinstance(part, str) for part in parts]
  if any(words) and not all(words) and all(map(is_single_image, parts)):
    return [parts]
  if not all(isinstance(each, Sequence) and not is_single_image(each) for each in parts):
    raise UserError(
      'prompts are lists of parts, [[picture, words], [words], ...]; put each prompt in brackets'
    )
  return parts


def check_prompt_lengths(
  lengths: Sequence[int],
  room: int,
  rows: Sequence[int] | None = None,
  count: int | None = None,
  least: bool = False,
):
  """Prompts' numbers of tokens against what there is room for.

  Args:
    rows: their places among `count`; without, they are all that there are.
    least: a picture is counted as one token, not yet by its own number.

  Raises:
    InputError: one is too long.
  """
  count = count or len(lengths)
  for row, length in zip(range(count) if rows is None else rows, lengths):
    if length > room:
      which = f', {row + 1} of {count},' if count > 1 else ''
      raise InputError(
        f'the prompt{which} is {"at least " * least}{length} tokens long; shorten it to {room}'
      )


@contextlib.contextmanager
def shared_argument(name: str):
  """A text that is at fault inside is a setting, which all rows share: it is no row's fault."""
  try:
    yield
  except InputError as error:
    raise UserError(f'{name}: {error}') from None


# -------------------------------------------------------------------------------------------------------------------- keys


class Purpose(enum.IntEnum):
  """What a random key is for. The same seed and row give each purpose keys of its own."""

  PATCHES = 0  # which patches of the row's j-th picture become tokens
  TOKENS = 1  # what the language model writes, as the row's j-th sample
  LATENTS = 2  # what its j-th picture is drawn from


SEED = (int, lambda x: 0 <= x < 2**32, f'a whole number in 0..{2**32 - 1}')


class IndexedSeed(NamedTuple):
  """A seed for some of many rows: given in place of a seed, row i of the call gets the key that row `rows[i]` has among all of them."""

  seed: int
  rows: Sequence[int]


def example_keys(
  seed: int | Sequence[int] | IndexedSeed | None, count: int, optional: bool = False
) -> Array | None:
  """A key for each row, so that what a row becomes does not depend on its batch; of its own seed, or of one seed and its place.

  Raises UserError: a seed that cannot be, or another number of them; or none, unless that is an `optional` thing to have, which gives None.
  """
  if seed is None:
    if not optional:
      raise UserError('what is sampled needs a seed; give one')
    return None
  if isinstance(seed, IndexedSeed):
    seed, rows = seed
  elif np.ndim(seed) == 0:
    rows = range(count)
  elif len(seed) == count:
    keys = [jax.random.key(check_value('seed', each, SEED)) for each in seed]
    return jnp.stack(keys) if keys else jax.random.split(jax.random.key(0), 0)
  else:
    raise UserError(f'{len(seed)} seeds for {count}; give one for each, or one for all')
  return jax.vmap(jax.random.fold_in, (None, 0))(
    jax.random.key(check_value('seed', seed, SEED)), np.asarray(rows)
  )


def purpose_keys(purpose: Purpose, keys: Array | None, numbers=0) -> Array | None:
  """Rows' keys [B] -> their keys for a purpose, of which a row has several by `numbers`, an int or i32[B]."""
  if keys is None:
    return None
  numbers = np.broadcast_to(np.asarray(numbers, np.int32), keys.shape)
  return jax.vmap(lambda key, number: jax.random.fold_in(jax.random.fold_in(key, purpose), number))(
    keys, numbers
  )


def sample_keys(purpose: Purpose, keys: Array, count: int) -> Array:
  """Rows' keys [B] -> their keys for the first `count` samples, [B * count]: more samples change no earlier one."""
  return purpose_keys(
    purpose, keys[np.repeat(np.arange(len(keys)), count)], np.tile(np.arange(count), len(keys))
  )
