"""Patch features -> discrete visual tokens of dynamic number: select, merge, quantise (paper section 3.1).

Axes: B images, N patches, D feature width, K codes, C code width, H language-model width.
`keep` f32[B, N] is 1 where a patch becomes a token and 0 where it is dropped and merged; all N slots travel with it.
"""

import math
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.layers import (
  CrossAttention,
  Dtype,
  LayerNorm,
  Mlp,
  SelfAttention,
  constrain_batch,
  gelu,
  policy_attention,
  scan_blocks,
)
from lavit_jax.models.row_random import draw_rows

CODE_BLOCK = 2048  # codes whose distances are in memory at once


class TokenizerOutput(NamedTuple):
  """What `DynamicTokenizer` finds in a feature map; rows of `ids` and `codes` count only where `keep` is 1."""

  log_probs: Array  # f32[B, N, 2], class 0 = keep
  keep: Array  # f32[B, N], 0 or 1
  merged: Array  # [B, N, D]
  ids: Array  # i32[B, N]
  codes: Array  # f32[B, N, C], the codebook rows of `ids`


def gumbel(u: Array) -> Array:
  """Standard Gumbel values -log(-log u) of uniform u f32[...] in [0, 1]; finite at both ends."""
  limits = jnp.finfo(jnp.float32)
  return -jnp.log(-jnp.log(jnp.clip(u, limits.tiny, 1 - limits.epsneg)))


def gumbel_keep(
  log_probs: Array,
  *,
  key: Array | None = None,
  noise: Array | None = None,
  temperature: float = 1.0,
) -> Array:
  """Which patches to keep: hard 0/1 forward, soft gradient (specification, Selector).

  With `key` or `noise` this is the published choice, a straight-through Gumbel-softmax over {keep, drop}. With neither it
  is deterministic: the round(sum p) most probable patches, with the gradient of p. A row never keeps nothing: its most
  probable patch stays.

  Args:
    log_probs: [B, N, 2] log-probabilities (or logits), class 0 = keep.
    key: draws the noise; one key, or a key a row [B].
    noise: [B, N, 2] Gumbel noise, instead of a key.
    temperature: of the softmax whose gradient is used; does not change the forward decision.

  Returns:
    f32[B, N].

  Raises:
    ValueError: both key and noise are given.
  """
  if key is not None and noise is not None:
    raise ValueError('gumbel_keep takes a key or the noise, not both')
  logits = log_probs.astype(jnp.float32)
  p = jax.nn.softmax(logits)[..., 0]
  if key is not None:
    noise = gumbel(draw_rows(jax.random.uniform, key, logits.shape))
  if noise is None:
    soft, hard = p, jax.vmap(most_probable)(p)
  else:
    noisy = logits + noise
    soft, hard = jax.nn.softmax(noisy / temperature)[..., 0], noisy[..., 0] >= noisy[..., 1]
  hard = jnp.where(
    hard.any(-1, keepdims=True), hard, jax.nn.one_hot(p.argmax(-1), p.shape[-1], dtype=bool)
  )
  return hard + (
    soft - jax.lax.stop_gradient(soft)
  )  # in this order the forward value is exactly 0 or 1


def most_probable(p: Array) -> Array:
  """Marks the round(sum p) largest of p f32[N], lower index first among equals; bool[N]."""
  rank = jnp.argsort(jnp.argsort(-p, stable=True))
  return rank < jnp.round(p.sum())


class Selector(nn.Module):
  """Log-probabilities f32[B, N, 2] of keeping (class 0) and dropping each patch of x [B, N, D].

  Float32 throughout, the products too, which accelerators would make of bfloat16 pieces: decisions near a tie depend on it.
  """

  hidden_size: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    half = self.hidden_size // 2
    dense = partial(nn.Dense, precision=jax.lax.Precision.HIGHEST)
    x = gelu(dense(self.hidden_size, name='fc_in')(LayerNorm(name='norm')(x)))
    local, context = x[..., :half], x[..., half:].mean(1, keepdims=True)
    x = jnp.concatenate(
      [local, jnp.broadcast_to(context, (*x.shape[:2], context.shape[-1]))], axis=-1
    )
    x = gelu(dense(half, name='fc1')(x))
    x = gelu(dense(self.hidden_size // 4, name='fc2')(x))
    return nn.log_softmax(dense(2, name='fc_out')(x))


class MergerBlock(nn.Module):
  """Causal self-attention among the kept, cross-attention to the dropped, MLP; all pre-norm."""

  num_heads: int
  mlp_dim: int
  all_blocks: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Array, dropped: Array, kept_policy: Array, dropped_policy: Array
  ) -> tuple[Array, Array | None]:
    def norm(name: str) -> LayerNorm:
      return LayerNorm(1e-5, self.dtype, name=name)

    causal = SelfAttention(
      self.num_heads, x.shape[-1] // self.num_heads, dtype=self.dtype, name='self_attn'
    )
    cross = CrossAttention(self.num_heads, self.dtype, name='cross_attn')
    x = constrain_batch(x)
    x = x + causal(norm('norm0')(x), partial(policy_attention, policy=kept_policy))
    x = x + cross(norm('norm1')(x), dropped, partial(policy_attention, policy=dropped_policy))
    x = x + Mlp(self.mlp_dim, self.dtype, name='mlp')(norm('norm2')(x))
    return x, x if self.all_blocks else None


class Merger(nn.Module):
  """Folds what is dropped into what is kept; features [B, N, D] -> dtype[B, N, D], of which only kept rows are meant.

  What attends to what in the self-attention, with patches 0, 2, 3 kept (the cross-attention sees 1 and 4):

        j 0 1 2 3 4
      i 0 x . . . .
        1 x x . . .     j <= i and kept, and always itself
        2 x . x . .
        3 x . x x .
        4 x . x x x
  """

  hidden_size: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  @nn.compact
  def __call__(
    self, x: Array, keep: Array, all_blocks: bool = False
  ) -> Array | tuple[Array, Array, Array]:
    """Merges x under keep f32[B, N], through which gradients reach the selector.

    With `all_blocks`, returns (merged, ln_vision [B, N, D], the stream after each block [L, B, N, D]).
    """
    # Both by rows: left to choose how masks lie on a mesh of data=2, fsdp=2, tensor=2, XLA (jax 0.10.2) gave rows 1 and 2 each other's.
    x, keep = constrain_batch(x.astype(self.dtype)), constrain_batch(keep.astype(jnp.float32))
    keep = keep[:, None, None, :]  # [B, 1, 1, N]: over keys
    tokens = x.shape[1]
    itself = jnp.eye(tokens)
    kept_policy = jnp.tril(jnp.ones((tokens, tokens)), -1) * keep + itself
    vision = LayerNorm(1e-5, self.dtype, name='ln_vision')(x)
    blocks = scan_blocks(MergerBlock, self.num_layers, self.remat)(
      self.num_heads, self.mlp_dim, all_blocks, self.dtype, name='blocks'
    )
    x, streams = blocks(x, vision, kept_policy, 1 - keep)
    x = LayerNorm(1e-5, self.dtype, name='norm')(x)
    return (x, vision, streams) if all_blocks else x


def l2_normalize(x: Array) -> Array:
  """Unit vectors along the last axis, f32; a zero vector stays zero, with a finite gradient."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def nearest_code(z: Array, codebook: Array) -> Array:
  """Index i32[...] of the row of codebook f32[K, C] nearest to z [..., C] by Euclidean distance; the first among equals.

  `CODE_BLOCK` codes at a time: all distances at once would be the largest array of a training step.
  """
  z, codebook = jax.lax.stop_gradient((z.astype(jnp.float32), codebook.astype(jnp.float32)))
  block = math.gcd(len(codebook), CODE_BLOCK)

  def look(nearest, inputs):
    first, codes = inputs
    product = jnp.matmul(z, codes.T, precision=jax.lax.Precision.HIGHEST)
    distance = jnp.square(codes).sum(-1) - 2 * product  # |z|^2 is the same for all
    least = distance.min(-1)
    closer = least < nearest[0]
    return (
      jnp.where(closer, least, nearest[0]),
      jnp.where(closer, first + distance.argmin(-1), nearest[1]),
    ), None

  starts = jnp.arange(0, len(codebook), block, dtype=jnp.int32)
  none = jnp.full(z.shape[:-1], jnp.inf), jnp.zeros(z.shape[:-1], jnp.int32)
  (_, ids), _ = jax.lax.scan(look, none, (starts, codebook.reshape(-1, block, codebook.shape[-1])))
  return ids


def unit_rows(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
  """Initialiser: directions uniform on the sphere."""
  return l2_normalize(jax.random.normal(key, shape)).astype(dtype)


class Quantizer(nn.Module):
  """Features -> codes of width C on the unit sphere, the nearest of K (specification, Quantizer)."""

  hidden_size: int
  codebook_size: int
  code_dim: int
  dtype: Dtype = jnp.float32

  def setup(self):
    self.fc1 = nn.Dense(self.hidden_size, dtype=self.dtype)
    self.fc2 = nn.Dense(self.code_dim, dtype=self.dtype)
    self.embedding = self.param('embedding', unit_rows, (self.codebook_size, self.code_dim))

  def __call__(self, x: Array) -> tuple[Array, Array]:
    """Features [..., D] -> (ids i32[...], z f32[..., C])."""
    z = self.project(x)
    return self.assign(z), z

  def encode(self, x: Array) -> Array:
    """[..., D] -> dtype[..., C], not yet normalised."""
    return self.fc2(nn.tanh(self.fc1(x)))

  def project(self, x: Array) -> Array:
    """[..., D] -> z f32[..., C] of unit length."""
    return l2_normalize(self.encode(x))

  def assign(self, z: Array, codebook: Array | None = None) -> Array:
    """Nearest code i32[...] of z [..., C], in a codebook f32[K, C] that is the module's own by default."""
    return nearest_code(z, self.embedding if codebook is None else codebook)

  def lookup(self, ids: Array) -> Array:
    """Code vectors f32[..., C] of ids i32[...] in [0, K)."""
    return self.embedding[ids]


class DynamicTokenizer(nn.Module):
  """Selector, merger and quantiser: a feature map becomes as many discrete tokens as it needs."""

  hidden_size: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  codebook_size: int
  code_dim: int
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  def setup(self):
    self.selector = Selector(self.hidden_size)
    self.merger = Merger(
      self.hidden_size, self.num_layers, self.num_heads, self.mlp_dim, self.dtype, self.remat
    )
    self.quantizer = Quantizer(self.hidden_size, self.codebook_size, self.code_dim, self.dtype)

  def __call__(self, x: Array, key: Array | None = None) -> TokenizerOutput:
    """Patch features x [B, N, D] (no CLS row) -> tokens; a key (or one a row) samples the choice of patches, none makes it deterministic."""
    log_probs = self.select(x)
    keep = gumbel_keep(log_probs, key=key)
    merged = self.merge(x, keep)
    ids, _ = self.quantize(merged)
    return TokenizerOutput(log_probs, keep, merged, ids, self.lookup(ids))

  def select(self, x: Array) -> Array:
    """[B, N, D] -> log-probabilities f32[B, N, 2]."""
    return self.selector(x)

  def merge(self, x: Array, keep: Array) -> Array:
    """[B, N, D] and keep f32[B, N] -> dtype[B, N, D]."""
    return self.merger(x, keep)

  def quantize(self, merged: Array) -> tuple[Array, Array]:
    """[B, N, D] -> (ids i32[B, N], z f32[B, N, C])."""
    return self.quantizer(merged)

  def lookup(self, ids: Array) -> Array:
    """i32[...] -> code vectors f32[..., C]."""
    return self.quantizer.lookup(ids)


class Understanding(nn.Module):
  """Continuous tokens for the language model: stage 2's own copy of the merger, then a projection (`vit_proj`)."""

  hidden_size: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  llm_dim: int
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  @nn.compact
  def __call__(self, x: Array, keep: Array) -> Array:
    """Patch features [B, N, D] and keep f32[B, N] -> dtype[B, N, H]."""
    merger = Merger(
      self.hidden_size,
      self.num_layers,
      self.num_heads,
      self.mlp_dim,
      self.dtype,
      self.remat,
      name='merger',
    )
    return nn.Dense(self.llm_dim, dtype=self.dtype, name='vit_proj')(merger(x, keep))
