"""Pairs of images and texts become packed rows for the training of the language model.

Specification: Vocabulary (ids, brackets), Training (what the loss covers).

Axes: B pairs, K images of a pair at most, N visual slots of an image, T text slots of a pair,
L = T + K (N + 1) + 2 tokens of a pair at most, R packed rows, S slots of a row.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.sequence import EMBED_ID
from lavit_jax.models.vocabulary import BOS_ID, EOS_ID, Vocabulary

# The kinds of pairs; see `pack_pairs`.
IMAGE_TO_TEXT = 0
TEXT_TO_IMAGE = 1
TEXT_ONLY = 2
CHAT = 3
IMAGE_ID = -1  # in the text of a chat: here stands its next image


class PackedBatch(NamedTuple):
  """Rows of several pairs each.

  Attributes:
    ids: i32[R, S]; code ids at visual positions too, 0 in empty slots.
    source: i32[R, S]; the row of the flattened features [B * K * N, H] that is the input of a slot,
      or `EMBED_ID`.
    positions: i32[R, S]; they restart at 0 with every pair.
    segments: i32[R, S]; 1 + the index of the pair in the batch, 0 in empty slots.
    targets: i32[R, S]; the next id of the same pair, 0 where there is none.
    weights: f32[R, S]; loss weight of the target, 0 where there is none.
    overflow: i32[]; number of pairs that found no room and were dropped.
    used: f32[]; share of the slots that hold a token.
  """

  ids: Array
  source: Array
  positions: Array
  segments: Array
  targets: Array
  weights: Array
  overflow: Array
  used: Array


def assign_rows(
  lengths: Array,
  num_rows: int,
  row_length: int,
  images: Array | None = None,
  max_images: int | None = None,
) -> tuple[Array, Array]:
  """Assigns each length, in order, to the first row with room for it.

  Args:
    lengths: i32[B].
    num_rows: R.
    row_length: S.
    images: i32[B], the images of each; None without `max_images`.
    max_images: of a row; None for any number.

  Returns:
    row i32[B], `num_rows` where no row had room, and start i32[B] within the row.
  """
  # What a pair needs, and what a row has: slots, and where they are limited, places for images.
  needs = [lengths]
  capacity = [row_length]
  if max_images is not None:
    assert images is not None
    needs.append(images)
    capacity.append(max_images)

  def place(fill: Array, need: Array) -> tuple[Array, tuple[Array, Array]]:
    fits = (fill + need <= jnp.array(capacity)).all(-1)
    row = jnp.where(fits.any(), jnp.argmax(fits), num_rows)
    # An index out of bounds is clamped in reading and dropped in writing: without room for a pair,
    # nothing changes.
    start = fill[row, 0]
    return fill.at[row].add(need, mode='drop'), (row, start)

  empty = jnp.zeros((num_rows, len(needs)), jnp.int32)
  _, assigned = jax.lax.scan(place, empty, jnp.stack(needs, axis=-1).astype(jnp.int32))
  return assigned


class _Pair(NamedTuple):
  """The tokens of one pair in order, [L]; only the first `length` count."""

  ids: Array
  source: Array
  targets: Array
  weights: Array
  length: Array
  num_images: Array


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
  max_images: int | None = None,
  image_loss: bool = False,
  draw_features: bool = False,
  bos_id: int = BOS_ID,
  eos_id: int = EOS_ID,
) -> PackedBatch:
  """Packs pairs into rows, first fit in the order of the batch.

      kind 0, image to text   [IMG] v v v [/IMG] w w w eos    v: continuous features by `source`
      kind 1, text to image   w w w [IMG] c c c [/IMG] eos    c: code ids
      kind 2, text only       bos w w w eos
      kind 3, chat            bos w w [IMG] v v v [/IMG] w w w eos

  The text of a chat has `IMAGE_ID` where an image stands, and its images come in order. It has no
  bos if it begins with an image.

  The function is pure, with static shapes and no communication.

  The loss covers the text by `text_weight` (eos by the weight of the last word), in kind 1 also
  [IMG], the codes, [/IMG] and eos, and in kinds 0 and 3 the codes and [/IMG] with `image_loss`
  (specification, Training). The first token of a pair is never a target. With `draw_features`, the
  images of kind 1 are features by `source`, too, and the loss covers its text alone: what predicts
  features is no id.

  A text that was cut does not end, and no target may teach that it does. With `text_weight`
  f32[B, T + 1], the value at index text_length is the weight of the token after the text (eos, or
  [IMG] in kind 1); it is 0 after a cut.

  Args:
    text: i32[B, T].
    text_length: i32[B].
    text_weight: f32[B, T + 1], or f32[B, T] if no text was cut.
    kind: i32[B], 0 to 3 as above.
    codes: i32[B, N], compacted; i32[B, K, N] of several images.
    visual_length: i32[B], or i32[B, K]; of images that a pair has not, they do not count.
    vocabulary: of ids and codes.
    num_rows: R.
    row_length: S.
    max_images: of a row; None for any number.
    image_loss: whether the loss covers the codes of kind 0.
    draw_features: whether kind 1 has continuous features in place of codes.
    bos_id: the first id of kinds 2 and 3.
    eos_id: the last id of every pair.

  Returns:
    Packed rows. A pair that finds no room is left out whole and counted in `overflow`.
  """
  if codes.ndim == 2:
    codes, visual_length = codes[:, None], visual_length[:, None]
  batch, num_images, num_slots = codes.shape
  chex.assert_shape(text, (batch, None))
  chex.assert_shape([text_length, kind], (batch,))
  chex.assert_shape(visual_length, (batch, num_images))
  chex.assert_shape(text_weight, (batch, {text.shape[1], text.shape[1] + 1}))

  def lay_out(*pair: Array) -> _Pair:
    return _lay_out(
      *pair,
      vocabulary=vocabulary,
      bos_id=bos_id,
      eos_id=eos_id,
      image_loss=image_loss,
      draw_features=draw_features,
    )

  pairs = jax.vmap(lay_out)(text, text_length, text_weight, kind, codes, visual_length)
  index = jnp.arange(batch, dtype=jnp.int32)[:, None]
  first = index * (num_images * num_slots)
  source = jnp.where(pairs.source >= 0, first + pairs.source, EMBED_ID)

  row, start = assign_rows(pairs.length, num_rows, row_length, pairs.num_images, max_images)
  dropped = row == num_rows
  position = jnp.arange(pairs.ids.shape[1], dtype=jnp.int32)
  is_token = (position < pairs.length[:, None]) & ~dropped[:, None]
  slot = (row * row_length + start)[:, None] + position
  slot = jnp.where(is_token, slot, num_rows * row_length)
  # One scatter gives every slot the number of its token; all fields are then gathers.
  numbers = jnp.arange(slot.size).reshape(slot.shape)
  token = jnp.full(num_rows * row_length, -1).at[slot].set(numbers, mode='drop')
  token = token.reshape(num_rows, row_length)

  def gather(field: Array, empty: int = 0) -> Array:
    field = jnp.broadcast_to(field, slot.shape).reshape(-1)
    return jnp.where(token >= 0, field[token], jnp.asarray(empty, field.dtype))

  return PackedBatch(
    ids=gather(pairs.ids),
    source=gather(source, EMBED_ID),
    positions=gather(position),
    segments=gather(index + 1),
    targets=gather(pairs.targets),
    weights=gather(pairs.weights),
    overflow=dropped.sum(dtype=jnp.int32),
    used=(token >= 0).mean(dtype=jnp.float32),
  )


def _lay_out(
  text: Array,
  text_length: Array,
  text_weight: Array,
  kind: Array,
  codes: Array,
  visual_length: Array,
  *,
  vocabulary: Vocabulary,
  bos_id: int,
  eos_id: int,
  image_loss: bool,
  draw_features: bool,
) -> _Pair:
  """One pair as a line of tokens; see `pack_pairs` for the four kinds.

  Each kind is a list of T + 2 entries, of which an image is one. Then the images are expanded.
  """
  max_length = text.shape[0]
  max_images, num_slots = codes.shape
  is_drawn = kind == TEXT_TO_IMAGE
  entry = jnp.arange(max_length + 2)
  position = jnp.arange(max_length + max_images * (num_slots + 1) + 2)

  def clipped(x: Array, index: Array) -> Array:
    return x[jnp.clip(index, 0, x.shape[0] - 1)]

  # The entries: [IMG] or bos, the text, in kind 1 the image, eos.
  starts_with_bos = (kind == TEXT_ONLY) | ((kind == CHAT) & (text[0] != IMAGE_ID))
  text_start = ((kind == IMAGE_TO_TEXT) | starts_with_bos).astype(jnp.int32)
  text_index = entry - text_start
  end = text_start + text_length + is_drawn
  entry_ids = jnp.select(
    [entry == end, text_index < 0, text_index < text_length],
    [eos_id, jnp.where(starts_with_bos, bos_id, IMAGE_ID), clipped(text, text_index)],
    IMAGE_ID,
  )
  next_weight, start_weight = _weights_after_text(text_weight, text_length, max_length)
  entry_weights = jnp.select(
    [entry == end, text_index < 0, text_index < text_length],
    [
      jnp.where(is_drawn, float(not draw_features), next_weight),
      0.0,
      clipped(text_weight, text_index),
    ],
    start_weight * float(not draw_features),
  )

  # The tokens: of which entry each is, and which one of its image.
  is_image_entry = (entry_ids == IMAGE_ID) & (entry < end)
  image = jnp.clip(jnp.cumsum(is_image_entry) - 1, 0, max_images - 1)
  sizes = jnp.where(is_image_entry, visual_length[image] + 2, (entry <= end).astype(jnp.int32))
  ends = jnp.cumsum(sizes)
  length = ends[-1]
  owner = jnp.searchsorted(ends, position, side='right', method='compare_all')
  code_index = position - clipped(ends - sizes, owner) - 1  # -1: [IMG], visual_length: [/IMG]
  own_image = clipped(image, owner)
  is_image = clipped(is_image_entry, owner) & (position < length)
  is_code = is_image & (code_index >= 0) & (code_index < visual_length[own_image])
  flat_index = own_image * num_slots + code_index

  ids = jnp.select(
    [is_code, is_image & (code_index < 0), is_image],
    [
      clipped(codes.reshape(-1), flat_index) + vocabulary.code_offset,
      vocabulary.image_start,
      vocabulary.image_end,
    ],
    clipped(entry_ids, owner),
  )
  image_weight = jnp.where(is_drawn, float(not draw_features), float(image_loss))
  is_inside = is_image & (code_index >= 0)
  weight = jnp.where(is_inside, image_weight, clipped(entry_weights, owner))

  has_next = position < length - 1
  is_feature = is_code & (~is_drawn | draw_features)
  return _Pair(
    ids=ids.astype(jnp.int32),
    source=jnp.where(is_feature, flat_index, EMBED_ID).astype(jnp.int32),
    targets=jnp.where(has_next, jnp.roll(ids, -1), 0).astype(jnp.int32),
    weights=jnp.where(has_next, jnp.roll(weight, -1), 0.0).astype(jnp.float32),
    length=length,
    num_images=is_image_entry.sum(),
  )


def _weights_after_text(
  text_weight: Array, text_length: Array, max_length: int
) -> tuple[Array, Array]:
  """Loss weights of eos after a text, and of [IMG] after a text; see `pack_pairs`.

  Without a stated weight, eos weighs as much as the word before it, so that an answer learns to
  stop.
  """
  if text_weight.shape[0] > max_length:
    stated = text_weight[text_length]
    return stated, stated
  last_word = jnp.clip(text_length - 1, 0, max_length - 1)
  return text_weight[last_word], jnp.ones(())


def segment_mask(segments: Array) -> Array:
  """Causal attention inside each segment: i32[R, S] to bool[R, 1, S, S], queries down, keys across.

  segments  1 1 2 2 0

         1  x . . . .
         1  x x . . .
         2  . . x . .
         2  . . x x .
         0  . . . . x    empty slots see each other: no query is without a key, and none is read

  """
  slots = jnp.arange(segments.shape[-1])
  same = segments[:, None, :, None] == segments[:, None, None, :]
  return same & (slots[:, None] >= slots)
