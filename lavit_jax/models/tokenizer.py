"""Patch features -> discrete visual tokens of dynamic number: select, merge, quantize.

Source: paper, section 3.1. `keep` f32[B, N] is 1 where a patch becomes a token, and 0 where it is
dropped and merged; all N slots stay in the arrays.

Axes: B images, N patches, D feature width, K codes, C code width, H language-model width, L layers.
"""

import math
from functools import partial
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.attention import CrossAttention, SelfAttention, policy_attention
from lavit_jax.models.layers import Dtype, LayerNorm, Mlp, gelu
from lavit_jax.models.remat import scan_blocks
from lavit_jax.models.row_random import draw_rows
from lavit_jax.sharding import constrain_batch

CODE_BLOCK = 2048  # codes whose distances are in memory at once


class TokenizerOutput(NamedTuple):
  """The tokens of a feature map; slots of `ids` and `codes` count only where `keep` is 1.

  Attributes:
    log_probs: f32[B, N, 2]; class 0 is keep.
    keep: f32[B, N]; 0 or 1.
    merged: [B, N, D].
    ids: i32[B, N].
    codes: f32[B, N, C]; the codebook rows of `ids`.
  """

  log_probs: Array
  keep: Array
  merged: Array
  ids: Array
  codes: Array


# --- Selector ------------------------------------------------------------------------------------


class Selector(nn.Module):
  """Log-probabilities of keeping (class 0) and dropping each patch.

  It runs in float32 throughout, also its products, which accelerators would compute from bfloat16
  pieces: decisions near a tie depend on it.
  """

  hidden_size: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Input x [B, N, D] -> f32[B, N, 2]."""
    half = self.hidden_size // 2
    dense = partial(nn.Dense, precision=jax.lax.Precision.HIGHEST)
    x = gelu(dense(self.hidden_size, name='fc_in')(LayerNorm(name='norm')(x)))
    local = x[..., :half]
    context = x[..., half:].mean(1, keepdims=True)
    context = jnp.broadcast_to(context, (*x.shape[:2], context.shape[-1]))
    x = jnp.concatenate([local, context], axis=-1)
    x = gelu(dense(half, name='fc1')(x))
    x = gelu(dense(self.hidden_size // 4, name='fc2')(x))
    return nn.log_softmax(dense(2, name='fc_out')(x))


def gumbel_keep(
  log_probs: Array,
  *,
  key: Array | None = None,
  noise: Array | None = None,
  temperature: float = 1.0,
) -> Array:
  """The patches to keep: hard 0/1 forward, soft gradient (specification, Selector).

  With `key` or `noise` it samples as published, by a straight-through Gumbel-softmax over
  {keep, drop}. With neither it is deterministic: it keeps the round(sum p) most probable patches,
  with the gradient of p. Every row keeps at least its most probable patch.

  Args:
    log_probs: [B, N, 2], log-probabilities or logits; class 0 is keep.
    key: draws the noise; one key, or keys [B], one for each row.
    noise: [B, N, 2], Gumbel noise in place of a key.
    temperature: of the softmax whose gradient is used; the forward decision does not depend on it.

  Returns:
    f32[B, N].

  Raises:
    ValueError: key and noise together.
  """
  if key is not None and noise is not None:
    raise ValueError('gumbel_keep takes a key or the noise, not both')
  chex.assert_shape(log_probs, (None, None, 2))
  logits = log_probs.astype(jnp.float32)
  p = jax.nn.softmax(logits)[..., 0]
  if key is not None:
    noise = gumbel(draw_rows(jax.random.uniform, key, logits.shape))
  if noise is None:
    soft = p
    hard = jax.vmap(most_probable)(p)
  else:
    chex.assert_equal_shape([logits, noise])
    noisy = logits + noise
    soft = jax.nn.softmax(noisy / temperature)[..., 0]
    hard = noisy[..., 0] >= noisy[..., 1]
  fallback = jax.nn.one_hot(p.argmax(-1), p.shape[-1], dtype=bool)
  hard = jnp.where(hard.any(-1, keepdims=True), hard, fallback)
  # In this order of operations the forward value is exactly 0 or 1.
  return hard + (soft - jax.lax.stop_gradient(soft))


def gumbel(u: Array) -> Array:
  """Standard Gumbel values -log(-log u) of uniform u f32[...] in [0, 1]; finite at both ends."""
  limits = jnp.finfo(jnp.float32)
  return -jnp.log(-jnp.log(jnp.clip(u, limits.tiny, 1 - limits.epsneg)))


def most_probable(p: Array) -> Array:
  """Marks the round(sum p) largest of p f32[N], lower index first among equals; bool[N]."""
  rank = jnp.argsort(jnp.argsort(-p, stable=True))
  return rank < jnp.round(p.sum())


# --- Merger --------------------------------------------------------------------------------------


class MergerBlock(nn.Module):
  """Causal self-attention among kept patches, cross-attention to dropped ones, MLP; pre-norm.

  It sows its output as the intermediate 'stream' [B, N, D].
  """

  num_heads: int
  mlp_dim: int
  dtype: Dtype = jnp.float32
  counterfactual: bool = False

  @nn.compact
  def __call__(
    self, x: Array, dropped: Array, kept_policy: Array, dropped_policy: Array
  ) -> tuple[Array, None]:
    """Input x and dropped [B, N, D], policies over [B, H, N, N] -> ([B, N, D], None)."""

    def norm(name: str) -> LayerNorm:
      return LayerNorm(1e-5, self.dtype, name=name)

    head_dim = x.shape[-1] // self.num_heads
    causal = SelfAttention(self.num_heads, head_dim, dtype=self.dtype, name='self_attn')
    cross = CrossAttention(self.num_heads, self.dtype, name='cross_attn')
    attend = partial(policy_attention, counterfactual=self.counterfactual)
    x = constrain_batch(x)
    x = x + causal(norm('norm0')(x), partial(attend, policy=kept_policy))
    x = x + cross(norm('norm1')(x), dropped, partial(attend, policy=dropped_policy))
    x = x + Mlp(self.mlp_dim, self.dtype, name='mlp')(norm('norm2')(x))
    self.sow('intermediates', 'stream', x)
    return x, None


class Merger(nn.Module):
  """Merges the dropped patches into the kept ones (specification, Merger).

  The policy of the self-attention with patches 0, 2, 3 kept (the cross-attention sees 1 and 4):

        j 0 1 2 3 4
      i 0 x . . . .
        1 x x . . .     j <= i and kept, and always itself
        2 x . x . .
        3 x . x x .
        4 x . x x x

  Attributes:
    hidden_size: D.
    num_layers: number of blocks.
    num_heads: of every attention.
    mlp_dim: hidden width of the MLPs.
    dtype: of the computation.
    remat: policy of the blocks ('none' or a key of `remat.REMAT_POLICIES`).
    counterfactual: see `policy_attention`; it changes gradients by the policy alone.
  """

  hidden_size: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  dtype: Dtype = jnp.float32
  remat: str = 'none'
  counterfactual: bool = False

  @nn.compact
  def __call__(self, x: Array, keep: Array) -> Array:
    """Merges under a policy through which gradients reach the selector.

    Args:
      x: patch features [B, N, D].
      keep: f32[B, N], 0 or 1.

    Returns:
      dtype[B, N, D]; only the kept slots have a meaning. The normalized input is sown as the
      intermediate 'vision' [B, N, D].
    """
    chex.assert_shape(x, (None, None, self.hidden_size))
    chex.assert_shape(keep, x.shape[:2])
    # Both are split by rows: left to choose how masks lie on a mesh of data=2, fsdp=2, tensor=2,
    # XLA (jax 0.10.2) exchanged rows 1 and 2.
    x = constrain_batch(x.astype(self.dtype))
    keep = constrain_batch(keep.astype(jnp.float32))
    keep = keep[:, None, None, :]  # [B, 1, 1, N]: over keys
    tokens = x.shape[1]
    kept_policy = jnp.tril(jnp.ones((tokens, tokens)), -1) * keep + jnp.eye(tokens)
    dropped_policy = 1 - keep
    vision = LayerNorm(1e-5, self.dtype, name='ln_vision')(x)
    self.sow('intermediates', 'vision', vision)
    make_blocks = scan_blocks(MergerBlock, self.num_layers, self.remat)
    blocks = make_blocks(
      self.num_heads, self.mlp_dim, self.dtype, self.counterfactual, name='blocks'
    )
    x, _ = blocks(x, vision, kept_policy, dropped_policy)
    return LayerNorm(1e-5, self.dtype, name='norm')(x)


# --- Quantizer -----------------------------------------------------------------------------------


def l2_normalize(x: Array) -> Array:
  """Unit vectors along the last axis, f32; a zero vector stays zero, with a finite gradient."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def nearest_code(z: Array, codebook: Array) -> Array:
  """The index of the nearest code by Euclidean distance; the first among equals.

  It compares `CODE_BLOCK` codes at a time: all distances at once would be the largest array of a
  training step.

  Args:
    z: [..., C].
    codebook: [K, C].

  Returns:
    i32[...] in [0, K), without a gradient.
  """
  chex.assert_shape(codebook, (None, z.shape[-1]))
  z = jax.lax.stop_gradient(z.astype(jnp.float32))
  codebook = jax.lax.stop_gradient(codebook.astype(jnp.float32))
  block = math.gcd(len(codebook), CODE_BLOCK)

  def compare(
    nearest: tuple[Array, Array], inputs: tuple[Array, Array]
  ) -> tuple[tuple[Array, Array], None]:
    least_distance, ids = nearest
    first, codes = inputs
    product = jnp.matmul(z, codes.T, precision=jax.lax.Precision.HIGHEST)
    distance = jnp.square(codes).sum(-1) - 2 * product  # |z|^2 is the same for all codes
    least = distance.min(-1)
    closer = least < least_distance
    ids = jnp.where(closer, first + distance.argmin(-1), ids)
    return (jnp.where(closer, least, least_distance), ids), None

  starts = jnp.arange(0, len(codebook), block, dtype=jnp.int32)
  blocks = codebook.reshape(-1, block, codebook.shape[-1])
  infinite = jnp.full(z.shape[:-1], jnp.inf)
  no_ids = jnp.zeros(z.shape[:-1], jnp.int32)
  (_, ids), _ = jax.lax.scan(compare, (infinite, no_ids), (starts, blocks))
  return ids


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


# --- The two users of a merger -------------------------------------------------------------------


class DynamicTokenizer(nn.Module):
  """Selector, merger and quantizer: a feature map becomes as many discrete tokens as it needs.

  `counterfactual` is that of the merger.
  """

  hidden_size: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  codebook_size: int
  code_dim: int
  dtype: Dtype = jnp.float32
  remat: str = 'none'
  counterfactual: bool = False

  def setup(self):
    """Makes the parameters and submodules."""
    self.selector = Selector(self.hidden_size)
    self.merger = Merger(
      self.hidden_size,
      self.num_layers,
      self.num_heads,
      self.mlp_dim,
      self.dtype,
      self.remat,
      self.counterfactual,
    )
    self.quantizer = Quantizer(self.hidden_size, self.codebook_size, self.code_dim, self.dtype)

  def __call__(self, x: Array, key: Array | None = None) -> TokenizerOutput:
    """Tokenizes patch features.

    Args:
      x: [B, N, D], without the CLS row.
      key: samples the choice of patches; one key, or keys [B], one for each image. Without a key
        the choice is deterministic.
    """
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
  """Continuous tokens for the language model: stage 2's own merger, then a projection."""

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
