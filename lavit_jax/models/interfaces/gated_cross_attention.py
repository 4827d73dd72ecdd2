"""Flamingo's gated cross-attention: layers between those of a language model, which read images.

They stand before every `every`-th layer of LLaMA (`llama.ExtraLayers`), in `GatedLayers` with
parameters of their own: those of LLaMA stay as they are. Their gates begin at 0, so that the
language model begins unchanged.

Source: Alayrac et al. 2022, Flamingo, section 2.2; the sizes and places are OpenFlamingo's.

Text attends to the latest image before it alone. Image A, image B, two texts:

    slot            w  A  w  w  B  w    A, B: [IMG] of the image
    ordinal        -1  0  0  0  1  1
    sees            .  A  A  A  B  B

Axes: R rows, S slots of a row, H width of the language model, B images, M images of a row,
n vectors of an image, W their width, G gated layers, L layers of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.attention import QKV, attend_and_project, attention
from lavit_jax.models.interfaces.base import RowImages
from lavit_jax.models.interfaces.resampler import FeedForward
from lavit_jax.models.layers import Dtype, LayerNorm
from lavit_jax.models.llama import ExtraLayers
from lavit_jax.models.remat import scan_blocks
from lavit_jax.sharding import constrain_batch

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

  hidden_size: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  dtype: Dtype = jnp.float32

  def setup(self):
    """Makes the parameters and submodules."""
    width = self.num_heads * self.head_dim
    self.attn_gate = self.param('attn_gate', nn.initializers.zeros, (1,))
    self.ff_gate = self.param('ff_gate', nn.initializers.zeros, (1,))
    self.norm = LayerNorm(dtype=self.dtype)
    self.query = nn.Dense(width, use_bias=False, dtype=self.dtype)
    self.kv = QKV(width, use_bias=False, dtype=self.dtype, count=2)
    self.proj = nn.Dense(self.hidden_size, use_bias=False, dtype=self.dtype)
    self.mlp = FeedForward(self.mlp_dim, self.dtype)

  def __call__(self, x: Array, images: RowImages) -> tuple[Array, None]:
    """Input x [R, S, H] -> (dtype[R, S, H], None)."""
    return self.read(x, self.project_images(images.vectors), images.ordinal), None

  def project_images(self, vectors: Array) -> tuple[Array, Array]:
    """[R, M, n, W] -> keys and values, dtype[R, M, n, h * d] each."""
    keys, values = self.kv(vectors)
    return keys, values

  def read(self, x: Array, memory: tuple[Array, Array], ordinal: Array) -> Array:
    """The layer, for `ExtraLayers`.

    Args:
      x: [R, S, H].
      memory: of `project_images`.
      ordinal: i32[R, S], the image that a slot sees, -1 for none; or i32[R, 1].

    Returns:
      dtype[R, S, H].
    """
    x = constrain_batch(x)
    keys, values = memory
    rows, num_images, per_image, width = keys.shape
    k = keys.reshape(rows, num_images * per_image, width)
    v = values.reshape(rows, num_images * per_image, width)
    owner = jnp.repeat(jnp.arange(num_images), per_image)
    mask = ordinal[:, None, :, None] == owner
    sees = (ordinal >= 0)[..., None, None]

    def attend(q: Array, k: Array, v: Array) -> Array:
      # A slot that sees no image would average all of them.
      return jnp.where(sees, attention(q, k, v, mask), 0)

    q = self.query(self.norm(x))
    attended = attend_and_project(q, k, v, self.num_heads, attend, self.proj)
    x = x + jnp.tanh(self.attn_gate).astype(self.dtype) * attended
    x = x + jnp.tanh(self.ff_gate).astype(self.dtype) * self.mlp(x)
    self.sow('intermediates', 'stream', x)
    return x


class GatedLayers(nn.Module):
  """All gated layers of a language model, stacked; OpenFlamingo's are (G, H, 8, 64, 4 * H).

  Attributes:
    num_layers: G.
    hidden_size: H.
    num_heads: of the attention.
    head_dim: its width of a head.
    mlp_dim: hidden width of the feed-forward.
    every: each gated layer stands before the last of this many layers of the language model.
    dtype: of the computation.
  """

  num_layers: int
  hidden_size: int
  num_heads: int
  head_dim: int
  mlp_dim: int
  every: int = 1
  dtype: Dtype = jnp.float32

  def setup(self):
    """Makes the submodules."""
    make_blocks = scan_blocks(GatedBlock, self.num_layers)
    self.blocks = make_blocks(**self._block_fields())

  def _block_fields(self) -> dict[str, Any]:
    return dict(
      hidden_size=self.hidden_size,
      num_heads=self.num_heads,
      head_dim=self.head_dim,
      mlp_dim=self.mlp_dim,
      dtype=self.dtype,
    )

  def __call__(self, x: Array, images: RowImages) -> Array:
    """The gated layers one after the other, without those of the language model between them.

    x [R, S, H] -> dtype[R, S, H]. `init` needs it; a language model runs by `extra_layers`.
    """
    return self.blocks(x, images)[0]

  @nn.nowrap
  def extra_layers(self, params: Mapping[str, Any], images: RowImages) -> ExtraLayers:
    """The gated layers for `Llama`, by their parameters; keys and values of images are computed."""
    block = GatedBlock(**self._block_fields(), parent=None)

    def project(params: Mapping[str, Any]) -> Any:
      return block.apply({'params': params}, images.vectors, method='project_images')

    stacked = params['blocks']
    return ExtraLayers(block, self.every, (stacked, jax.vmap(project)(stacked)), images.ordinal)
