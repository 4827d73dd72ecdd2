"""Features become codes: a projection to the unit sphere, and the nearest row of the codebook.

Source: specification, Quantizer. Axes: D feature width, K codes, C code width.
"""

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.layers import Dtype
from lavit_jax.sharding import num_shards

TOKEN_BLOCK = 512  # tokens of a shard whose distances are in memory at once
MIN_TOKEN_BLOCK = 64  # where the number of tokens has no larger divisor, they are not split
CODE_BLOCK = 1024  # codes whose distances are in memory at once


def l2_normalize(x: Array) -> Array:
  """Unit vectors along the last axis, f32; a zero vector stays zero, with a finite gradient."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def nearest_code(z: Array, codebook: Array) -> Array:
  """The index of the nearest code by Euclidean distance; the lowest among equals.

  It compares a block of tokens with a block of codes at a time: all distances at once would be the
  largest array of a training step, and a block stays in the cache of a CPU's core. The index of a
  minimum is found by a comparison with it, since XLA's `argmin` takes ten times as long as the
  product of the matrices on a CPU.

  Args:
    z: [..., C].
    codebook: [K, C].

  Returns:
    i32[...] in [0, K), without a gradient.
  """
  chex.assert_shape(codebook, (None, z.shape[-1]))
  codebook = jax.lax.stop_gradient(codebook.astype(jnp.float32))
  code_block = math.gcd(len(codebook), CODE_BLOCK)
  starts = jnp.arange(0, len(codebook), code_block, dtype=jnp.int32)
  blocks = codebook.reshape(-1, code_block, codebook.shape[-1])
  columns = jnp.arange(code_block, dtype=jnp.int32)

  def nearest_of(tokens: Array) -> Array:
    """[S, T, C] -> i32[S, T]."""

    def compare(
      nearest: tuple[Array, Array], inputs: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], None]:
      least_distance, ids = nearest
      start, codes = inputs
      product = jnp.matmul(tokens, codes.T, precision=jax.lax.Precision.HIGHEST)
      # |z|^2 is the same for all codes. The barrier keeps one copy of the distances: a second one
      # might be rounded otherwise, and the minimum not be found in it.
      distance = jax.lax.optimization_barrier(jnp.square(codes).sum(-1) - 2 * product)
      least = distance.min(-1)
      column = jnp.where(distance == least[..., None], columns, code_block).min(-1)
      closer = least < least_distance
      ids = jnp.where(closer, start + column, ids)
      return (jnp.where(closer, least, least_distance), ids), None

    infinite = jnp.full(tokens.shape[:-1], jnp.inf)
    no_ids = jnp.zeros(tokens.shape[:-1], jnp.int32)
    (_, ids), _ = jax.lax.scan(compare, (infinite, no_ids), (starts, blocks))
    return ids

  tokens = _token_blocks(jax.lax.stop_gradient(z.astype(jnp.float32)))
  ids = jax.lax.map(nearest_of, tokens)
  return ids.swapaxes(0, 1).reshape(z.shape[:-1])


def _token_blocks(z: Array) -> Array:
  """Tokens [..., C] in blocks [M, S, T, C], in each of which every shard has T of its own."""
  num_tokens = math.prod(z.shape[:-1])
  shards = num_shards(num_tokens)
  block = math.gcd(num_tokens // shards, TOKEN_BLOCK)
  if block < MIN_TOKEN_BLOCK:
    block = num_tokens // shards
  return z.reshape(shards, -1, block, z.shape[-1]).swapaxes(0, 1)


def unit_rows(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
  """Initializer: directions uniform on the sphere."""
  return l2_normalize(jax.random.normal(key, shape)).astype(dtype)


class Quantizer(nn.Module):
  """Features -> the nearest of K codes of width C on the unit sphere (specification, Quantizer)."""

  hidden_size: int
  codebook_size: int
  code_dim: int
  dtype: Dtype = jnp.float32

  def setup(self):
    """Makes the parameters and submodules."""
    self.fc1 = nn.Dense(self.hidden_size, dtype=self.dtype)
    self.fc2 = nn.Dense(self.code_dim, dtype=self.dtype)
    self.embedding = self.param('embedding', unit_rows, (self.codebook_size, self.code_dim))

  def __call__(self, x: Array) -> tuple[Array, Array]:
    """Features [..., D] -> (ids i32[...], z f32[..., C])."""
    z = self.project(x)
    return self.assign(z), z

  def encode(self, x: Array) -> Array:
    """[..., D] -> dtype[..., C], not yet normalized."""
    return self.fc2(nn.tanh(self.fc1(x)))

  def project(self, x: Array) -> Array:
    """[..., D] -> z f32[..., C] of unit length."""
    return l2_normalize(self.encode(x))

  def assign(self, z: Array, codebook: Array | None = None) -> Array:
    """Nearest code i32[...] of z [..., C], in the module's own codebook or in another f32[K, C]."""
    return nearest_code(z, self.embedding if codebook is None else codebook)

  def lookup(self, ids: Array) -> Array:
    """Code vectors f32[..., C] of ids i32[...] in [0, K)."""
    return self.embedding[ids]
