"""Norms, attention, MLPs and rotary positions: what every transformer here is made of.

Axes: B rows, Q queries, K keys, N tokens, H heads, d head width, D model width.
Parameters are float32; `dtype` is the compute dtype. Norms and softmax always run in float32.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from lavit_jax.models.int8 import Linear

Dtype = Any
BATCH_AXES = ('data', 'fsdp')  # the mesh axes that a batch is split over
TENSOR_AXIS = 'tensor'  # and the one that heads and hidden units are
QUERY_BLOCK = 256  # queries whose scores are in memory at once, where there are four times as many and nothing is masked

# What backward keeps of a block besides its input, by the names below; the rest it computes again. From the least memory to the least work.
SAVED_QKV, SAVED_ATTENTION, SAVED_PROJ, SAVED_MLP_OUT = 'qkv', 'attention', 'proj', 'mlp_out'
_policies = jax.checkpoint_policies
REMAT_POLICIES = {
  'full': _policies.nothing_saveable,
  'save_qkv_proj': _policies.save_only_these_names(SAVED_QKV, SAVED_ATTENTION, SAVED_PROJ),
  'save_all_but_mlp_in': _policies.save_only_these_names(
    SAVED_QKV, SAVED_ATTENTION, SAVED_PROJ, SAVED_MLP_OUT
  ),
  'minimal': _policies.save_from_both_policies(  # every product with weights
    _policies.dots_with_no_batch_dims_saveable,
    _policies.save_only_these_names(SAVED_QKV, SAVED_ATTENTION),
  ),
}


class LayerNorm(nn.Module):
  """Layer normalisation over the last axis, in float32; [..., D] -> dtype[..., D]."""

  epsilon: float = 1e-5
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
    bias = self.param('bias', nn.initializers.zeros, x.shape[-1:])
    x = x.astype(jnp.float32)
    x = x - x.mean(
      -1, keepdims=True
    )  # the two-pass variance: E[x^2] - E[x]^2 cancels on large activations
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
    return (x * scale + bias).astype(self.dtype)


class RMSNorm(nn.Module):
  """Root-mean-square normalisation over the last axis, in float32; [..., D] -> dtype[..., D]."""

  epsilon: float = 1e-5
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
    return (x * scale).astype(self.dtype)


def gelu(x: Array) -> Array:
  """The exact GELU, in float32, by erf: `jax.nn.gelu` goes by erfc, which doubles the time of an MLP's gradient on CPU."""
  y = x.astype(jnp.float32)  # 1 + erf cancels for negative x in bfloat16
  return (0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


class Mlp(nn.Module):
  """Linear - activation, exact (erf) GELU unless another is given - Linear; [..., D] -> dtype[..., D]."""

  mlp_dim: int
  dtype: Dtype = jnp.float32
  activation: Callable[[Array], Array] = gelu

  @nn.compact
  def __call__(self, x: Array) -> Array:
    hidden = self.activation(nn.Dense(self.mlp_dim, dtype=self.dtype, name='fc1')(x))
    return checkpoint_name(
      nn.Dense(x.shape[-1], dtype=self.dtype, name='fc2')(hidden), SAVED_MLP_OUT
    )


class SwiGLU(nn.Module):
  """down(silu(gate(x)) * up(x)) without biases, LLaMA's MLP; [..., D] -> dtype[..., D]."""

  mlp_dim: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    def linear(features: int, name: str) -> Linear:
      return Linear(features, self.dtype, name=name)

    gate, up = linear(self.mlp_dim, 'gate')(x), linear(self.mlp_dim, 'up')(x)
    return checkpoint_name(linear(x.shape[-1], 'down')(nn.silu(gate) * up), SAVED_MLP_OUT)


def _scores(q: Array, k: Array, scale: float | None) -> Array:
  """Scaled dot products f32[B, H, Q, K] of q [B, Q, H, d] and k [B, K, G, d], each k head serving H / G heads of q.

  Head-major operands: contracting over the strided axis of [B, N, H, d] is three times slower on CPU.
  """
  b, n, h, d = q.shape
  q = (q * (d**-0.5 if scale is None else scale)).swapaxes(1, 2).reshape(b, k.shape[2], -1, d)
  scores = jnp.matmul(q, k.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
  return scores.reshape(b, h, n, k.shape[1])


def _mix(weights: Array, v: Array) -> Array:
  """Weighted sums [B, Q, H, d] of the values v [B, K, G, d] under weights f32[B, H, Q, K]."""
  b, h, n, m = weights.shape
  weights = weights.astype(v.dtype).reshape(b, v.shape[2], -1, m)
  return jnp.matmul(weights, v.swapaxes(1, 2)).reshape(b, h, n, v.shape[-1]).swapaxes(1, 2)


def attention(
  q: Array,
  k: Array,
  v: Array,
  mask: Array | None = None,
  scale: float | None = None,
  *,
  bias: Array | None = None,
) -> Array:
  """Softmax attention, softmax in float32.

  Args:
    q: [B, Q, H, d]. k, v: [B, K, G, d], where G divides H (grouped queries).
    mask: bool, broadcastable to [B, H, Q, K]; True may be seen. A query that may see nothing averages all values.
    scale: of the products, d ** -0.5 if None.
    bias: added to the scaled products, broadcastable to [B, H, Q, K].

  Returns:
    [B, Q, H, d] in the dtype of v.
  """
  if q.shape[1] >= 4 * QUERY_BLOCK and mask is None and bias is None:
    return _attention_by_blocks(q, k, v, scale)
  scores = _scores(q, k, scale)
  if bias is not None:
    scores = scores + bias
  if mask is not None:
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  return _mix(jax.nn.softmax(scores), v)


def _attention_by_blocks(q: Array, k: Array, v: Array, scale: float | None) -> Array:
  """At most `QUERY_BLOCK` queries at a time, forward and backward: the scores of the 4,096 positions of a latent picture would not fit."""

  @jax.checkpoint
  def block(_, queries):
    return None, _mix(jax.nn.softmax(_scores(queries, k, scale)), v)

  b, n, h, d = q.shape
  count = -(-n // QUERY_BLOCK)
  size = -(-n // count)
  blocks = (
    jnp.pad(q, ((0, 0), (0, count * size - n), (0, 0), (0, 0)))
    .reshape(b, count, size, h, d)
    .swapaxes(0, 1)
  )
  return (
    jax.lax.scan(block, None, blocks)[1]
    .swapaxes(0, 1)
    .reshape(b, count * size, h, v.shape[-1])[:, :n]
  )


def policy_attention(q: Array, k: Array, v: Array, policy: Array) -> Array:
  """Attention under a 0/1 policy that gradients can reach: the merger's own masked softmax (specification, Merger).

  The row maximum is taken before masking, and eps / K is spread over the row, so that a query that may see nothing
  gives every key 1 / K.

  Args:
    q: [B, Q, H, d]. k, v: [B, K, H, d].
    policy: f32, broadcastable to [B, H, Q, K]; 1 counts, 0 does not.

  Returns:
    [B, Q, H, d] in the dtype of v.
  """
  eps = 1e-6
  scores = _scores(q, k, None)
  a = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))) * policy
  return _mix((a + eps / a.shape[-1]) / (a.sum(-1, keepdims=True) + eps), v)


class QKV(nn.Module):
  """Three projections of x [..., D] to dtype[..., W] each, from one kernel f32[3, D, W].

  Three products: slicing one product apart costs a third of the layer's gradient on CPU.
  """

  features: int
  use_bias: bool = True
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> list[Array]:
    init = nn.initializers.lecun_normal(batch_axis=0)
    kernel = self.param('kernel', init, (3, x.shape[-1], self.features)).astype(self.dtype)
    qkv = [x.astype(self.dtype) @ w for w in kernel]
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (3, self.features)).astype(self.dtype)
      qkv = [y + b for y, b in zip(qkv, bias, strict=True)]
    return qkv


class SelfAttention(nn.Module):
  """Multi-head self-attention; [B, N, D] -> dtype[B, N, D].

  `attend(q, k, v)` says how the heads attend (`attention` by default). EVA has biases for q and v but none for k
  (`key_bias=False`).
  """

  num_heads: int
  head_dim: int
  key_bias: bool = True
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, attend: Callable[[Array, Array, Array], Array] = attention) -> Array:
    width = self.num_heads * self.head_dim
    q, k, v = QKV(width, use_bias=self.key_bias, dtype=self.dtype, name='qkv')(x)
    if not self.key_bias:
      q = q + self.param('q_bias', nn.initializers.zeros, (width,)).astype(self.dtype)
      v = v + self.param('v_bias', nn.initializers.zeros, (width,)).astype(self.dtype)
    return attend_and_project(
      q, k, v, self.num_heads, attend, nn.Dense(x.shape[-1], dtype=self.dtype, name='proj')
    )


class CrossAttention(nn.Module):
  """Multi-head attention from x [B, N, D] to memory [B, K, E], head width D / H; -> dtype[B, N, D]."""

  num_heads: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Array, memory: Array, attend: Callable[[Array, Array, Array], Array] = attention
  ) -> Array:
    def linear(name: str) -> nn.Dense:
      return nn.Dense(x.shape[-1], dtype=self.dtype, name=name)

    q, k, v = linear('query')(x), linear('key')(memory), linear('value')(memory)
    return attend_and_project(q, k, v, self.num_heads, attend, linear('proj'))


def attend_and_project(
  q: Array, k: Array, v: Array, num_heads: int, attend: Callable, proj: Callable
) -> Array:
  """Queries, keys and values [B, N, W] through `attend`, head by head, and `proj`."""
  q, k, v = (checkpoint_name(x, SAVED_QKV) for x in (q, k, v))
  heads = attend(*(split_heads(x, num_heads) for x in (q, k, v)))
  return checkpoint_name(proj(merge_heads(heads)), SAVED_PROJ)


def split_heads(x: Array, num_heads: int) -> Array:
  """[..., H * d] -> [..., H, d]."""
  return x.reshape(*x.shape[:-1], num_heads, -1)


def merge_heads(x: Array) -> Array:
  """[..., H, d] -> [..., H * d]."""
  return x.reshape(*x.shape[:-2], -1)


def rotary(x: Array, positions: Array, frequency: Array, magnitude: float = 1.0) -> Array:
  """Rotates pairs (i, i + d/2) of x [B, N, H, d] by positions i32[B, N] times frequency[i], in float32.

  The half-split layout of Hugging Face's LLaMA, so ported weights need no permutation.

  Args:
    frequency: f32[d / 2], or f32[B, 1, 1, d / 2] (models/rope.py).
    magnitude: by what the result is multiplied.
  """
  angle = positions[..., None, None].astype(jnp.float32) * frequency
  sin, cos = jnp.sin(angle) * magnitude, jnp.cos(angle) * magnitude
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def constrain_batch(x: Array) -> Array:
  """Keeps activations [B, ...] split by rows over `BATCH_AXES`; does nothing without such a mesh, or where B does not divide.

  Blocks begin with it. Left to itself, the compiler may split activations by width, as the weights are, and then move them about.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not set(BATCH_AXES) <= set(mesh.axis_names) or x.shape[0] % math.prod(
    mesh.shape[axis] for axis in BATCH_AXES
  ):
    return x
  return jax.lax.with_sharding_constraint(x, P(BATCH_AXES))


def per_shard(function: Callable, shards: int, *arrays: Array) -> Any:
  """function(*arrays) of each of `shards` equal pieces of the arrays [B, ...] alone; its results joined again, all [B', ...] too.

  Over a mesh a piece is what lies on one place of `BATCH_AXES`, and nothing is sent; without one the pieces are mapped over.
  """
  if set(BATCH_AXES) <= set(jax.sharding.get_abstract_mesh().axis_names):
    return jax.shard_map(
      function,
      in_specs=P(BATCH_AXES),
      out_specs=P(BATCH_AXES),
      axis_names=set(BATCH_AXES),
      check_vma=False,
    )(*arrays)
  pieces = [x.reshape(shards, -1, *x.shape[1:]) for x in arrays]
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.vmap(function)(*pieces))


def scan_blocks(
  block: type[nn.Module], length: int, remat: str = 'none', in_axes: Any = nn.broadcast
) -> Callable[..., nn.Module]:
  """`length` blocks as one compiled body, their parameters stacked on axis 0.

    x, outs = scan_blocks(Block, 12, remat)(num_heads=16, name='blocks')(x, mask)

  Args:
    block: a module whose call takes (carry, *inputs) and returns (carry, out).
    length: number of blocks.
    remat: 'none', or what backward recomputes, a key of `REMAT_POLICIES`.
    in_axes: for each input, `nn.broadcast` (all blocks see it) or the axis that holds one slice a block.

  Raises:
    ValueError: no such remat policy.
  """
  if remat != 'none':
    if remat not in REMAT_POLICIES:
      raise ValueError(
        f"remat={remat!r} is not one of 'none', {', '.join(map(repr, REMAT_POLICIES))}"
      )
    block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=False)
  return nn.scan(
    block,
    variable_axes={'params': 0},
    split_rngs={'params': True},
    in_axes=in_axes,
    out_axes=0,
    length=length,
  )
