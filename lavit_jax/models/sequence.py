"""Text and visual tokens become one sequence: packed rows to train on, left-padded rows to continue.

Specification: Vocabulary (ids, brackets), Training (what the loss covers), Inference (prompts).

Axis letters: B pairs, N visual slots a pair, T text slots a pair, L = T + N + 3 tokens a pair at most, R packed rows,
S slots a row, H width of the language model.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

IMAGE_TO_TEXT, TEXT_TO_IMAGE, TEXT_ONLY = range(3)


class Vocabulary(NamedTuple):
  """One id space for words and codes: text, then [IMG], [/IMG], then one id a code (specification, Vocabulary)."""

  text_size: int
  codebook_size: int

  @property
  def image_start(self) -> int:
    return self.text_size

  @property
  def image_end(self) -> int:
    return self.text_size + 1

  @property
  def code_offset(self) -> int:
    return self.text_size + 2

  @property
  def size(self) -> int:
    return self.text_size + 2 + self.codebook_size


class PackedBatch(NamedTuple):
  """Rows of several pairs each. All fields are [R, S] but the last two, which are scalars."""

  ids: Array  # i32; a code id stands at visual positions too, 0 in empty slots.
  source: Array  # i32; row of the flattened [B * N, H] compacted features that is the input here, -1: embed `ids`.
  positions: Array  # i32; restart at 0 with every pair.
  segments: Array  # i32; 1 + index of the pair in the batch, 0 in empty slots.
  targets: Array  # i32; the next id of the same pair, 0 where there is none.
  weights: Array  # f32; loss weight of the target, 0 where there is none.
  overflow: Array  # i32[]; pairs that found no room and were dropped.
  used: Array  # f32[]; share of the slots that hold a token.


def compact(x: Array, keep: Array) -> tuple[Array, Array]:
  """Moves the kept slots of every row to its front, in order; zeros behind them.

      keep  0 1 1 0 1        x     a b c d e
      mask  1 1 1 0 0        out   b c e 0 0

  Args:
    x: [B, N, ...].
    keep: bool[B, N], or a float mask that is above 0.5 where kept.

  Returns:
    x compacted to a prefix, [B, N, ...], and the mask bool[B, N] of that prefix.
  """

  def compact_row(x, keep):
    n = keep.shape[0]
    slot = jnp.where(keep, jnp.cumsum(keep) - 1, n)
    order = jnp.zeros(n, jnp.int32).at[slot].set(jnp.arange(n, dtype=jnp.int32), mode='drop')
    mask = jnp.arange(n) < keep.sum()
    # Indices are scattered and rows gathered: a gather of wide rows is the faster of the two.
    return jnp.where(
      mask.reshape((n,) + (1,) * (x.ndim - 1)), x[order], jnp.zeros((), x.dtype)
    ), mask

  return jax.vmap(compact_row)(x, keep > 0.5)


def assign_rows(lengths: Array, num_rows: int, row_length: int) -> tuple[Array, Array]:
  """Gives each length, in order, to the first row with room left.

  Args:
    lengths: i32[B].

  Returns:
    row i32[B], `num_rows` where no row had room, and start i32[B] within the row.
  """

  def place(fill, length):
    fits = fill + length <= row_length
    row = jnp.where(fits.any(), jnp.argmax(fits), num_rows)
    start = fill[
      row
    ]  # Out of bounds clamps on reading and drops on writing: a pair without a row changes nothing.
    return fill.at[row].add(length, mode='drop'), (row, start)

  _, placed = jax.lax.scan(place, jnp.zeros(num_rows, jnp.int32), lengths.astype(jnp.int32))
  return placed


class _Pair(NamedTuple):
  """The tokens of one pair in order, [L]; `length` of them count."""

  ids: Array
  source: Array
  targets: Array
  weights: Array
  length: Array


def _lay_out(
  text,
  text_length,
  text_weight,
  kind,
  codes,
  visual_length,
  *,
  vocabulary,
  bos_id,
  eos_id,
  image_loss,
) -> _Pair:
  """One pair as a line of tokens; see `pack_pairs` for the three kinds."""
  p = jnp.arange(text.shape[0] + codes.shape[0] + 3)
  has_image = kind != TEXT_ONLY
  length = text_length + jnp.where(has_image, visual_length + 3, 2)
  # Indices into the text, and into the codes, where -1 is [IMG] and visual_length is [/IMG].
  t = p - jnp.select([kind == IMAGE_TO_TEXT, kind == TEXT_TO_IMAGE], [visual_length + 2, 0], 1)
  v = p - jnp.where(kind == TEXT_TO_IMAGE, text_length, 0) - 1
  is_text = (t >= 0) & (t < text_length)
  is_image = has_image & (v >= -1) & (v <= visual_length)
  is_code = is_image & (v >= 0) & (v < visual_length)
  is_end = p == length - 1

  def at(x, index):
    return x[jnp.clip(index, 0, x.shape[0] - 1)]

  ids = jnp.select(
    [is_text, is_code, is_image & (v < 0), is_image, is_end, p == 0],
    [
      at(text, t),
      at(codes, v) + vocabulary.code_offset,
      vocabulary.image_start,
      vocabulary.image_end,
      eos_id,
      bos_id,
    ],
  )
  # What it costs to miss each token. The end costs as much as the word it ends, so that an answer learns to stop.
  if text_weight.shape[0] > text.shape[0]:
    next_weight = text_weight[text_length]
    start_weight = next_weight
  else:
    next_weight = at(text_weight, text_length - 1)
    start_weight = 1.0
  is_drawn = kind == TEXT_TO_IMAGE
  image_weight = jnp.where(is_drawn, jnp.where(v < 0, start_weight, 1.0), float(image_loss))
  end_weight = jnp.where(is_drawn, 1.0, next_weight)
  weight = jnp.select(
    [is_text, is_image, is_end], [at(text_weight, t), image_weight, end_weight], 0.0
  )

  has_next = p < length - 1
  return _Pair(
    ids=ids.astype(jnp.int32),
    source=jnp.where(is_code & (kind == IMAGE_TO_TEXT), v, -1).astype(jnp.int32),
    targets=jnp.where(has_next, jnp.roll(ids, -1), 0).astype(jnp.int32),
    weights=jnp.where(has_next, jnp.roll(weight, -1), 0.0).astype(jnp.float32),
    length=length,
  )


def pack_pairs(
  text: Array,
  text_length: Array,
  text_weight: Array,
  kind: Array,
  codes: Array,
  visual_length: Array,
  vocabulary: Vocabulary,
  *,
  num_rows: int,
  row_length: int,
  image_loss: bool = False,
  bos_id: int = 1,
  eos_id: int = 2,
) -> PackedBatch:
  """Packs pairs into rows, first fit in the order of the batch; pure, static shapes, no communication.

      kind 0, image to text   [IMG] v v v [/IMG] w w w eos    v: continuous features through `source`
      kind 1, text to image   w w w [IMG] c c c [/IMG] eos    c: code ids
      kind 2, text only       bos w w w eos

  The loss covers the text by `text_weight` (eos by that of the last word), in kind 1 also [IMG], the codes, [/IMG] and
  eos, and in kind 0 the codes and [/IMG] with `image_loss` (specification, Training). The first token of a pair is never a
  target.

  Where a text was cut it does not end, and nothing may teach that it does: `text_weight` f32[B, T + 1] says at
  index text_length what the token behind the text weighs (eos, or [IMG] in kind 1), which is 0 behind a cut.

  Args:
    text: i32[B, T]; text_length: i32[B]; text_weight: f32[B, T + 1], or f32[B, T] if no text was cut.
    kind: i32[B], 0, 1 or 2 as above.
    codes: i32[B, N], compacted; visual_length: i32[B], ignored in kind 2.

  Returns:
    Packed rows. A pair that finds no room is left out whole and counted in `overflow`.
  """
  batch, capacity = codes.shape

  def lay_out(*pair):
    return _lay_out(
      *pair, vocabulary=vocabulary, bos_id=bos_id, eos_id=eos_id, image_loss=image_loss
    )

  pairs = jax.vmap(lay_out)(text, text_length, text_weight, kind, codes, visual_length)
  pair = jnp.arange(batch, dtype=jnp.int32)[:, None]
  source = jnp.where(pairs.source >= 0, pair * capacity + pairs.source, -1)

  row, start = assign_rows(pairs.length, num_rows, row_length)
  p = jnp.arange(pairs.ids.shape[1], dtype=jnp.int32)
  dropped = row == num_rows
  slot = (row * row_length + start)[:, None] + p
  slot = jnp.where((p < pairs.length[:, None]) & ~dropped[:, None], slot, num_rows * row_length)
  # One scatter tells every slot its token; all fields are then gathers.
  token = (
    jnp.full(num_rows * row_length, -1)
    .at[slot]
    .set(jnp.arange(slot.size).reshape(slot.shape), mode='drop')
  )
  token = token.reshape(num_rows, row_length)

  def take(field, empty=0):
    field = jnp.broadcast_to(field, slot.shape).reshape(-1)
    return jnp.where(token >= 0, field[token], jnp.asarray(empty, field.dtype))

  return PackedBatch(
    ids=take(pairs.ids),
    source=take(source, -1),
    positions=take(p),
    segments=take(pair + 1),
    targets=take(pairs.targets),
    weights=take(pairs.weights),
    overflow=dropped.sum(dtype=jnp.int32),
    used=(token >= 0).mean(dtype=jnp.float32),
  )


def segment_mask(segments: Array) -> Array:
  """Causal attention inside each segment: i32[R, S] to bool[R, 1, S, S], queries down, keys across.

  segments  1 1 2 2 0

         1  x . . . .
         1  x x . . .
         2  . . x . .
         2  . . x x .
         0  . . . . x    empty slots see each other: no row is without a key, and nobody reads them

  """
  slots = jnp.arange(segments.shape[-1])
  same = segments[:, None, :, None] == segments[:, None, None, :]
  return same & (slots[:, None] >= slots)


def prompt_mask(mask: Array) -> Array:
  """Causal attention over left-padded prompts: bool[B, S] to bool[B, 1, S, S], queries down, keys across.

  mask  0 0 1 1 1

     0  . . . . .    padding sees nothing and nobody sees it
     0  . . . . .
     1  . . x . .
     1  . . x x .
     1  . . x x x

  """
  slots = jnp.arange(mask.shape[-1])
  return mask[:, None, None, :] & (slots[:, None] >= slots)


def embed_sources(text_embeddings: Array, source: Array, features: Array) -> Array:
  """Puts visual features at the slots that name one.

  Args:
    text_embeddings: [R, S, H], the embeddings of the ids.
    source: i32[R, S], row of the flattened features or -1 (`Packed.source`, `Prompts.source`).
    features: [B, N, H], compacted.

  Returns:
    [R, S, H] in the dtype of `text_embeddings`.
  """
  rows = features.reshape(-1, features.shape[-1]).astype(text_embeddings.dtype)
  return jnp.where((source >= 0)[..., None], rows[jnp.maximum(source, 0)], text_embeddings)


class Prompts(NamedTuple):
  """Left-padded prompts on the host, all [B, S]."""

  ids: np.ndarray  # i32; the padding id in padding and at visual slots.
  source: np.ndarray  # i32; as in `PackedBatch`.
  mask: np.ndarray  # bool; False is padding.


def layout_prompts(
  prompts: Sequence[Sequence[Sequence[int]]], *, pad_id: int = 2, multiple: int = 32
) -> Prompts:
  """Left-pads prompts to one bucketed length, so that a new length seldom means a new compilation.

  A prompt is a list of pieces. A piece is a sequence of ids, or a `range` of rows of the flattened visual features:

      [[vocabulary.image_start], range(0, 84), [vocabulary.image_end], tokenizer.encode('Question: ...')]

  Args:
    prompts: B lists of pieces.
    multiple: S is the longest prompt rounded up to a multiple of this.
  """
  longest = max(sum(map(len, pieces)) for pieces in prompts)
  shape = len(prompts), -(-longest // multiple) * multiple
  laid = Prompts(
    np.full(shape, pad_id, np.int32), np.full(shape, -1, np.int32), np.zeros(shape, bool)
  )
  for row, pieces in enumerate(prompts):
    slot = shape[1] - sum(map(len, pieces))
    laid.mask[row, slot:] = True
    for piece in pieces:
      field = laid.source if isinstance(piece, range) else laid.ids
      field[row, slot : slot + len(piece)] = piece
      slot += len(piece)
  return laid


def prompt_positions(mask: Array) -> Array:
  """Positions that restart at 0 after the left padding: bool[B, S] to i32[B, S], 0 in padding."""
  return jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)


def embed_prompts(
  prompts: Sequence[Sequence[Sequence[int]]],
  embed: Callable[[Array], Array],
  features: Array | None = None,
  *,
  pad_id: int = 2,
  multiple: int = 32,
) -> tuple[Array, Array, Array]:
  """Prompts of interleaved text and visual features, ready for `inference.decode`.

  Args:
    prompts: B lists of pieces, see `layout_prompts`.
    embed: ids i32[B, S] to embeddings [B, S, H].
    features: [B', N, H] compacted visual features that the ranges index once flattened; None without images.

  Returns:
    embeddings [B, S, H], mask bool[B, S], positions i32[B, S].
  """
  laid = layout_prompts(prompts, pad_id=pad_id, multiple=multiple)
  embeddings = embed(jnp.asarray(laid.ids))
  if features is not None:
    embeddings = embed_sources(embeddings, jnp.asarray(laid.source), features)
  mask = jnp.asarray(laid.mask)
  return embeddings, mask, prompt_positions(mask)
