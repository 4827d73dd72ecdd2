"""Attention: plain softmax attention, the merger's attention under a policy, and their modules.

Axes: B rows, Q queries, K keys, N tokens, H heads, G key-value heads, d head width, D model width.
Parameters are float32; `dtype` is the compute dtype. Softmax always runs in float32. Kernels for
long rows are in attention_kernels.py.
"""

from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lavit_jax.models.layers import Dtype
from lavit_jax.models.lora import Dense, add_low_rank
from lavit_jax.models.remat import SAVED_PROJ, SAVED_QKV

QUERY_BLOCK = 256  # queries whose scores are in memory at once, in long rows and prompts
POLICY_EPSILON = 1e-6
MAX_EXPONENT = 60.0  # of an attention weight, in float32

Attend = Callable[[Array, Array, Array], Array]


def attention(
  q: Array,
  k: Array,
  v: Array,
  mask: Array | None = None,
  scale: float | None = None,
  *,
  bias: Array | None = None,
  dropout: Callable[[Array], Array] | None = None,
) -> Array:
  """Softmax attention, softmax in float32.

  Args:
    q: [B, Q, H, d].
    k: [B, K, G, d], where G divides H (grouped queries).
    v: [B, K, G, d].
    mask: bool, broadcastable to [B, H, Q, K]; True may be seen. A query that may see nothing
      averages all values.
    scale: of the products, d ** -0.5 if None.
    bias: added to the scaled products, broadcastable to [B, H, Q, K].
    dropout: applied to the weights f32[B, H, Q, K] of the values.

  Returns:
    [B, Q, H, d] in the dtype of v.
  """
  _assert_shapes(q, k, v)
  chex.assert_rank([x for x in (mask, bias) if x is not None], {2, 4})
  is_plain = mask is None and bias is None and dropout is None
  if q.shape[1] >= 4 * QUERY_BLOCK and is_plain:
    return attention_by_blocks(q, k, v, scale=scale)
  scores = _scores(q, k, scale)
  if bias is not None:
    scores = scores + bias
  if mask is not None:
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores)
  if dropout is not None:
    weights = dropout(weights)
  return _weighted_sums(weights, v)


def attention_by_blocks(
  q: Array, k: Array, v: Array, mask: Array | None = None, scale: float | None = None
) -> Array:
  """`attention` of at most `QUERY_BLOCK` queries at a time, forward and backward.

  All scores of the 4,096 positions of a latent image, or of a long prompt, would not fit into
  memory. The arguments are those of `attention`.
  """
  b, n, h, _ = q.shape
  count = -(-n // QUERY_BLOCK)
  if count == 1:
    return attention(q, k, v, mask, scale)
  size = -(-n // count)

  def blocks(x: Array, axis: int) -> Array:
    """[..., Q, ...] -> [count, ..., size, ...]."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, count * size - n)
    x = jnp.pad(x, pads)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)

  @jax.checkpoint
  def attend_block(_, block):
    queries, block_mask = block
    return None, attention(queries, k, v, mask if block_mask is None else block_mask, scale)

  mask_blocks = None
  if mask is not None and mask.shape[-2] == n:
    mask_blocks = blocks(mask, mask.ndim - 2)
  _, attended = jax.lax.scan(attend_block, None, (blocks(q, 1), mask_blocks))
  return attended.swapaxes(0, 1).reshape(b, count * size, h, v.shape[-1])[:, :n]


def policy_attention(
  q: Array, k: Array, v: Array, policy: Array, counterfactual: bool = False
) -> Array:
  """The merger's masked softmax: gradients reach its 0/1 policy (specification, Merger).

  The maximum of each query is taken before masking, and eps / K is spread over the keys, so that a
  query that may see nothing gives every key the weight 1 / K.

  Args:
    q: [B, Q, H, d].
    k: [B, K, H, d].
    v: [B, K, H, d].
    policy: f32, broadcastable to [B, H, Q, K]; 1 where a key counts, 0 where it does not.
    counterfactual: for a key that does not count, the derivative with respect to the policy is the
      change of the output if the key did count. The true derivative, the default as published, is
      many times as large wherever such a key would outweigh those that do count. For keys that
      count, both have the true derivative.

  Returns:
    [B, Q, H, d] in the dtype of v.
  """
  return policy_attention_with_effect(q, k, v, policy, counterfactual)[0]


def policy_attention_with_effect(
  q: Array,
  k: Array,
  v: Array,
  policy: Array,
  counterfactual: bool = False,
  key_shares: Array | None = None,
) -> tuple[Array, Array]:
  """`policy_attention`, and how much of its result is due to eps.

  Args:
    q: see `policy_attention`.
    k: see `policy_attention`.
    v: see `policy_attention`.
    policy: see `policy_attention`.
    counterfactual: see `policy_attention`.
    key_shares: how eps is spread over the keys, f32[B, K], the sum is 1; None for 1 / K each. A key
      that stands for others has their shares.

  Returns:
    ([B, Q, H, d] in the dtype of v, f32[B, Q]). The second is the norm, over all heads, of what
    would change without eps, in relation to the norm of the result; inf or nan if eps outweighs all
    keys that count. It has no gradient.
  """
  _assert_shapes(q, k, v)
  chex.assert_rank(policy, {2, 4})
  scores = _scores(q, k, None)
  maximum = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  weights = jnp.exp(scores - maximum)
  if counterfactual:
    policy = _counterfactual_policy(policy, weights)
  weights = weights * policy
  total = weights.sum(-1, keepdims=True)
  num_keys = weights.shape[-1]
  shares = 1 / num_keys if key_shares is None else key_shares[:, None, None]
  weights = (weights + POLICY_EPSILON * shares) / (total + POLICY_EPSILON)
  attended = _weighted_sums(weights, v)
  return attended, _effect_of_epsilon(attended, total, v, shares)


def _effect_of_epsilon(attended: Array, total: Array, v: Array, shares: Array | float) -> Array:
  """f32[B, Q], see `policy_attention_with_effect`.

  With the mean m of the values by their shares, a result is r = (s + eps m) / (t + eps), where s
  and t are sums over the keys that count. Without eps it is s / t, and r - s / t = eps / t (m - r).

  Args:
    attended: r [B, Q, H, d].
    total: t f32[B, H, Q, 1].
    v: [B, K, H, d].
    shares: f32[B, 1, 1, K], or one number.
  """
  attended, total, v = jax.lax.stop_gradient((attended, total, v))
  values = v.astype(jnp.float32)
  weights = jnp.broadcast_to(jnp.asarray(shares, jnp.float32), (len(v), 1, 1, v.shape[1]))
  mean = jnp.einsum('bk,bkhd->bhd', weights[:, 0, 0], values)[:, None]
  result = attended.astype(jnp.float32)
  total = total.swapaxes(1, 2)
  # Of a total below eps, m - r is lost to rounding.
  share = jnp.where(total > POLICY_EPSILON, POLICY_EPSILON / total, jnp.inf)
  change = share * (mean - result)
  squares = jnp.square(change).sum((-2, -1)) / jnp.square(result).sum((-2, -1))
  return jnp.sqrt(squares)


def counterfactual_attention(q: Array, k: Array, v: Array, policy: Array) -> Array:
  """Softmax attention to the keys that count, with gradients to the choice of keys.

  It is `attention` with the mask `policy > 0`. The derivative by the policy of a key is as in
  `policy_attention` with `counterfactual`.

  Args:
    q: [B, Q, H, d].
    k: [B, K, H, d].
    v: [B, K, H, d].
    policy: f32, broadcastable to [B, H, Q, K]; 1 where a key counts, 0 where it does not. At least
      one key counts for each query.

  Returns:
    [B, Q, H, d] in the dtype of v.
  """
  _assert_shapes(q, k, v)
  chex.assert_rank(policy, {2, 4})
  scores = _scores(q, k, None)
  maximum = jnp.where(policy > 0, scores, -jnp.inf).max(-1, keepdims=True)
  # Without the limit, a key that does not count could overflow.
  exponents = jnp.minimum(scores - jax.lax.stop_gradient(maximum), MAX_EXPONENT)
  weights = jnp.exp(exponents)
  weights = weights * _counterfactual_policy(policy, weights)
  return _weighted_sums(weights / weights.sum(-1, keepdims=True), v)


def _counterfactual_policy(policy: Array, weights: Array) -> Array:
  """A policy of the same value whose derivatives are scaled; see `policy_attention`.

  With the weight w of a key and the total t of those that count, adding the key changes the output
  by w / (t + w) of the difference of values. The derivative has w / t in this place.
  """
  value = jax.lax.stop_gradient(policy)
  weights = jax.lax.stop_gradient(weights)
  total = (weights * value).sum(-1, keepdims=True) + POLICY_EPSILON
  scale = total / (total + weights * (1 - value))
  return value + scale * (policy - value)


def _assert_shapes(q: Array, k: Array, v: Array) -> None:
  chex.assert_rank([q, k, v], 4)
  chex.assert_equal_shape_prefix([k, v], 3)
  chex.assert_equal_shape_prefix([q, k], 1)


def _scores(q: Array, k: Array, scale: float | None) -> Array:
  """Scaled products f32[B, H, Q, K] of q [B, Q, H, d] and k [B, K, G, d].

  Each key head serves H / G query heads. The operands are head-major: contracting over the strided
  axis of [B, N, H, d] is three times slower on CPU.
  """
  b, n, h, d = q.shape
  q = q * (d**-0.5 if scale is None else scale)
  q = q.swapaxes(1, 2).reshape(b, k.shape[2], -1, d)
  scores = jnp.matmul(q, k.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
  return scores.reshape(b, h, n, k.shape[1])


def _weighted_sums(weights: Array, v: Array) -> Array:
  """Sums [B, Q, H, d] of the values v [B, K, G, d] under weights f32[B, H, Q, K]."""
  b, h, n, m = weights.shape
  weights = weights.astype(v.dtype).reshape(b, v.shape[2], -1, m)
  return jnp.matmul(weights, v.swapaxes(1, 2)).reshape(b, h, n, v.shape[-1]).swapaxes(1, 2)


class QKV(nn.Module):
  """Projections from one kernel f32[3, D, W]: three, or two of keys and values with `count` 2.

  They are as many products: slicing one product apart costs a third of the layer's gradient on
  CPU.
  """

  features: int
  use_bias: bool = True
  dtype: Dtype = jnp.float32
  count: int = 3

  @nn.compact
  def __call__(self, x: Array) -> list[Array]:
    """Input x [..., D] -> `count` arrays dtype[..., W]."""
    init = nn.initializers.lecun_normal(batch_axis=0)
    kernel = self.param('kernel', init, (self.count, x.shape[-1], self.features)).astype(self.dtype)
    qkv = add_low_rank(self, x, [x.astype(self.dtype) @ w for w in kernel])
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.count, self.features)).astype(
        self.dtype
      )
      qkv = [y + b for y, b in zip(qkv, bias, strict=True)]
    return qkv


class SelfAttention(nn.Module):
  """Multi-head self-attention.

  Attributes:
    num_heads: H.
    head_dim: d.
    key_bias: False for EVA, which has biases for q and v but none for k.
    dtype: of the computation.
  """

  num_heads: int
  head_dim: int
  key_bias: bool = True
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, attend: Attend = attention) -> Array:
    """Input x [B, N, D] -> dtype[B, N, D]; `attend(q, k, v)` computes the heads."""
    width = self.num_heads * self.head_dim
    q, k, v = QKV(width, use_bias=self.key_bias, dtype=self.dtype, name='qkv')(x)
    if not self.key_bias:
      q = q + self.param('q_bias', nn.initializers.zeros, (width,)).astype(self.dtype)
      v = v + self.param('v_bias', nn.initializers.zeros, (width,)).astype(self.dtype)
    project = Dense(x.shape[-1], dtype=self.dtype, name='proj')
    return attend_and_project(q, k, v, self.num_heads, attend, project)


class CrossAttention(nn.Module):
  """Multi-head attention to another sequence, with heads of width D / H."""

  num_heads: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, memory: Array, attend: Attend = attention) -> Array:
    """Input x [B, N, D] and memory [B, K, E] -> dtype[B, N, D]."""

    def linear(name: str) -> Dense:
      return Dense(x.shape[-1], dtype=self.dtype, name=name)

    q = linear('query')(x)
    k = linear('key')(memory)
    v = linear('value')(memory)
    return attend_and_project(q, k, v, self.num_heads, attend, linear('proj'))


def attend_and_project(
  q: Array,
  k: Array,
  v: Array,
  num_heads: int,
  attend: Attend,
  project: Callable[[Array], Array],
) -> Array:
  """Applies `attend` head by head to q, k and v [B, N, H * d], then `project` to its result."""
  q, k, v = (checkpoint_name(x, SAVED_QKV) for x in (q, k, v))
  heads = attend(*(split_heads(x, num_heads) for x in (q, k, v)))
  return checkpoint_name(project(merge_heads(heads)), SAVED_PROJ)


def split_heads(x: Array, num_heads: int) -> Array:
  """[..., H * d] -> [..., H, d]."""
  return x.reshape(*x.shape[:-1], num_heads, -1)


def merge_heads(x: Array) -> Array:
  """[..., H, d] -> [..., H * d]."""
  return x.reshape(*x.shape[:-2], -1)
