"""The language model: LLaMA over embeddings (specification, Language model), in two forms.

Training scans over stacked layers, which compiles one of them. Decoding has the layers one by one
(`unroll_layers`), each with its own parameters and cache: a scan would copy them from the stack at
every token. Both forms share every block.

Axes: L layers, B rows, S new tokens, M slots of the cache, K keys (S without a cache, M with one),
H width, G key-value heads, d head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lavit_jax.models.attention import attention_by_blocks, merge_heads, split_heads
from lavit_jax.models.attention_kernels import packed_attention
from lavit_jax.models.int8 import Int8, Linear, dequantize, product, quantize, weight
from lavit_jax.models.layers import Dtype, RMSNorm, SwiGLU
from lavit_jax.models.remat import REMAT_POLICIES, SAVED_PROJ, SAVED_QKV, scan_blocks
from lavit_jax.models.rope import Rope, rotary
from lavit_jax.sharding import constrain_batch


class LayerCache(NamedTuple):
  """Keys (rotated) and values of one layer; the scale of an Int8 is f32[B, G, M].

  They are head-major: a decoding step multiplies them as they lie in memory.
  """

  k: Array | Int8  # [B, G, M, d]
  v: Array | Int8  # [B, G, M, d]

  def append(self, start: Array, k: Array, v: Array) -> tuple[LayerCache, Array, Array]:
    """Writes new keys and values.

    Args:
      start: i32[], the first slot to write.
      k: [B, S, G, d].
      v: [B, S, G, d].

    Returns:
      The new cache, and all its keys and values [B, M, G, d] in the dtypes of k and v.
    """
    new_k = _write_slots(self.k, start, k)
    new_v = _write_slots(self.v, start, v)
    return LayerCache(new_k, new_v), _read_slots(new_k, k.dtype), _read_slots(new_v, v.dtype)


def _write_slots(cache: Array | Int8, start: Array, new: Array) -> Array | Int8:
  new = new.swapaxes(1, 2)
  stored = quantize(new) if isinstance(cache, Int8) else new.astype(cache.dtype)
  return jax.tree.map(
    lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 2), cache, stored
  )


def _read_slots(cache: Array | Int8, dtype: Dtype) -> Array:
  return dequantize(cache, dtype).swapaxes(1, 2)


class KVCache(NamedTuple):
  """Keys and values of the tokens so far."""

  layers: tuple[LayerCache, ...]
  length: Array  # i32[]; slots written, the same for all rows: masks hide those of padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExtraLayers:
  """G layers of another module between LLaMA's own, such as those by which Flamingo sees images.

  Each runs before the last of every `every` layers of LLaMA.

  Attributes:
    block: one of them: its method `read` takes x [B, S, H], a memory and `slots`, and returns x.
    every: L / G.
    layers: (parameters, memory) of the layers: a stack of leaves [G, ...], or, for an unrolled
      LLaMA, a tuple of G (`unrolled`). The leaves of a memory have rows B.
    slots: [B, S], what each token reads of the memory; [B, 1] if all of a row read the same.
  """

  block: nn.Module = dataclasses.field(metadata=dict(static=True))
  every: int = dataclasses.field(metadata=dict(static=True))
  layers: Any
  slots: Array

  def run(self, x: Array, layer: tuple[Any, Any]) -> Array:
    """Runs one of the layers on x [B, S, H]."""
    params, memory = layer
    return self.block.apply({'params': params}, x, memory, self.slots, method='read')  # pyright: ignore[reportReturnType]

  def run_before(self, number: int, x: Array) -> Array:
    """Runs the layer before layer `number` of an unrolled LLaMA, if there is one."""
    group, place = divmod(number, self.every)
    return self.run(x, self.layers[group]) if place == self.every - 1 else x

  def unrolled(self) -> ExtraLayers:
    """The layers one by one; see `unroll_layers`."""
    if isinstance(self.layers[0], tuple):
      return self
    count = len(jax.tree.leaves(self.layers)[0])
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], self.layers) for i in range(count)]
    return dataclasses.replace(self, layers=tuple(layers))

  def for_new_tokens(self) -> ExtraLayers:
    """New tokens read what the last token of their row reads."""
    return dataclasses.replace(self, slots=self.slots[:, -1:])

  def repeat_rows(self, times: int) -> ExtraLayers:
    """Each row `times` times, of unrolled layers."""

    def repeat(leaf: Array) -> Array:
      return jnp.repeat(leaf, times, axis=0)

    layers = tuple((params, jax.tree.map(repeat, memory)) for params, memory in self.layers)
    return dataclasses.replace(self, layers=layers, slots=repeat(self.slots))


class SelfAttention(nn.Module):
  """Causal self-attention under a mask, with rotary positions and grouped key-value heads."""

  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope: Rope
  dtype: Dtype

  @nn.compact
  def __call__(
    self, x: Array, positions: Array, mask: Array, cache: LayerCache | None, start: Array | None
  ) -> tuple[Array, LayerCache | None]:
    """Input x [B, S, H] -> (dtype[B, S, H], cache); see `Llama.__call__`."""

    def heads(num_heads: int, name: str) -> Array:
      projected = Linear(num_heads * self.head_dim, self.dtype, name=name)(x)
      return split_heads(projected, num_heads)

    q = heads(self.num_heads, 'query')
    k = heads(self.num_kv_heads, 'key')
    v = heads(self.num_kv_heads, 'value')
    frequency = self.rope.frequency(self.head_dim, positions)
    q = rotary(q, positions, frequency, self.rope.magnitude)
    k = rotary(k, positions, frequency, self.rope.magnitude)
    if cache is not None:
      assert start is not None
      cache, k, v = cache.append(start, k, v)
    q, k, v = (checkpoint_name(y.astype(self.dtype), SAVED_QKV) for y in (q, k, v))
    attend = attention_by_blocks if mask.dtype == bool else packed_attention
    attended = merge_heads(attend(q, k, v, mask))
    out = Linear(x.shape[-1], self.dtype, name='proj')(attended)
    return checkpoint_name(out, SAVED_PROJ), cache


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
    """Input x [B, S, H] -> (dtype[B, S, H], cache); see `Llama.__call__`."""
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
  """LLaMA, from embeddings to final hidden states; `embed` and `logits` are its (untied) ends."""

  vocab_size: int
  hidden_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  rms_norm_eps: float = 1e-5
  rope_theta: float = 1e4
  rope_scaling: tuple[tuple[str, Any], ...] | None = None  # items of `rope.check_scaling`'s dict
  max_position_embeddings: int = 4096
  max_sequence_length: int | None = None  # in place of the length that the positions give
  dtype: Dtype = jnp.float32
  remat: str = 'none'
  scan: bool = True  # parameters 'layers' stacked [L, ...], or 'layers_0', 'layers_1', ...

  @property
  def longest(self) -> int:
    """Tokens of the longest sequence that the checkpoint supports."""
    if self.max_sequence_length is not None:
      return self.max_sequence_length
    scaling = dict(self.rope_scaling or ())
    if scaling.get('rope_type') == 'dynamic':  # scaling begins at max_position_embeddings
      return int(scaling['factor'] * self.max_position_embeddings)
    return self.max_position_embeddings

  def setup(self):
    """Makes the parameters and submodules."""
    init = nn.initializers.normal(0.02)
    self.embedding = self.param('embedding', init, (self.vocab_size, self.hidden_size))
    self.head = weight(self, 'head', init, (self.hidden_size, self.vocab_size))
    self.norm = RMSNorm(self.rms_norm_eps, self.dtype)
    if self.scan:
      stack = scan_blocks(Block, self.num_layers, self.remat)
      self.layers: Any = stack(**self._block_fields())
    else:
      self.layers = [Block(**self._block_fields()) for _ in range(self.num_layers)]

  def _block_fields(self) -> dict[str, Any]:
    return dict(
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads,
      head_dim=self.head_dim,
      mlp_dim=self.mlp_dim,
      rms_norm_eps=self.rms_norm_eps,
      rope=Rope(self.rope_theta, self.rope_scaling, self.max_position_embeddings),
      dtype=self.dtype,
    )

  def embed(self, ids: Array) -> Array:
    """Ids i32[...] in [0, V) -> dtype[..., H]."""
    return self.embedding[ids].astype(self.dtype)

  def __call__(
    self,
    embeddings: Array,
    positions: Array,
    mask: Array,
    cache: KVCache | None = None,
    extra: ExtraLayers | None = None,
  ) -> tuple[Array, KVCache | None]:
    """Runs the layers.

    Args:
      embeddings: [B, S, H].
      positions: i32[B, S], rotary positions.
      mask: bool[B, 1, S, K], the keys that each query may see, causality included
        (`sequence.prompt_mask`); a query that may see none gets finite numbers without meaning.
        Or i32[B, S], the segments of packed rows.
      cache: the new tokens are written at its `length`, and must fit: M >= length + S. Only
        unrolled layers take one.
      extra: layers between these, scanned or unrolled as these are.

    Returns:
      dtype[B, S, H] after the final norm, and the cache with the new tokens (None without one).

    Raises:
      ValueError: a cache, but scanned layers; extra layers of a number that does not fit.
    """
    chex.assert_rank(embeddings, 3)
    chex.assert_shape(positions, embeddings.shape[:2])
    chex.assert_rank(mask, {2, 4})
    x = embeddings.astype(self.dtype)
    if extra is not None:
      self._check_extra(extra)
    if self.scan:
      if cache is not None:
        raise ValueError('a cache is for unrolled layers; see `unroll_layers`')
      if extra is None:
        x, _ = self.layers(x, positions, mask)
      else:
        x = self._run_groups(x, positions, mask, extra)
      return self.norm(x), None
    old_layers = [None] * self.num_layers if cache is None else cache.layers
    start = None if cache is None else cache.length
    layers = []
    for number, (block, layer) in enumerate(zip(self.layers, old_layers, strict=True)):
      if extra is not None:
        x = extra.run_before(number, x)
      x, layer = block(x, positions, mask, layer, start)
      layers.append(layer)
    if cache is None:
      return self.norm(x), None
    return self.norm(x), KVCache(tuple(layers), cache.length + embeddings.shape[1])

  def _check_extra(self, extra: ExtraLayers) -> None:
    count = len(jax.tree.leaves(extra.layers)[0]) if self.scan else len(extra.layers)
    if count * extra.every != self.num_layers:
      raise ValueError(
        f'{count} extra layers before every {extra.every} layers do not fit {self.num_layers} '
        'layers'
      )

  def _run_groups(self, x: Array, positions: Array, mask: Array, extra: ExtraLayers) -> Array:
    """One scan over G groups: `every - 1` layers, an extra one, and one more layer."""
    block = Block(**self._block_fields(), parent=None)

    def run_block(x: Array, params: Any) -> Array:
      return block.apply({'params': params}, x, positions, mask)[0]

    run_extra = extra.run
    if self.remat != 'none':
      policy = REMAT_POLICIES[self.remat]
      run_block = jax.checkpoint(run_block, policy=policy, prevent_cse=False)
      run_extra = jax.checkpoint(run_extra, policy=policy, prevent_cse=False)

    def run_group(x: Array, group: tuple[Any, Any]) -> tuple[Array, None]:
      layers, extra_layer = group
      for place in range(extra.every):
        if place == extra.every - 1:
          x = run_extra(x, extra_layer)
        x = run_block(x, jax.tree.map(lambda leaf, i=place: leaf[i], layers))
      return x, None

    groups = jax.tree.map(
      lambda leaf: leaf.reshape(-1, extra.every, *leaf.shape[1:]), self.layers.variables['params']
    )
    return jax.lax.scan(run_group, x, (groups, extra.layers))[0]

  def logits(self, hidden: Array) -> Array:
    """[..., H] -> f32[..., V]."""
    return product(hidden, self.head, jnp.float32)

  def init_cache(self, batch: int, max_length: int, dtype: Dtype | None = None) -> KVCache:
    """An empty cache.

    Args:
      batch: number of rows.
      max_length: M.
      dtype: the compute dtype by default; int8 has a scale for each head and slot.
    """
    dtype = jnp.dtype(self.dtype if dtype is None else dtype)
    empty = jnp.zeros((batch, self.num_kv_heads, max_length, self.head_dim), dtype)
    if dtype == jnp.int8:
      empty = Int8(empty, jnp.zeros(empty.shape[:-1]))
    return KVCache((LayerCache(empty, empty),) * self.num_layers, jnp.zeros((), jnp.int32))


def unroll_layers(llama: Llama, params: dict) -> tuple[Llama, dict]:
  """The model with its layers one by one, for decoding, and its parameters in that form.

  The caller's parameters stay complete; see `unstack_layers`.
  """
  unrolled = llama.clone(scan=False)
  if 'layers' not in params:
    return unrolled, params
  copied_dicts = jax.tree.map(lambda x: x, params)
  return unrolled, unstack_layers(copied_dicts)


def unstack_layers(params: dict) -> dict:
  """Parameters of scanned layers -> of unrolled ones.

  'layers', stacked [L, ...], becomes 'layers_0', 'layers_1', ... Leaves are removed from
  `params['layers']` as they are split, so that memory never holds two models.
  """
  unstacked = {name: leaf for name, leaf in params.items() if name != 'layers'}
  for i, layer in enumerate(_split_tree(params['layers'])):
    unstacked[f'layers_{i}'] = layer
  return unstacked


def _split_tree(stacked: dict) -> list[dict]:
  """One tree a layer of a tree of stacked leaves, which is emptied."""
  by_name = {}
  for name in list(stacked):
    leaf = stacked.pop(name)
    by_name[name] = _split_tree(leaf) if isinstance(leaf, dict) else _split_leaf(leaf)
  return [dict(zip(by_name, layer, strict=True)) for layer in zip(*by_name.values(), strict=True)]


def _split_leaf(leaf: Array) -> list[Array]:
  # Not list(leaf), which moves a leaf of many devices to one. Waiting bounds the memory: the
  # stacked leaf is freed before the next one is split.
  layers = [jax.lax.index_in_dim(leaf, i, keepdims=False) for i in range(len(leaf))]
  return jax.block_until_ready(layers)
