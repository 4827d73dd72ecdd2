"""Rotary positions of the language model: the frequencies, and the scalings by which longer sequences are read.

The scalings are those of transformers' `rope_parameters`, by the same names and the same formulas. Pair i of a head of width d turns by
position * frequency[i]; without a scaling frequency[i] = theta ** (-2i / d).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

REQUIRED = {  # by type: the numbers that a scaling must have
  'linear': ('factor',),
  'dynamic': ('factor',),
  'yarn': ('factor', 'original_max_position_embeddings'),
  'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'),
}
OPTIONAL = {
  'yarn': ('attention_factor', 'beta_fast', 'beta_slow', 'mscale', 'mscale_all_dim', 'truncate')
}
KEYS = {key for keys in (*REQUIRED.values(), *OPTIONAL.values()) for key in keys}


class Rope(NamedTuple):
  """What a module holds of all this; hashable. `scaling`: the pairs of a dict that `check_scaling` returned."""

  theta: float
  scaling: tuple[tuple[str, Any], ...] | None
  max_positions: int

  @property
  def magnitude(self) -> float:
    return magnitude(dict(self.scaling or ()))

  def frequency(self, head_dim: int, positions: Array) -> Array:
    """f32[d / 2], or, of the type dynamic, f32[B, 1, 1, d / 2] for positions i32[B, N]."""
    scaling = dict(self.scaling or ())
    if scaling.get('rope_type') == 'dynamic':
      return dynamic_frequencies(head_dim, self.theta, scaling, self.max_positions, positions)
    return jnp.asarray(frequencies(head_dim, self.theta, scaling))


def check_scaling(value: Any) -> dict | None:
  """A scaling, `{'rope_type': 'linear', 'factor': 4.0}`, reduced to the keys of its type; None for no scaling.

  Raises:
    ValueError: its type is not computed here, or a number is missing or out of its range.
  """
  if value is None or value == {}:
    return None
  if not isinstance(value, Mapping):
    raise ValueError('it must be an object with the key rope_type, or null')
  kind = value.get('rope_type', value.get('type', 'default'))
  if kind == 'default':
    return None
  if kind not in REQUIRED:
    raise ValueError(
      f'the type {kind!r} is not computed here; known: default, {", ".join(REQUIRED)}'
    )
  scaling = {'rope_type': kind}
  for key in REQUIRED[kind]:
    if not _number(value.get(key)) or value[key] <= 0:
      raise ValueError(f'{key} of the type {kind} must be a number above 0, not {value.get(key)!r}')
    scaling[key] = value[key]
  for key in OPTIONAL.get(kind, ()):
    given = value.get(key)
    if key == 'truncate' and key in value:
      given = bool(given)  # null is false, as transformers takes it; the key's absence is true
    if given is None:
      continue
    if not (isinstance(given, bool) if key == 'truncate' else _number(given)):
      raise ValueError(f'{key} of the type {kind} cannot be {given!r}')
    scaling[key] = given
  if kind == 'llama3' and scaling['high_freq_factor'] <= scaling['low_freq_factor']:
    raise ValueError('high_freq_factor must be above low_freq_factor')
  return scaling


def frequencies(head_dim: int, theta: float = 1e4, scaling: Mapping | None = None) -> np.ndarray:
  """f32[d / 2], of any type but dynamic, whose frequencies depend on the length of the sequence (`dynamic_frequencies`)."""
  steps = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
  plain = 1 / theta**steps
  kind = scaling['rope_type'] if scaling else 'default'
  if kind == 'default':
    scaled = plain
  elif kind == 'linear':
    scaled = plain / scaling['factor']
  elif kind == 'llama3':
    scaled = _llama3(plain, scaling)
  elif kind == 'yarn':
    scaled = _yarn(plain, theta, head_dim, scaling)
  else:
    raise ValueError(f'no constant frequencies of the type {kind!r}')
  return scaled.astype(np.float32)


def dynamic_frequencies(
  head_dim: int, theta: float, scaling: Mapping, max_positions: int, positions: Array
) -> Array:
  """Of the type dynamic: the base grows with a row's last position once that lies beyond `max_positions`.

  As transformers has it, keys that are in the cache keep the frequencies with which they were written.

  Args:
    positions: i32[B, N].

  Returns:
    f32[B, 1, 1, d / 2].
  """
  factor = scaling['factor']
  length = jnp.maximum(positions.max(-1) + 1, max_positions).astype(jnp.float32)[
    :, None, None, None
  ]
  base = theta * (factor * length / max_positions - (factor - 1)) ** (head_dim / (head_dim - 2))
  steps = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
  return base**-steps


def magnitude(scaling: Mapping | None) -> float:
  """By what sine and cosine are multiplied: YaRN's attention factor, 1 for the other types."""
  if not scaling or scaling['rope_type'] != 'yarn':
    return 1.0
  if scaling.get('attention_factor') is not None:
    return float(scaling['attention_factor'])

  def mscale(weight: float) -> float:
    return 1.0 if scaling['factor'] <= 1 else 0.1 * weight * math.log(scaling['factor']) + 1.0

  if scaling.get('mscale') and scaling.get('mscale_all_dim'):
    return mscale(scaling['mscale']) / mscale(scaling['mscale_all_dim'])
  return mscale(1.0)


def _llama3(plain: np.ndarray, scaling: Mapping) -> np.ndarray:
  """Long waves are divided by the factor, short ones stay, and between them lies a ramp."""
  original, low, high = (
    scaling[key]
    for key in ('original_max_position_embeddings', 'low_freq_factor', 'high_freq_factor')
  )
  turns = original * plain / (2 * math.pi)  # within the original length
  ramp = np.clip((turns - low) / (high - low), 0, 1)
  return (1 - ramp) * plain / scaling['factor'] + ramp * plain


def _yarn(plain: np.ndarray, theta: float, head_dim: int, scaling: Mapping) -> np.ndarray:
  """Pairs that turn less than `beta_slow` times within the original length are divided by the factor, those that turn more than
  `beta_fast` times stay, and between them lies a ramp over the pairs' numbers.
  """
  original = scaling['original_max_position_embeddings']

  def pair(turns: float) -> float:
    return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

  first, last = pair(scaling.get('beta_fast') or 32), pair(scaling.get('beta_slow') or 1)
  if scaling.get('truncate', True):
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, head_dim - 1)
  width = last - first if last != first else 0.001
  divided = np.clip((np.arange(head_dim // 2) - first) / width, 0, 1)
  return divided * plain / scaling['factor'] + (1 - divided) * plain


def _number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
