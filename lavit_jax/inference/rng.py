"""Random keys of a seed, so that the result of a row does not depend on its batch.

Each row of a call has a key, made of the seed and the row's index. Each purpose derives keys of its
own from it, one for each image or sample of the row.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.errors import UserError
from lavit_jax.inference.generation_config import Limit, check_value

SEED_LIMIT = Limit(int, f'a whole number in 0..{2**32 - 1}', lambda x: 0 <= x < 2**32)


class Purpose(enum.IntEnum):
  """What a random key is for; the value is folded into the key of the row."""

  PATCHES = 0  # selects the patches of the row's j-th image that become tokens
  TOKENS = 1  # samples the new tokens of the row's j-th sequence
  LATENTS = 2  # the initial noise of the row's j-th image


class IndexedSeed(NamedTuple):
  """A seed for a part of a longer run: row i gets the key of row `rows[i]` of that run."""

  seed: int
  rows: Sequence[int]


Seed: TypeAlias = int | Sequence[int] | IndexedSeed


def example_keys(seed: Seed | None, count: int) -> Array:
  """Makes the key of each row.

  Args:
    seed: one seed for all rows, whose keys then differ by their index; or one for each row, whose
      key then does not depend on its index; or an `IndexedSeed`.
    count: number of rows, B.

  Returns:
    keys[B].

  Raises:
    UserError: a seed is out of range or None, or their number is not `count`.
  """
  if seed is None:
    raise UserError('random sampling needs a seed; give one')
  if isinstance(seed, IndexedSeed):
    return _fold_rows(seed.seed, seed.rows)
  if np.ndim(seed) == 0:
    return _fold_rows(seed, range(count))
  seeds = list(cast(Sequence[int], seed))
  if len(seeds) != count:
    raise UserError(f'{len(seeds)} seeds for {count}; give one for each, or one for all')
  keys = [jax.random.key(check_value('seed', row_seed, SEED_LIMIT)) for row_seed in seeds]
  return jnp.stack(keys) if keys else jax.random.split(jax.random.key(0), 0)


def optional_keys(seed: Seed | None, count: int) -> Array | None:
  """As `example_keys`, but None for the seed None: the most probable patches need no key."""
  return None if seed is None else example_keys(seed, count)


def purpose_keys(purpose: Purpose, keys: Array, numbers: int | np.ndarray = 0) -> Array:
  """Derives the keys of a purpose.

  Args:
    purpose: what the keys are for.
    keys: keys[B] of rows.
    numbers: int or i32[B], which of the row's images or samples each key is for.

  Returns:
    keys[B].
  """
  return _fold_numbers(keys, purpose, np.broadcast_to(np.asarray(numbers, np.int32), keys.shape))


@jax.jit
def _fold_numbers(keys: Array, purpose: int, numbers: np.ndarray) -> Array:
  def fold(key: Array, number: Array | np.ndarray) -> Array:
    return jax.random.fold_in(jax.random.fold_in(key, purpose), number)

  return jax.vmap(fold)(keys, numbers)


@jax.jit
def take_keys(keys: Array, rows: np.ndarray) -> Array:
  """Returns keys[rows], keys[B'], in one program."""
  return keys[rows]


def sample_keys(purpose: Purpose, keys: Array, count: int) -> Array:
  """Derives the keys of the first `count` samples of each row; more samples change no earlier one.

  Args:
    purpose: what the keys are for.
    keys: keys[B] of rows.
    count: number of samples of a row.

  Returns:
    keys[B * count], those of the first row first.
  """
  rows = np.repeat(np.arange(len(keys)), count)
  numbers = np.tile(np.arange(count), len(keys))
  return purpose_keys(purpose, keys[rows], numbers)


def _fold_rows(seed: Any, rows: Sequence[int]) -> Array:
  key = jax.random.key(check_value('seed', seed, SEED_LIMIT))
  return _fold_each(key, np.asarray(rows))


@jax.jit
def _fold_each(key: Array, rows: np.ndarray) -> Array:
  return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
