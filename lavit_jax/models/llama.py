"""The language model: LLaMA over embeddings (specification, Language model), in two forms that share every block.

Training scans over stacked layers, which compiles one of them. Decoding has the layers one by one (`unroll_layers`), each with its own
parameters and cache: a scan would copy them from the stack at every token.

Axis letters: L layers, B rows, S new tokens, M slots of the cache, K keys (S without a cache, M with one), H width,
G key-value heads, d head width, V vocabulary.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lavit_jax.models.attention_kernels import packed_attention
from lavit_jax.models.int8 import Int8, Linear, dequantize, product, quantize, weight
from lavit_jax.models.layers import (
  SAVED_PROJ,
  SAVED_QKV,
  RMSNorm,
  SwiGLU,
  attention,
  constrain_batch,
  merge_heads,
  rotary,
  scan_blocks,
  split_heads,
)
from lavit_jax.models.rope import Rope

Dtype = Any


class LayerCache(NamedTuple):
  """Keys (rotated) and values of one layer. Head-major: a step multiplies it as it lies in memory."""

  k: Array | Int8  # [B, G, M, d]; the scale of an Int8 is f32[B, G, M]
  v: Array | Int8

  def append(self, start: Array, k: Array, v: Array) -> tuple['LayerCache', Array, Array]:
    """Writes k, v [B, S, G, d] at slot `start`; returns all keys and values too, [B, M, G, d] in the dtype of k and v."""

    def write(old: Array | Int8, new: Array) -> tuple[Array | Int8, Array]:
      dtype, new = new.dtype, new.swapaxes(1, 2)
      new = quantize(new) if isinstance(old, Int8) else new.astype(old.dtype)
      old = jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 2), old, new)
      return old, dequantize(old, dtype).swapaxes(1, 2)

    (self_k, k), (self_v, v) = write(self.k, k), write(self.v, v)
    return LayerCache(self_k, self_v), k, v


class KVCache(NamedTuple):
  """What the tokens seen so far have left behind."""

  layers: tuple[LayerCache, ...]
  length: (
    Array  # i32[]; slots written, the same for all rows: what a row may see is the mask's business.
  )


class SelfAttention(nn.Module):
  """Causal self-attention as the mask says, with rotary positions and grouped key-value heads."""

  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope: Rope
  dtype: Dtype

  @nn.compact
  def __call__(
    self, x: Array, positions: Array, mask: Array, cache: LayerCache | None, start: Array | None
  ) -> tuple[Array, LayerCache | None]:
    def linear(features: int, name: str) -> Linear:
      return Linear(features, self.dtype, name=name)

    q = split_heads(linear(self.num_heads * self.head_dim, 'query')(x), self.num_heads)
    k = split_heads(linear(self.num_kv_heads * self.head_dim, 'key')(x), self.num_kv_heads)
    v = split_heads(linear(self.num_kv_heads * self.head_dim, 'value')(x), self.num_kv_heads)
    frequency = self.rope.frequency(self.head_dim, positions)
    q, k = (
      rotary(q, positions, frequency, self.rope.magnitude),
      rotary(k, positions, frequency, self.rope.magnitude),
    )
    if cache is not None:
      cache, k, v = cache.append(start, k, v)
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
  rope: Rope
  dtype: Dtype

  @nn.compact
  def __call__(
    self,
    x: Array,
    positions: Array,
    mask: Array,
    cache: LayerCache | None = None,
    start: Array | None = None,
  ) -> tuple[Array, LayerCache | None]:
    x = constrain_batch(x)
    attend = SelfAttention(
      self.num_heads, self.num_kv_heads, self.head_dim, self.rope, self.dtype, name='attention'
    )
    h = RMSNorm(self.rms_norm_eps, self.dtype, name='attention_norm')(x)
    h, cache = attend(h, positions, mask, cache, start)
    x = x + h
    h = RMSNorm(self.rms_norm_eps, self.dtype, name='mlp_norm')(x)
    x = x + SwiGLU(self.mlp_dim, self.dtype, name='mlp')(h)
    return x, cache


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
  rope_scaling: tuple[tuple[str, Any], ...] | None = None  # the pairs of models/rope.py's dict
  max_position_embeddings: int = 4096
  max_sequence_length: int | None = None  # where it is not what the positions say
  dtype: Dtype = jnp.float32
  remat: str = 'none'
  scan: bool = True  # parameters 'layers' stacked [L, ...], or 'layers_0', 'layers_1', ...

  @property
  def longest(self) -> int:
    """Tokens of the longest sequence that the checkpoint is meant for."""
    scaling = dict(self.rope_scaling or ())
    if self.max_sequence_length is not None:
      return self.max_sequence_length
    if scaling.get('rope_type') == 'dynamic':  # it begins to scale at max_position_embeddings
      return int(scaling['factor'] * self.max_position_embeddings)
    return self.max_position_embeddings

  def setup(self):
    init = nn.initializers.normal(0.02)
    self.embedding = self.param('embedding', init, (self.vocab_size, self.hidden_size))
    self.head = weight(self, 'head', init, (self.hidden_size, self.vocab_size))
    self.norm = RMSNorm(self.rms_norm_eps, self.dtype)
    sizes = dict(
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads,
      head_dim=self.head_dim,
      mlp_dim=self.mlp_dim,
      rms_norm_eps=self.rms_norm_eps,
      rope=Rope(self.rope_theta, self.rope_scaling, self.max_position_embeddings),
      dtype=self.dtype,
    )
    if self.scan:
      self.layers = scan_blocks(Block, self.num_layers, self.remat)(**sizes)
    else:
      self.layers = [Block(**sizes) for _ in range(self.num_layers)]

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
      cache: the new tokens are written at its `length`, and must fit: M >= length + S. Only where layers are unrolled.

    Returns:
      dtype[B, S, H] after the final norm, and the cache with the new tokens (None without one).

    Raises:
      ValueError: a cache, but scanned layers.
    """
    x = embeddings.astype(self.dtype)
    if self.scan:
      if cache is not None:
        raise ValueError('a cache is for unrolled layers; see `unroll_layers`')
      return self.norm(self.layers(x, positions, mask)[0]), None
    start, states = None if cache is None else cache.length, []
    for i, block in enumerate(self.layers):
      x, state = block(x, positions, mask, None if cache is None else cache.layers[i], start)
      states.append(state)
    if cache is not None:
      cache = KVCache(tuple(states), start + embeddings.shape[1])
    return self.norm(x), cache

  def logits(self, hidden: Array) -> Array:
    """[..., H] -> f32[..., V]."""
    return product(hidden, self.head, jnp.float32)

  def init_cache(self, batch: int, max_length: int, dtype: Dtype | None = None) -> KVCache:
    """An empty cache of `max_length` slots a row, in the compute dtype unless told otherwise; int8 has a scale a head and slot."""
    dtype = jnp.dtype(self.dtype if dtype is None else dtype)
    empty = jnp.zeros((batch, self.num_kv_heads, max_length, self.head_dim), dtype)
    if dtype == jnp.int8:
      empty = Int8(empty, jnp.zeros(empty.shape[:-1]))
    return KVCache((LayerCache(empty, empty),) * self.num_layers, jnp.zeros((), jnp.int32))


def unroll_layers(llama: Llama, params: dict) -> tuple[Llama, dict]:
  """The same model with its layers one by one, as decoding wants it, and its parameters in that form (`unstack_layers`)."""
  return llama.clone(scan=False), unstack_layers(
    jax.tree.map(lambda x: x, params)
  ) if 'layers' in params else params  # the caller's stay whole


def unstack_layers(params: dict) -> dict:
  """Parameters of scanned layers -> of unrolled ones: 'layers', stacked [L, ...], becomes 'layers_0', 'layers_1', ...

  Leaves are removed from `params['layers']` as they are taken apart, so that memory never holds two models.
  """

  def rows(leaf: Array) -> list[Array]:  # not list(leaf), which moves a leaf of many devices to one
    return jax.block_until_ready(
      [jax.lax.index_in_dim(leaf, i, keepdims=False) for i in range(len(leaf))]
    )  # before the next is begun

  def apart(stacked: dict) -> list[dict]:
    columns = {}
    for name in list(stacked):
      leaf = stacked.pop(name)
      columns[name] = apart(leaf) if isinstance(leaf, dict) else rows(leaf)
    return [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]

  rest = {name: leaf for name, leaf in params.items() if name != 'layers'}
  return rest | {f'layers_{i}': layer for i, layer in enumerate(apart(params['layers']))}
