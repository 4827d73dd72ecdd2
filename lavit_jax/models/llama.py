"""The language model: LLaMA over embeddings, with scanned layers and an explicit cache (REFERENCE section 2).

Axis letters: L layers, B rows, S new tokens, M slots of the cache, K keys (S without a cache, M with one), H width,
G key-value heads, d head width, V vocabulary.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lavit_jax.models.layers import (
  SAVED_PROJ,
  SAVED_QKV,
  RMSNorm,
  SwiGLU,
  attention,
  merge_heads,
  rotary,
  scan_blocks,
  split_batch,
  split_heads,
)
from lavit_jax.models.packed_attention import packed_attention

Dtype = Any


class KVCache(NamedTuple):
  """Keys (rotated) and values of the tokens seen so far. Head-major: a step multiplies it as it lies in memory."""

  k: Array  # [L, B, G, M, d]
  v: Array  # [L, B, G, M, d]
  length: Array  # i32[]; slots written, the same for all rows: what a row may see is the mask's business.

  def append(self, layer: Array, k: Array, v: Array) -> tuple['KVCache', Array, Array]:
    """Writes k, v [B, S, G, d] of one layer at `length`; returns all of its keys and values, [B, M, G, d].

    The stacked cache travels as the carry of the scan over layers, so that the write happens in place.
    """

    def write(stack: Array, new: Array) -> tuple[Array, Array]:
      new = new.swapaxes(1, 2).astype(stack.dtype)
      stack = jax.lax.dynamic_update_slice(stack, new[None], (layer, 0, 0, self.length, 0))
      return stack, jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False).swapaxes(1, 2)

    (stack_k, k), (stack_v, v) = write(self.k, k), write(self.v, v)
    return self._replace(k=stack_k, v=stack_v), k, v


class SelfAttention(nn.Module):
  """Causal self-attention as the mask says, with rotary positions and grouped key-value heads."""

  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float
  dtype: Dtype

  @nn.compact
  def __call__(
    self, x: Array, cache: KVCache | None, layer: Array, positions: Array, mask: Array
  ) -> tuple[Array, KVCache | None]:
    def linear(features: int, name: str) -> nn.Dense:
      return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

    q = split_heads(linear(self.num_heads * self.head_dim, 'query')(x), self.num_heads)
    k = split_heads(linear(self.num_kv_heads * self.head_dim, 'key')(x), self.num_kv_heads)
    v = split_heads(linear(self.num_kv_heads * self.head_dim, 'value')(x), self.num_kv_heads)
    q, k = rotary(q, positions, self.rope_theta), rotary(k, positions, self.rope_theta)
    if cache is not None:
      cache, k, v = cache.append(layer, k, v)
    q, k, v = (checkpoint_name(x.astype(self.dtype), SAVED_QKV) for x in (q, k, v))
    heads = attention(q, k, v, mask) if mask.dtype == bool else packed_attention(q, k, v, mask)
    return checkpoint_name(linear(x.shape[-1], 'proj')(merge_heads(heads)), SAVED_PROJ), cache


class Block(nn.Module):
  """Pre-norm attention and SwiGLU, each added to the stream."""

  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  rms_norm_eps: float
  rope_theta: float
  dtype: Dtype

  @nn.compact
  def __call__(self, carry: tuple[Array, KVCache | None], layer: Array, positions: Array, mask: Array):
    x, cache = split_batch(carry[0]), carry[1]
    attend = SelfAttention(
      self.num_heads, self.num_kv_heads, self.head_dim, self.rope_theta, self.dtype, name='attention'
    )
    h = RMSNorm(self.rms_norm_eps, self.dtype, name='attention_norm')(x)
    h, cache = attend(h, cache, layer, positions, mask)
    x = x + h
    h = RMSNorm(self.rms_norm_eps, self.dtype, name='mlp_norm')(x)
    x = x + SwiGLU(self.mlp_dim, self.dtype, name='mlp')(h)
    return (x, cache), None


class Llama(nn.Module):
  """LLaMA: embeddings in, final hidden states out; `embed` and `logits` are its two ends (untied)."""

  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  rms_norm_eps: float = 1e-5
  rope_theta: float = 1e4
  dtype: Dtype = jnp.float32
  remat: str = 'none'

  def setup(self):
    init = nn.initializers.normal(0.02)
    self.embedding = self.param('embedding', init, (self.vocab_size, self.hidden_size))
    self.head = self.param('head', init, (self.hidden_size, self.vocab_size))
    self.norm = RMSNorm(self.rms_norm_eps, self.dtype)
    blocks = scan_blocks(Block, self.num_layers, self.remat, in_axes=(0, nn.broadcast, nn.broadcast))
    self.layers = blocks(
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads,
      head_dim=self.head_dim,
      mlp_dim=self.mlp_dim,
      rms_norm_eps=self.rms_norm_eps,
      rope_theta=self.rope_theta,
      dtype=self.dtype,
    )

  def embed(self, ids: Array) -> Array:
    """ids i32[...] in [0, V) -> dtype[..., H]."""
    return self.embedding[ids].astype(self.dtype)

  def __call__(
    self, embeddings: Array, positions: Array, mask: Array, cache: KVCache | None = None
  ) -> tuple[Array, KVCache | None]:
    """Runs the layers.

    Args:
      embeddings: [B, S, H].
      positions: i32[B, S], rotary positions.
      mask: bool[B, 1, S, K], what each query may see; causality is in it too (`sequence.prompt_mask`). A query that
        may see nothing gets something finite and meaningless. Or, of packed rows, their segments i32[B, S].
      cache: the new tokens are written at its `length`, and must fit: M >= length + S.

    Returns:
      dtype[B, S, H] after the final norm, and the cache with the new tokens (None without one).
    """
    carry = (embeddings.astype(self.dtype), cache)
    (x, cache), _ = self.layers(carry, jnp.arange(self.num_layers), positions, mask)
    if cache is not None:
      cache = cache._replace(length=cache.length + embeddings.shape[1])
    return self.norm(x), cache

  def logits(self, hidden: Array) -> Array:
    """[..., H] -> f32[..., V]."""
    return jnp.matmul(hidden, self.head.astype(self.dtype), preferred_element_type=jnp.float32)

  def init_cache(self, batch: int, max_length: int, dtype: Dtype | None = None) -> KVCache:
    """An empty cache of `max_length` slots a row, in the compute dtype unless told otherwise."""
    shape = (self.num_layers, batch, self.num_kv_heads, max_length, self.head_dim)
    zeros = jnp.zeros(shape, self.dtype if dtype is None else dtype)
    return KVCache(zeros, zeros, jnp.zeros((), jnp.int32))
