"""Visual features inside sequences: compaction, embeddings of slots, left-padded prompts.

Training packs pairs into rows (packing.py); inference pads prompts on the left. In both, `source`
says which slots get a visual feature instead of the embedding of an id.
Specification: Vocabulary (ids, brackets), Inference (prompts).

Axes: B images or prompts, N visual slots of an image, R rows, S slots of a row, H width of the
language model.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lavit_jax.models.vocabulary import PAD_ID

EMBED_ID = -1  # in `source`: the input is the embedding of the id, not a visual feature


def compact(x: Array, keep: Array) -> tuple[Array, Array]:
  """Moves the kept slots of every row to its front, in order; zeros follow them.

      keep  0 1 1 0 1        x     a b c d e
      mask  1 1 1 0 0        out   b c e 0 0

  Args:
    x: [B, N, ...].
    keep: bool[B, N], or a float mask that is above 0.5 where a slot is kept.

  Returns:
    The compacted x [B, N, ...], and the mask bool[B, N] of its kept prefix.
  """
  chex.assert_rank(keep, 2)
  chex.assert_shape(x, (*keep.shape, ...))

  def compact_row(x: Array, keep: Array) -> tuple[Array, Array]:
    num_slots = keep.shape[0]
    slot = jnp.where(keep, jnp.cumsum(keep) - 1, num_slots)
    indices = jnp.arange(num_slots, dtype=jnp.int32)
    # Indices are scattered and rows gathered: a gather of wide rows is the faster of the two.
    order = jnp.zeros(num_slots, jnp.int32).at[slot].set(indices, mode='drop')
    mask = jnp.arange(num_slots) < keep.sum()
    mask_of_x = mask.reshape(num_slots, *[1] * (x.ndim - 1))
    return jnp.where(mask_of_x, x[order], jnp.zeros((), x.dtype)), mask

  return jax.vmap(compact_row)(x, keep > 0.5)


def embed_sources(text_embeddings: Array, source: Array, features: Array) -> Array:
  """Replaces the embeddings of the slots that name a visual feature.

  Args:
    text_embeddings: [R, S, H], the embeddings of the ids.
    source: i32[R, S], the row of the flattened features or `EMBED_ID`
      (`packing.PackedBatch.source`, `Prompts.source`).
    features: [B, N, H], compacted.

  Returns:
    [R, S, H] in the dtype of `text_embeddings`.
  """
  chex.assert_rank(features, 3)
  chex.assert_shape(text_embeddings, (*source.shape, features.shape[-1]))
  rows = features.reshape(-1, features.shape[-1]).astype(text_embeddings.dtype)
  return jnp.where((source >= 0)[..., None], rows[jnp.maximum(source, 0)], text_embeddings)


# --- Prompts -------------------------------------------------------------------------------------

Prompt = Sequence[Sequence[int]]  # pieces: ids, or a `range` of rows of the visual features


class Prompts(NamedTuple):
  """Left-padded prompts on the host.

  Attributes:
    ids: i32[B, S]; the padding id in padding and at visual slots.
    source: i32[B, S]; the row of the flattened features that is the input of a slot, or `EMBED_ID`.
    mask: bool[B, S]; False in padding.
  """

  ids: np.ndarray
  source: np.ndarray
  mask: np.ndarray


def layout_prompts(
  prompts: Sequence[Prompt], *, pad_id: int = PAD_ID, multiple: int = 32
) -> Prompts:
  """Left-pads prompts to one bucketed length, so that a new length seldom means a new compilation.

  A prompt is a list of pieces. A piece is a sequence of ids, or a `range` of rows of the flattened
  visual features:

      [[vocabulary.image_start], range(0, 84), [vocabulary.image_end], tokenizer.encode('What ...')]

  Args:
    prompts: B lists of pieces.
    pad_id: id of the padding.
    multiple: S is the longest prompt rounded up to a multiple of this.
  """
  lengths = [sum(len(piece) for piece in pieces) for pieces in prompts]
  length = -(-max(lengths) // multiple) * multiple
  shape = (len(prompts), length)
  padded = Prompts(
    ids=np.full(shape, pad_id, np.int32),
    source=np.full(shape, EMBED_ID, np.int32),
    mask=np.zeros(shape, bool),
  )
  for row, pieces in enumerate(prompts):
    slot = length - lengths[row]
    padded.mask[row, slot:] = True
    for piece in pieces:
      field = padded.source if isinstance(piece, range) else padded.ids
      field[row, slot : slot + len(piece)] = piece
      slot += len(piece)
  return padded


def prompt_mask(mask: Array) -> Array:
  """Causal attention over left-padded prompts: bool[B, S] to bool[B, 1, S, S], keys across.

  mask  0 0 1 1 1

     0  . . . . .    padding sees nothing, and no token sees padding
     0  . . . . .
     1  . . x . .
     1  . . x x .
     1  . . x x x

  """
  slots = jnp.arange(mask.shape[-1])
  return mask[:, None, None, :] & (slots[:, None] >= slots)


def prompt_positions(mask: Array) -> Array:
  """Positions that restart at 0 after the left padding: bool[B, S] to i32[B, S], 0 in padding."""
  return jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)


def embed_prompts(
  prompts: Sequence[Prompt],
  embed: Callable[[Array], Array],
  features: Array | None = None,
  *,
  pad_id: int = PAD_ID,
  multiple: int = 32,
) -> tuple[Array, Array, Array]:
  """Embeds prompts of interleaved text and visual features for `inference.decode`.

  Args:
    prompts: B lists of pieces, see `layout_prompts`.
    embed: ids i32[B, S] to embeddings [B, S, H].
    features: [B', N, H] compacted visual features, which the ranges index once they are flattened;
      None without images.
    pad_id: id of the padding.
    multiple: of the length S.

  Returns:
    embeddings [B, S, H], mask bool[B, S], positions i32[B, S].
  """
  padded = layout_prompts(prompts, pad_id=pad_id, multiple=multiple)
  # `jnp.asarray` and plain calls would compile a program for each of many operations.
  embeddings = embed(jax.device_put(padded.ids))
  if features is not None:
    embeddings = jax.jit(embed_sources)(embeddings, padded.source, features)
  mask = jax.device_put(padded.mask)
  return embeddings, mask, jax.jit(prompt_positions)(mask)
