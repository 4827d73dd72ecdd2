"""Flamingo's gated cross-attention: layers between those of a language model, which read images.

They stand before every `every`-th layer of LLaMA, in `GatedLayers` with parameters of their own:
those of LLaMA stay as they are. Their gates begin at 0, so that the language model begins
unchanged.

Source: Alayrac et al. 2022, Flamingo, section 2.2; the sizes and places are OpenFlamingo's.

Text attends to the latest image before it alone. Image A, image B, two texts:

    slot            w  A  w  w  B  w    A, B: [IMG] of the image
    ordinal        -1  0  0  0  1  1
    sees            .  A  A  A  B  B

Axes: R rows, S slots of a row, H width of the language model, B images, M images of a row,
n vectors of an image, W their width, G gated layers, L layers of the language model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.attention import QKV, attend_and_project, attention
from lavit_jax.models.interfaces.resampler import FeedForward
from lavit_jax.models.layers import Dtype, LayerNorm
from lavit_jax.models.llama import Block, KVCache, Llama
from lavit_jax.models.remat import REMAT_POLICIES, scan_blocks
from lavit_jax.models.rope import Rope


class RowImages(NamedTuple):
  """The images of packed rows or prompts.

  Attributes:
    vectors: dtype[R, M, n, W]; rows with fewer images have zeros.
    ordinal: i32[R, S], which of them a slot sees; -1 for none.
  """

  vectors: Array
  ordinal: Array


# --- Which image a slot sees ---------------------------------------------------------------------


def latest_image(starts: Array, segments: Array) -> Array:
  """The number of the latest image in the row, of the slot's own segment.

  Args:
    starts: bool[R, S], where an image begins: the slots of [IMG].
    segments: i32[R, S] of packed rows, or bool[R, S], False in padding.

  Returns:
    i32[R, S]; -1 before the first image of a segment, and in empty slots.
  """
  count = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
  begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  # The images before a segment, at its first slot and from there on.
  before = jax.lax.cummax(jnp.where(begins, count - starts, 0), axis=1)
  return jnp.where((count > before) & (segments > 0), count - 1, -1)


def gather_images(vectors: Array, images: Array, ordinal: Array, num_images: int) -> RowImages:
  """Puts the vectors of each row's images side by side.

  Args:
    vectors: [B, n, W], of a batch.
    images: i32[R, S], the image that each slot sees, where `ordinal` is not negative.
    ordinal: i32[R, S], see `latest_image`.
    num_images: M. Slots that see a later image of the row see none; count them by
      `count_unseen`.
  """
  rows = jnp.arange(len(ordinal))[:, None]
  place = jnp.where((ordinal >= 0) & (ordinal < num_images), ordinal, num_images)
  index = jnp.full((len(ordinal), num_images), -1, jnp.int32)
  index = index.at[rows, place].set(images, mode='drop')
  gathered = jnp.where((index >= 0)[..., None, None], vectors[jnp.maximum(index, 0)], 0)
  return RowImages(gathered, jnp.where(ordinal < num_images, ordinal, -1))


def count_unseen(ordinal: Array, num_images: int) -> Array:
  """How many slots see no image because their row has more than M, i32[]."""
  return (ordinal >= num_images).sum(dtype=jnp.int32)


# --- Modules -------------------------------------------------------------------------------------


class GatedBlock(nn.Module):
  """x + tanh(a) attention(x, image), then x + tanh(b) feed_forward(x); pre-norm.

  It sows its output as the intermediate 'stream' [R, S, H].
  """

  num_heads: int
  head_dim: int
  mlp_dim: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, images: RowImages) -> tuple[Array, None]:
    """Input x [R, S, H] -> (dtype[R, S, H], None)."""
    rows, num_images, per_image, image_width = images.vectors.shape
    attn_gate = self.param('attn_gate', nn.initializers.zeros, (1,))
    ff_gate = self.param('ff_gate', nn.initializers.zeros, (1,))
    width = self.num_heads * self.head_dim
    y = LayerNorm(dtype=self.dtype, name='norm')(x)
    q = nn.Dense(width, use_bias=False, dtype=self.dtype, name='query')(y)
    media = images.vectors.reshape(rows, num_images * per_image, image_width)
    k, v = QKV(width, use_bias=False, dtype=self.dtype, count=2, name='kv')(media)
    owner = jnp.repeat(jnp.arange(num_images), per_image)
    mask = images.ordinal[:, None, :, None] == owner
    sees = (images.ordinal >= 0)[..., None]

    def attend(q: Array, k: Array, v: Array) -> Array:
      # A slot that sees no image would average all of them.
      return jnp.where(sees[..., None], attention(q, k, v, mask), 0)

    project = nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name='proj')
    attended = attend_and_project(q, k, v, self.num_heads, attend, project)
    x = x + jnp.tanh(attn_gate).astype(self.dtype) * attended
    fed = FeedForward(self.mlp_dim, self.dtype, name='mlp')(x)
    x = x + jnp.tanh(ff_gate).astype(self.dtype) * fed
    self.sow('intermediates', 'stream', x)
    return x, None


class GatedLayers(nn.Module):
  """All gated layers of a language model, stacked; OpenFlamingo's are (L // every, 8, 64, 4 * H).

  Attributes:
    num_layers: G.
    num_heads: of the attention.
    head_dim: its width of a head.
    mlp_dim: hidden width of the feed-forward.
    every: each gated layer stands before the last of this many layers of the language model.
    dtype: of the computation.
  """

  num_layers: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  every: int = 1
  dtype: Dtype = jnp.float32

  def setup(self):
    """Makes the submodules."""
    make_blocks = scan_blocks(GatedBlock, self.num_layers)
    self.blocks = make_blocks(self.num_heads, self.head_dim, self.mlp_dim, self.dtype)

  def __call__(self, x: Array, images: RowImages) -> Array:
    """The gated layers one after the other, without those of the language model between them.

    x [R, S, H] -> dtype[R, S, H]. `init` needs it; a language model runs by `run_gated`.
    """
    return self.blocks(x, images)[0]


# --- The language model with them ----------------------------------------------------------------


def run_gated(
  llama: Llama,
  params: Mapping[str, Any],
  gated: GatedLayers,
  gated_params: Mapping[str, Any],
  embeddings: Array,
  positions: Array,
  mask: Array,
  images: RowImages,
  cache: KVCache | None = None,
) -> tuple[Array, KVCache | None]:
  """`Llama.__call__` with gated layers.

  Scanned layers run as one scan over G groups, unrolled ones (decoding) one by one.

  Args:
    llama: the language model.
    params: its parameters, in the form that `llama.scan` says.
    gated: the gated layers; G * every is L.
    gated_params: their parameters.
    embeddings: [R, S, H].
    positions: as in `Llama.__call__`.
    mask: as in `Llama.__call__`.
    images: what the slots see.
    cache: as in `Llama.__call__`.

  Returns:
    As `Llama.__call__`: dtype[R, S, H] after the final norm, and the cache.

  Raises:
    ValueError: the layers do not divide; a cache, but scanned layers.
  """
  if gated.num_layers * gated.every != llama.num_layers:
    raise ValueError(
      f'{gated.num_layers} gated layers before every {gated.every} layers do not fit '
      f'{llama.num_layers} layers'
    )
  if llama.scan and cache is not None:
    raise ValueError('a cache is for unrolled layers; see `unroll_layers`')
  run_block = functools.partial(_run_block, _block(llama), positions, mask)
  run_gate = functools.partial(_run_gate, gated, images)
  x = embeddings.astype(llama.dtype)
  norm: Any = functools.partial(
    llama.apply, {'params': params}, method=lambda module, x: module.norm(x)
  )
  if llama.scan:
    return norm(_run_groups(llama, params, gated, gated_params, x, run_block, run_gate)), None
  layers = []
  for number in range(llama.num_layers):
    group, place = divmod(number, gated.every)
    if place == gated.every - 1:
      x = run_gate(x, jax.tree.map(lambda leaf, i=group: leaf[i], gated_params['blocks']))
    layer_cache = None if cache is None else cache.layers[number]
    start = None if cache is None else cache.length
    x, layer_cache = run_block(x, params[f'layers_{number}'], layer_cache, start)
    layers.append(layer_cache)
  if cache is None:
    return norm(x), None
  return norm(x), KVCache(tuple(layers), cache.length + embeddings.shape[1])


def _block(llama: Llama) -> Block:
  rope = Rope(llama.rope_theta, llama.rope_scaling, llama.max_position_embeddings)
  return Block(
    llama.num_heads,
    llama.num_kv_heads,
    llama.head_dim,
    llama.mlp_dim,
    llama.rms_norm_eps,
    rope,
    llama.dtype,
  )


def _run_block(block: Block, positions: Array, mask: Array, x: Array, params: Any, *cache: Any):
  return block.apply({'params': params}, x, positions, mask, *cache)


def _run_gate(gated: GatedLayers, images: RowImages, x: Array, params: Any) -> Array:
  block = GatedBlock(gated.num_heads, gated.head_dim, gated.mlp_dim, gated.dtype)
  return block.apply({'params': params}, x, images)[0]


def _run_groups(llama, params, gated, gated_params, x, run_block, run_gate) -> Array:
  """One scan over the groups: `every - 1` layers, a gated layer, and one more layer."""
  groups = jax.tree.map(
    lambda leaf: leaf.reshape(gated.num_layers, gated.every, *leaf.shape[1:]), params['layers']
  )
  if llama.remat != 'none':
    policy = REMAT_POLICIES[llama.remat]
    run_block = jax.checkpoint(run_block, policy=policy, prevent_cse=False)
    run_gate = jax.checkpoint(run_gate, policy=policy, prevent_cse=False)

  def run_group(x: Array, inputs: tuple[Any, Any]) -> tuple[Array, None]:
    layers, gate = inputs
    for place in range(gated.every):
      if place == gated.every - 1:
        x = run_gate(x, gate)
      x, _ = run_block(x, jax.tree.map(lambda leaf, i=place: leaf[i], layers))
    return x, None

  return jax.lax.scan(run_group, x, (groups, gated_params['blocks']))[0]
