"""The quantizers that codebook.py compares. Axes: T tokens, K codes, C code width.

`ema` and `gradient` choose the nearest of K unit vectors, by moving averages and by the optimizer.
`fsq` and `lfq` have no codebook: they round each coordinate, and a code is a combination of digits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.quantizer import l2_normalize, nearest_code

FSQ_LEVELS = 4
LFQ_ENTROPY_WEIGHT = 0.1
LFQ_COMMITMENT_WEIGHT = 0.25


class Quantized(NamedTuple):
  """Tokens and what they cost.

  Attributes:
    ids: i32[T].
    z: f32[T, C], before quantization.
    codes: f32[T, C], the codes of `ids`.
    loss: f32[], added to that of the reconstruction.
  """

  ids: Array
  z: Array
  codes: Array
  loss: Array


def code_width(kind: str, num_codes: int, width: int) -> int:
  """C: `width` with a codebook, and otherwise the number of digits.

  Raises:
    ValueError: `num_codes` is not a power of the number of levels.
  """
  levels = {'fsq': FSQ_LEVELS, 'lfq': 2}.get(kind)
  if levels is None:
    return width
  digits = round(math.log(num_codes, levels))
  if levels**digits != num_codes:
    raise ValueError(f'{kind} needs a power of {levels} as number of codes, not {num_codes}')
  return digits


def quantize(
  kind: str, encoded: Array, embedding: Array | None, commitment_weight: float | Array
) -> Quantized:
  """Quantizes by one of the methods.

  Args:
    kind: 'ema', 'gradient', 'fsq' or 'lfq'.
    encoded: f32[T, C], the output of the last layer.
    embedding: unit vectors f32[K, C]; None for 'fsq' and 'lfq'.
    commitment_weight: of the squared distance of a token to its code.
  """
  if kind == 'fsq':
    z = jnp.tanh(encoded)
    digits = fsq_digits(z)
    return Quantized(join_digits(digits, FSQ_LEVELS), z, fsq_codes(digits), jnp.zeros([]))
  if kind == 'lfq':
    bits = (encoded > 0).astype(jnp.int32)
    codes = 2.0 * bits - 1
    commitment = jnp.square(encoded - codes).mean()
    loss = LFQ_ENTROPY_WEIGHT * lfq_entropy(encoded) + LFQ_COMMITMENT_WEIGHT * commitment
    return Quantized(join_digits(bits, 2), encoded, codes, loss)
  z = l2_normalize(encoded)
  ids = nearest_code(z, embedding)
  codes = embedding[ids]
  loss = commitment_weight * squared_distance(z, jax.lax.stop_gradient(codes))
  if kind == 'gradient':
    loss += squared_distance(jax.lax.stop_gradient(z), codes)
  return Quantized(ids, z, codes, loss)


def straight_through(z: Array, codes: Array) -> Array:
  """The codes, with the gradient of z."""
  return z + jax.lax.stop_gradient(codes - z)


def squared_distance(x: Array, y: Array) -> Array:
  """Mean over the tokens of |x - y|^2, f32[]."""
  return jnp.square(x - y).sum(-1).mean()


# --- Codes without a codebook --------------------------------------------------------------------


def join_digits(digits: Array, base: int) -> Array:
  """i32[T, C] in [0, base) -> ids i32[T], the first digit the smallest."""
  return (digits * base ** jnp.arange(digits.shape[-1])).sum(-1)


def split_digits(ids: Array, base: int, num_digits: int) -> Array:
  """The inverse of `join_digits`, i32[T, num_digits]."""
  return ids[:, None] // base ** jnp.arange(num_digits) % base


def fsq_digits(z: Array) -> Array:
  """Finite scalar quantization (Mentzer et al., 2023): z f32[T, C] in [-1, 1] -> i32[T, C]."""
  return jnp.round((z + 1) / 2 * (FSQ_LEVELS - 1)).astype(jnp.int32)


def fsq_codes(digits: Array) -> Array:
  """Digits i32[T, C] -> f32[T, C], evenly spaced in [-1, 1]."""
  return digits / (FSQ_LEVELS - 1) * 2 - 1


def lfq_entropy(z: Array) -> Array:
  """The entropy term of lookup-free quantization (Yu et al., 2024, MAGVIT-v2), f32[].

  That of each token's distribution over the codes, which should be low, minus that of their mean,
  which should be high. A token's chance of a code falls with exp(-|z - code|^2), which makes its
  bits independent. So its distribution is an outer product of those of two halves of the bits.

  Args:
    z: f32[T, C].
  """
  half = z.shape[-1] // 2
  log_one = jax.nn.log_sigmoid(4 * z)
  log_zero = jax.nn.log_sigmoid(-4 * z)
  token_entropy = -(jnp.exp(log_one) * log_one + jnp.exp(log_zero) * log_zero).sum(-1).mean()

  def chances(part):
    width = log_one[:, part].shape[-1]
    bits = split_digits(jnp.arange(2**width), 2, width).astype(jnp.float32)
    return jnp.exp(log_one[:, part] @ bits.T + log_zero[:, part] @ (1 - bits).T)

  mean = chances(slice(None, half)).T @ chances(slice(half, None)) / len(z)
  mean_entropy = -(mean * jnp.log(jnp.maximum(mean, 1e-12))).sum()
  return token_entropy - mean_entropy
