"""Random keys of a run: one seed, and separate keys for each purpose.

`jax.random.split(key, n)[i]` is `jax.random.fold_in(key, i)`. If one key were split for the weights
and folded with the step, the i-th module would be drawn from the key of step i.
"""

from __future__ import annotations

import enum

import jax
from jax import Array


class Purpose(enum.IntEnum):
  """The purpose of a key of a run."""

  WEIGHTS = 0  # fresh parameters
  STEPS = 1  # the noise of a training step, by its number
  HELDOUT = 2  # the noise of a held-out batch, by its number


def key_for(seed: int, purpose: Purpose) -> Array:
  """The key of a purpose, to be split or folded further."""
  return jax.random.fold_in(jax.random.key(seed), purpose)
