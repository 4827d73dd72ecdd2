"""A picture and its texts as they are stored -> one row of a batch: decoding, crop, resize, cleaning, the choice of a caption."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import ExifTags, Image

from lavit_jax.data.cleaning import clean_caption as clean
from lavit_jax.data.images import open_image, read_image
from lavit_jax.data.record import Skip
from lavit_jax.data.shards import Ticket
from lavit_jax.errors import UserError

CROPS = ('none', 'center', 'random')
LEAST_AREA = 0.5  # of the largest square, of a random crop


def row_builder(
  seed: int, image_size: int, crop: str, write: Callable | None, vit_size: int | None = None
) -> Callable[[Ticket], dict | Skip]:
  """A function from a ticket to the row of its record, or to a Skip. `write` (record texts, use, rng, epoch) -> fields of the row or None.

  With `vit_size` a row has the picture at that size too, as 'vit_image'.
  What is random depends on (seed, ticket.key) alone. Without `write` a row is a picture; with it, rows of use 'text' have a black one.
  """
  sizes = {'image': image_size} | ({'vit_image': vit_size} if vit_size else {})
  random = (
    write is not None or crop == 'random'
  )  # a generator is not made for nothing: it takes a hundredth of the time

  def make(ticket: Ticket) -> dict | Skip:
    record = ticket.read()
    if isinstance(record, Skip):
      return record
    rng = np.random.default_rng((seed, *ticket.key)) if random else None
    row = {}
    if write is not None:
      row = write(record.texts, ticket.use, rng, ticket.epoch)
      if row is None:
        return Skip('empty caption', record.origin)
    if write is not None and ticket.use == 'text':
      black = {name: np.zeros((size, size, 3), np.uint8) for name, size in sizes.items()}
      return {**black, **row}
    if not record.image:
      return Skip('no image', record.origin)
    try:
      images = decode_sizes(record.image, list(sizes.values()), crop, rng)
      return {**dict(zip(sizes, images)), **row}
    except UserError as error:
      return Skip('corrupt image', f'{record.origin} ({error})')

  return make


def decode(
  data: bytes, size: int, crop: str = 'none', rng: np.random.Generator | None = None
) -> np.ndarray:
  """The bytes of a picture's file -> uint8[size, size, 3] RGB, as `decode_sizes` makes it."""
  return decode_sizes(data, [size], crop, rng)[0]


def decode_sizes(
  data: bytes, sizes: Sequence[int], crop: str = 'none', rng: np.random.Generator | None = None
) -> list[np.ndarray]:
  """The bytes of a picture's file -> the same part of it at each size, uint8[size, size, 3] RGB.

  Each is resized from the picture itself, by Pillow's bicubic, as inference does: it clips to bytes
  between its two passes, so another library's, or a resize of a resize, has other edges.

  `crop` 'none': the whole picture straight to the square, as published; 'center': the largest square; 'random': a square of at least half
  its area. JPEGs are decoded at 1/2, 1/4 or 1/8 as long as that leaves twice the pixels a side that the result has. Against decoding
  them whole this is a PSNR of 34 to 43 dB, of two photographs at three sizes; with only as many pixels it would be 25 to 35.

  Raises:
    UserError: nothing that Pillow can read, truncated, or too large.
  """
  try:
    image, size = open_image(data, 'image'), max(sizes)
    least = 2 * math.ceil(size / math.sqrt(LEAST_AREA)) if crop == 'random' else 2 * size
    image.draft(None, (least, least))
    upright = (
      image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    )  # of EXIF, and of XMP where it has none
    plain = image.format == 'JPEG' and image.mode == 'RGB' and upright
    if not plain:  # turned, transparent, grey, of a palette ...
      image = Image.fromarray(read_image(image))
    box = crop_box(image.size, crop, rng)
    bicubic = Image.Resampling.BICUBIC
    return [np.asarray(image.resize((size, size), bicubic, box=box)) for size in sizes]
  except UserError:
    raise
  except Exception as error:  # a decoder may throw anything at damaged bytes
    raise UserError(f'not a picture, or a damaged one: {error}') from None


def crop_box(
  size: tuple[int, int], crop: str, rng: np.random.Generator | None
) -> tuple[float, float, float, float] | None:
  """(left, top, right, bottom) of the part that is kept of a picture of (width, height)."""
  if crop == 'none':
    return None
  side, x, y = float(min(size)), 0.5, 0.5
  if crop == 'random':
    area, x, y = rng.random(3)
    side *= math.sqrt(LEAST_AREA + (1 - LEAST_AREA) * area)
  left, top = x * (size[0] - side), y * (size[1] - side)
  return left, top, min(left + side, size[0]), min(top + side, size[1])


def choose_caption(
  texts: Sequence[str], rng: np.random.Generator, clean: Callable[[str], str] = clean
) -> str:
  """One of the texts that are not empty once they are clean, at random; '' if there is none."""
  left = [text for text in map(clean, texts) if text]
  return left[rng.integers(len(left))] if len(left) > 1 else ''.join(left)
