"""The merger: kept patches take in what the dropped ones show (specification, Merger).

It has two paths with the same parameters. `merge_all` computes the rows of all N patches, as
published. But only the rows of kept patches are used afterwards, and they hardly depend on the
others: their self-attention sees kept patches alone, and their cross-attention sees the features
x0, not the stream. So `merge_bucket` computes the kept rows alone, gathered into a bucket of C < N
slots.

What does depend on the rows that are left out is the part of the self-attention that is due to eps:
the maximum of a query is taken over all keys, and eps / N goes to each. In the bucket, slots that
are free hold an evenly spaced sample of the dropped patches: their rows are exact, and their keys
stand for those of all dropped patches. Where eps changes the attention of a kept row by more than
`MAX_EFFECT` of its norm, all rows are computed after all. That a sample stands for the rest makes
this an estimate and not a strict bound; docs/performance.md says how close it is.

Axes: B images, N patches, C slots of a bucket, D feature width, H heads.
"""

from functools import partial
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.attention import (
  CrossAttention,
  SelfAttention,
  policy_attention,
  policy_attention_with_effect,
)
from lavit_jax.models.layers import Dtype, LayerNorm, Mlp
from lavit_jax.models.remat import scan_blocks
from lavit_jax.sharding import constrain_batch

# The largest change by eps in the attention of a kept row, relative to its norm, for which a bucket
# is used.
MAX_EFFECT = 1e-5
SAMPLE_DIVISOR = 8  # 1/8 of the slots of a bucket are free for the sample of dropped patches


class Merged(NamedTuple):
  """Merged features, and how they were computed.

  Attributes:
    rows: dtype[B, N, D]; only the kept rows have a meaning.
    in_bucket: f32[], 1 if the kept rows were computed in a bucket, 0 if all rows were.
  """

  rows: Array
  in_bucket: Array


class MergerBlock(nn.Module):
  """Causal self-attention among kept patches, cross-attention to dropped ones, MLP; pre-norm.

  It sows its output as the intermediate 'stream' [B, R, D].
  """

  num_heads: int
  mlp_dim: int
  dtype: Dtype = jnp.float32
  counterfactual: bool = False

  @nn.compact
  def __call__(
    self,
    x: Array,
    dropped: Array,
    kept_policy: Array,
    dropped_policy: Array,
    key_shares: Array | None = None,
  ) -> tuple[Array, Array | None]:
    """Computes R rows: all N, or those in a bucket.

    Args:
      x: [B, R, D].
      dropped: x0 [B, N, D].
      kept_policy: over [B, H, R, R].
      dropped_policy: over [B, H, R, N].
      key_shares: of eps in a bucket, f32[B, R]; None for 1 / R each.

    Returns:
      ([B, R, D], the effect of eps on the self-attention of each row f32[B, R]), the second only
      with `key_shares`.
    """

    def norm(name: str) -> LayerNorm:
      return LayerNorm(1e-5, self.dtype, name=name)

    effect = None

    def attend_kept(q: Array, k: Array, v: Array) -> Array:
      nonlocal effect
      attended, effect_of_epsilon = policy_attention_with_effect(
        q, k, v, kept_policy, self.counterfactual, key_shares
      )
      if key_shares is not None:
        effect = effect_of_epsilon
      return attended

    attend_dropped = partial(
      policy_attention, policy=dropped_policy, counterfactual=self.counterfactual
    )
    head_dim = x.shape[-1] // self.num_heads
    causal = SelfAttention(self.num_heads, head_dim, dtype=self.dtype, name='self_attn')
    cross = CrossAttention(self.num_heads, self.dtype, name='cross_attn')
    x = constrain_batch(x)
    x = x + causal(norm('norm0')(x), attend_kept)
    x = x + cross(norm('norm1')(x), dropped, attend_dropped)
    x = x + Mlp(self.mlp_dim, self.dtype, name='mlp')(norm('norm2')(x))
    self.sow('intermediates', 'stream', x)
    return x, effect


class Merger(nn.Module):
  """Merges the dropped patches into the kept ones (specification, Merger).

  The policy of the self-attention with patches 0, 2, 3 kept (the cross-attention sees 1 and 4):

        j 0 1 2 3 4
      i 0 x . . . .
        1 x x . . .     j <= i and kept, and always itself
        2 x . x . .
        3 x . x x .
        4 x . x x x

  In a bucket of C = 4, patch 1 is sampled, and patch 4 is left out.

  Attributes:
    hidden_size: D.
    num_layers: number of blocks.
    num_heads: of every attention.
    mlp_dim: hidden width of the MLPs.
    dtype: of the computation.
    remat: policy of the blocks ('none' or a key of `remat.REMAT_POLICIES`).
    counterfactual: see `policy_attention`; it changes gradients by the policy alone.
    capacities: the sizes C of buckets, ascending; of a batch, all images are computed in the
      smallest one that has room for each. Without any, all rows are computed, as published.
  """

  hidden_size: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  dtype: Dtype = jnp.float32
  remat: str = 'none'
  counterfactual: bool = False
  capacities: tuple[int, ...] = ()

  def setup(self):
    """Makes the submodules."""
    make_blocks = scan_blocks(MergerBlock, self.num_layers, self.remat)
    self.ln_vision = LayerNorm(1e-5, self.dtype)
    self.blocks = make_blocks(self.num_heads, self.mlp_dim, self.dtype, self.counterfactual)
    self.norm = LayerNorm(1e-5, self.dtype)

  def __call__(self, x: Array, keep: Array) -> Array:
    """The rows of `merge` with a selector that does not train."""
    return self.merge(x, keep).rows

  def merge(self, x: Array, keep: Array, selector_trains: bool | Array = False) -> Merged:
    """Merges, in a bucket where that is as good as to compute all rows.

    Args:
      x: patch features [B, N, D].
      keep: f32[B, N], 0 or 1.
      selector_trains: whether gradients must reach `keep`, bool[]. Only `merge_all` has them, since
        they need the rows of dropped patches.
    """
    chex.assert_shape(x, (None, None, self.hidden_size))
    chex.assert_shape(keep, x.shape[:2])
    # Both are split by rows: left to choose how masks lie on a mesh of data=2, fsdp=2, tensor=2,
    # XLA (jax 0.10.2) exchanged rows 1 and 2.
    x = constrain_batch(x.astype(self.dtype))
    keep = constrain_batch(keep.astype(jnp.float32))
    capacities = [capacity for capacity in self.capacities if capacity < x.shape[1]]
    # Whoever records intermediates wants all rows.
    recorded = self.is_mutable_collection('intermediates')
    if not capacities or selector_trains is True or recorded or self.is_initializing():
      return Merged(self.merge_all(x, keep), jnp.zeros([]))
    return self._merge_in_bucket(x, keep, capacities, selector_trains)

  def merge_all(self, x: Array, keep: Array) -> Array:
    """Computes all rows under a policy through which gradients reach the selector.

    Args:
      x: [B, N, D].
      keep: f32[B, N], 0 or 1.

    Returns:
      dtype[B, N, D]; only the kept rows have a meaning. The normalized input is sown as the
      intermediate 'vision' [B, N, D].
    """
    vision = self.ln_vision(x)
    self.sow('intermediates', 'vision', vision)
    x, _ = self.blocks(x, vision, _kept_policy(keep), 1 - keep[:, None, None, :])
    return self.norm(x)

  def merge_bucket(self, x: Array, keep: Array, capacity: int) -> tuple[Array, Array]:
    """Computes the kept rows alone.

    Args:
      x: [B, N, D].
      keep: f32[B, N], 0 or 1, at most `capacity` in a row; it gets no gradient.
      capacity: C < N.

    Returns:
      dtype[B, N, D], zeros in the rows of dropped patches; and the largest effect of eps on the
      self-attention of a kept row, f32[].
    """
    keep = jax.lax.stop_gradient(keep)
    slots, members = jax.vmap(partial(fill_bucket, capacity=capacity))(keep > 0.5)
    kept = jnp.take_along_axis(keep, members, axis=1)
    vision = self.ln_vision(x)
    rows, effects = self.blocks(
      _take_rows(x, members),
      vision,
      _kept_policy(kept),
      1 - keep[:, None, None, :],
      _key_shares(kept, keep.shape[1]),
    )
    rows = _take_rows(self.norm(rows), slots)
    merged = jnp.where(keep[..., None] > 0.5, rows, jnp.zeros((), rows.dtype))
    return merged, jnp.where(kept > 0.5, effects, 0).max()

  def _merge_in_bucket(
    self, x: Array, keep: Array, capacities: list[int], selector_trains: bool | Array
  ) -> Merged:
    # Branches are pure functions of the parameters: `lax.cond` cannot call submodules of `self`.
    variables = {'params': self.variables['params']}

    def in_bucket(capacity: int, x: Array, keep: Array) -> tuple[Array, Array]:
      return self.clone(parent=None).bind(variables).merge_bucket(x, keep, capacity)

    def all_rows(x: Array, keep: Array) -> tuple[Array, Array]:
      return self.clone(parent=None).bind(variables).merge_all(x, keep), jnp.full([], -1.0)

    largest = (keep > 0.5).sum(-1).max()
    rooms = jnp.array([capacity - capacity // SAMPLE_DIVISOR for capacity in capacities])
    index = jnp.where(selector_trains, len(capacities), (rooms < largest).sum())
    branches = [*(partial(in_bucket, capacity) for capacity in capacities), all_rows]
    rows, effect = jax.lax.switch(index, branches, x, keep)
    # Not a number counts as too large.
    rows, effect = jax.lax.cond(
      effect <= MAX_EFFECT, lambda x, keep: (rows, effect), all_rows, x, keep
    )
    return Merged(rows, (effect >= 0).astype(jnp.float32))


def fill_bucket(keep: Array, capacity: int) -> tuple[Array, Array]:
  """Chooses the patches in a bucket: the kept ones, and as many dropped ones as there is room for.

  The dropped ones are evenly spaced among all dropped ones. Patches are in the order of the image.

      keep, capacity 5    0 1 0 0 1 0 1 0
      in the bucket       . 1 . 3 4 . 6 7
      slots               0 0 1 1 2 3 3 4

  Args:
    keep: bool[N], at most `capacity` of them True.
    capacity: C < N.

  Returns:
    i32[N], the slot of each patch that is in the bucket (of others, any slot), and i32[C], the
    patch in each slot.
  """
  num_patches = len(keep)
  rank = jnp.cumsum(~keep) - 1  # among the dropped ones
  free = capacity - keep.sum()
  num_dropped = jnp.maximum((~keep).sum(), 1)
  is_sampled = (rank + 1) * free // num_dropped > rank * free // num_dropped
  is_member = keep | is_sampled
  slots = jnp.maximum(jnp.cumsum(is_member) - 1, 0).astype(jnp.int32)
  patches = jnp.arange(num_patches, dtype=jnp.int32)
  members = jnp.zeros(capacity, jnp.int32)
  members = members.at[jnp.where(is_member, slots, num_patches)].set(patches, mode='drop')
  return slots, members


def _kept_policy(keep: Array) -> Array:
  """The policy f32[B, 1, R, R] of the self-attention, see `Merger`; keep f32[B, R]."""
  num_rows = keep.shape[1]
  earlier = jnp.tril(jnp.ones((num_rows, num_rows)), -1)
  return earlier * keep[:, None, None, :] + jnp.eye(num_rows)


def _key_shares(kept: Array, num_patches: int) -> Array:
  """The shares f32[B, C] of eps in a bucket, by kept f32[B, C], which is 0 for sampled ones.

  Of N shares each kept patch has one. The sampled ones have the others; without any, the kept ones.
  """
  num_kept = kept.sum(-1, keepdims=True)
  num_sampled = kept.shape[1] - num_kept
  shares = jnp.where(kept > 0.5, 1.0, (num_patches - num_kept) / jnp.maximum(num_sampled, 1))
  return shares / shares.sum(-1, keepdims=True)


def _take_rows(x: Array, indices: Array) -> Array:
  """Rows [B, M, D] of x [B, R, D] by indices i32[B, M]."""
  return constrain_batch(jax.vmap(lambda x, indices: x[indices])(x, indices))
