"""Rotary positions of the language model, and the scalings by which it reads longer sequences.

The scalings are those of transformers' `rope_parameters`, with the same names and formulas. Pair i
of a head of width d turns by position * frequency[i]; without a scaling, frequency[i] is
theta ** (-2i / d).

Axes: B rows, N tokens, H heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
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
  """The rotary positions of a module; hashable.

  Attributes:
    theta: base of the frequencies.
    scaling: the items of a dict from `check_scaling`, or None.
    max_positions: length from which the type dynamic scales.
  """

  theta: float
  scaling: tuple[tuple[str, Any], ...] | None
  max_positions: int

  @property
  def magnitude(self) -> float:
    """The factor of the rotated vectors."""
    return magnitude(dict(self.scaling or ()))

  def frequency(self, head_dim: int, positions: Array) -> Array:
    """Frequencies f32[d / 2]; for the type dynamic f32[B, 1, 1, d / 2].

    Args:
      head_dim: d.
      positions: i32[B, N].
    """
    scaling = dict(self.scaling or ())
    if scaling.get('rope_type') == 'dynamic':
      return dynamic_frequencies(head_dim, self.theta, scaling, self.max_positions, positions)
    return jnp.asarray(frequencies(head_dim, self.theta, scaling))


def rotary(x: Array, positions: Array, frequency: Array, magnitude: float = 1.0) -> Array:
  """Rotates pairs (i, i + d/2) by position times frequency[i], in float32.

  This is the half-split layout of Hugging Face's LLaMA, so ported weights need no permutation.

  Args:
    x: [B, N, H, d].
    positions: i32[B, N].
    frequency: f32[d / 2], or f32[B, 1, 1, d / 2].
    magnitude: factor of the result.

  Returns:
    [B, N, H, d] in the dtype of x.
  """
  chex.assert_rank(x, 4)
  chex.assert_rank(positions, 2)
  angle = positions[..., None, None].astype(jnp.float32) * frequency
  sin = jnp.sin(angle) * magnitude
  cos = jnp.cos(angle) * magnitude
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


# --- Scalings ------------------------------------------------------------------------------------


def check_scaling(value: Any) -> dict | None:
  """Checks a scaling, and reduces it to the keys of its type.

  Args:
    value: {'rope_type': 'linear', 'factor': 4.0}, for example; None for no scaling.

  Returns:
    The scaling, or None for none.

  Raises:
    ValueError: its type is not supported, or a number is missing or out of range.
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
      f'the type {kind!r} is not supported; the supported ones are default, {", ".join(REQUIRED)}'
    )
  scaling = {'rope_type': kind}
  for key in REQUIRED[kind]:
    if not _is_number(value.get(key)) or value[key] <= 0:
      raise ValueError(f'{key} of the type {kind} must be a number above 0, not {value.get(key)!r}')
    scaling[key] = value[key]
  for key in OPTIONAL.get(kind, ()):
    option = _check_option(kind, key, value)
    if option is not None:
      scaling[key] = option
  if kind == 'llama3' and scaling['high_freq_factor'] <= scaling['low_freq_factor']:
    raise ValueError('high_freq_factor must be above low_freq_factor')
  return scaling


def _check_option(kind: str, key: str, scaling: Mapping) -> float | bool | None:
  """An optional value of a scaling; None if it is missing."""
  if key == 'truncate':  # null is false, as in transformers; the default is true
    return bool(scaling[key]) if key in scaling else None
  option = scaling.get(key)
  if option is not None and not _is_number(option):
    raise ValueError(f'{key} of the type {kind} cannot be {option!r}')
  return option


def frequencies(head_dim: int, theta: float = 1e4, scaling: Mapping | None = None) -> np.ndarray:
  """Frequencies f32[d / 2] of any type but dynamic (`dynamic_frequencies`).

  Raises:
    ValueError: the type dynamic, whose frequencies depend on the length of the sequence.
  """
  exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
  plain = 1 / theta**exponents
  kind = scaling['rope_type'] if scaling else 'default'
  if scaling is None or kind == 'default':
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
  """Frequencies of the type dynamic: the base grows with the last position of a row.

  It grows once that position lies beyond `max_positions`. As in transformers, keys in the cache
  keep the frequencies with which they were written.

  Args:
    head_dim: d.
    theta: base of the frequencies.
    scaling: from `check_scaling`.
    max_positions: the length up to which nothing is scaled.
    positions: i32[B, N].

  Returns:
    f32[B, 1, 1, d / 2].
  """
  factor = scaling['factor']
  length = jnp.maximum(positions.max(-1) + 1, max_positions).astype(jnp.float32)
  length = length[:, None, None, None]
  base = theta * (factor * length / max_positions - (factor - 1)) ** (head_dim / (head_dim - 2))
  exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
  return base**-exponents


def magnitude(scaling: Mapping | None) -> float:
  """The factor of sine and cosine: YaRN's attention factor, 1 for the other types."""
  if not scaling or scaling['rope_type'] != 'yarn':
    return 1.0
  if scaling.get('attention_factor') is not None:
    return float(scaling['attention_factor'])

  def mscale(weight: float) -> float:
    if scaling['factor'] <= 1:
      return 1.0
    return 0.1 * weight * math.log(scaling['factor']) + 1.0

  if scaling.get('mscale') and scaling.get('mscale_all_dim'):
    return mscale(scaling['mscale']) / mscale(scaling['mscale_all_dim'])
  return mscale(1.0)


def _llama3(plain: np.ndarray, scaling: Mapping) -> np.ndarray:
  """Divides low frequencies by the factor, keeps high ones, with a ramp between them."""
  low = scaling['low_freq_factor']
  high = scaling['high_freq_factor']
  turns = scaling['original_max_position_embeddings'] * plain / (2 * math.pi)
  ramp = np.clip((turns - low) / (high - low), 0, 1)
  return (1 - ramp) * plain / scaling['factor'] + ramp * plain


def _yarn(plain: np.ndarray, theta: float, head_dim: int, scaling: Mapping) -> np.ndarray:
  """Scales by how often a pair turns within the original length.

  Pairs that turn less than `beta_slow` times are divided by the factor, those that turn more than
  `beta_fast` times stay. Between them lies a ramp over the indices of the pairs.
  """
  original = scaling['original_max_position_embeddings']

  def pair_index(turns: float) -> float:
    return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

  first = pair_index(scaling.get('beta_fast') or 32)
  last = pair_index(scaling.get('beta_slow') or 1)
  if scaling.get('truncate', True):
    first = math.floor(first)
    last = math.ceil(last)
  first = max(first, 0)
  last = min(last, head_dim - 1)
  width = last - first if last != first else 0.001
  divided = np.clip((np.arange(head_dim // 2) - first) / width, 0, 1)
  return divided * plain / scaling['factor'] + (1 - divided) * plain


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
