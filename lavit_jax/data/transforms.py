"""Turns a stored record into an example of a batch: decoding, crop, resize, choice of a caption."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from lavit_jax.data.cleaning import clean_caption
from lavit_jax.data.images import open_image, read_image
from lavit_jax.data.record import NO_IMAGE, Record, Skip
from lavit_jax.data.shards import Ticket
from lavit_jax.data.tasks import DIALOGS
from lavit_jax.errors import UserError
from lavit_jax.models.packing import IMAGE_ID

CROPS = ('none', 'center', 'random')
MIN_AREA = 0.5  # of a random crop, as a fraction of the largest square

# (texts of the record, use of its source, rng, epoch) -> text fields, or why there are none, with
# what the message about it has after the origin of the record
EncodeTexts = Callable[[Sequence[str], str, Any, int], Mapping[str, Any] | Skip]


class CodeSizes(NamedTuple):
  """The limits of the codes of an image."""

  num_patches: int  # N, the most codes of an image
  codebook_size: int


def row_builder(
  seed: int,
  image_size: int,
  crop: str,
  encode_texts: EncodeTexts | None,
  vit_size: int | None = None,
  code_sizes: CodeSizes | None = None,
  max_images: int = 1,
) -> Callable[[Ticket], dict[str, Any] | Skip]:
  """Returns the function that makes an example of a ticket's record.

  Everything random depends on `seed` and the key of the ticket alone.

  Args:
    seed: of the run.
    image_size: side of the images in pixels.
    crop: one of `CROPS`.
    encode_texts: adds text fields. Without it, examples have an image only.
    vit_size: side of a second image, the one that the ViT sees; None for no second one.
    code_sizes: of records with codes in place of images; None: they have images.
    max_images: K, the most images of an example.

  Returns:
    A function from a ticket to an example, or to a Skip that says why there is none. An example has
    'image' uint8[image_size, image_size, 3], 'vit_image' in the same way, and the text fields; with
    a K above 1, images are uint8[K, size, size, 3]. Images that an example has not are black. With
    `code_sizes`, there are 'codes' int32[N] and 'code_length' int32 instead; texts have none.

  Raises:
    UserError: when called, codes that do not fit `code_sizes`.
  """
  sizes = {'image': image_size}
  if vit_size:
    sizes['vit_image'] = vit_size
  is_random = encode_texts is not None or crop == 'random'

  def build_row(ticket: Ticket) -> dict[str, Any] | Skip:
    record = ticket.read()
    if isinstance(record, Skip):
      return record
    # Without need, there is no generator: to make one takes 1% of the time of an example.
    rng = np.random.default_rng((seed, *ticket.key)) if is_random else None
    text_fields = {}
    if encode_texts is not None:
      text_fields = encode_texts(record.texts, ticket.use, rng, ticket.epoch)
      if isinstance(text_fields, Skip):
        return text_fields._replace(origin=record.origin + text_fields.origin)
    if code_sizes is not None:
      codes = () if ticket.use == 'text' else record.codes
      _check_codes(record, code_sizes)
      return {**_code_fields(codes, code_sizes), **text_fields}
    files = [record.image, *record.more_images]
    if ticket.use == 'text':
      files = []
    elif ticket.use in DIALOGS:  # those of the turns that were left out are not needed
      files = files[: (text_fields['text'] == IMAGE_ID).sum()]
    if len(files) > max_images:
      return Skip(
        'too many images', f'{record.origin} ({len(files)}, with data.max_images={max_images})'
      )
    if not all(files):
      return Skip(NO_IMAGE, record.origin)
    images = {name: np.zeros((max_images, size, size, 3), np.uint8) for name, size in sizes.items()}
    for number, file in enumerate(files):
      try:
        decoded = decode_sizes(file, list(sizes.values()), crop, rng)
      except UserError as error:
        return Skip('corrupt image', f'{record.origin} ({error})')
      for name, pixels in zip(sizes, decoded, strict=True):
        images[name][number] = pixels
    if max_images == 1:
      images = {name: array[0] for name, array in images.items()}
    return {**images, **text_fields}

  return build_row


def _code_fields(codes: Sequence[int], sizes: CodeSizes) -> dict[str, Any]:
  padded = np.zeros(sizes.num_patches, np.int32)
  padded[: len(codes)] = codes
  return {'codes': padded, 'code_length': np.int32(len(codes))}


def _check_codes(record: Record, sizes: CodeSizes) -> None:
  """Raises UserError for codes that another tokenizer has made: all of its file would be wrong."""
  count = len(record.codes)
  wrong = [code for code in record.codes if not 0 <= code < sizes.codebook_size]
  if wrong or count > sizes.num_patches:
    problem = f'code {wrong[0]}' if wrong else f'{count} codes'
    raise UserError(
      f'{record.origin} has {problem}, but the variant of this run has {sizes.codebook_size} codes '
      f'and at most {sizes.num_patches} of an image; '
      "tokenize with a checkpoint of this run's variant"
    )


def decode(
  data: bytes, size: int, crop: str = 'none', rng: np.random.Generator | None = None
) -> np.ndarray:
  """Decodes an image file as uint8[size, size, 3]; see `decode_sizes`."""
  return decode_sizes(data, [size], crop, rng)[0]


def decode_sizes(
  data: bytes, sizes: Sequence[int], crop: str = 'none', rng: np.random.Generator | None = None
) -> list[np.ndarray]:
  """Decodes an image file at several sizes, with the same crop for all.

  Each size is resized from the image itself by Pillow's bicubic, as at inference. Pillow rounds to
  bytes between its two passes, so the edges of another library's resize, or of a resize of a
  resize, would differ.

  JPEGs are decoded at 1/2, 1/4 or 1/8, as long as the sides have at least twice the pixels of the
  result. Compared with full decoding, this has a PSNR of 34 to 43 dB, measured on two photographs
  at three sizes. With only as many pixels as the result, it would be 25 to 35 dB.

  Args:
    data: content of the file.
    sizes: sides of the results in pixels.
    crop: 'none' resizes the whole image to the square, as published; 'center' takes the largest
      square; 'random' takes a square of at least half the area of the largest.
    rng: for 'random'.

  Returns:
    uint8[size, size, 3] RGB for each size.

  Raises:
    UserError: Pillow cannot read it, or it is truncated or too large.
  """
  try:
    image = open_image(data, 'image')
    image.draft(None, _draft_size(max(sizes), crop))
    if not _is_plain_jpeg(image):
      image = Image.fromarray(read_image(image))
    box = crop_box(image.size, crop, rng)
    bicubic = Image.Resampling.BICUBIC
    return [np.asarray(image.resize((size, size), bicubic, box=box)) for size in sizes]
  except UserError:
    raise
  except Exception as error:  # on damaged bytes, decoders raise exceptions of all kinds
    raise UserError(f'not an image, or a damaged one: {error}') from None


def _draft_size(size: int, crop: str) -> tuple[int, int]:
  """Returns the fewest pixels (width, height) at which a JPEG may be decoded."""
  side = size
  if crop == 'random':  # the crop may have only this fraction of the pixels
    side = math.ceil(size / math.sqrt(MIN_AREA))
  return 2 * side, 2 * side


def _is_plain_jpeg(image: Image.Image) -> bool:
  """Whether the image needs no conversion: it is an RGB JPEG, and is not turned."""
  # Pillow takes the orientation from XMP if there is none in EXIF.
  is_upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
  return image.format == 'JPEG' and image.mode == 'RGB' and is_upright


def crop_box(
  size: tuple[int, int], crop: str, rng: np.random.Generator | None
) -> tuple[float, float, float, float] | None:
  """Chooses the part of an image that is kept.

  Args:
    size: (width, height) of the image.
    crop: one of `CROPS`.
    rng: for 'random'.

  Returns:
    (left, top, right, bottom), or None for the whole image.
  """
  if crop == 'none':
    return None
  width, height = size
  side = float(min(size))
  x = y = 0.5
  if crop == 'random':
    if rng is None:
      raise ValueError("crop 'random' needs a generator")
    area, x, y = rng.random(3)
    side *= math.sqrt(MIN_AREA + (1 - MIN_AREA) * area)
  left = x * (width - side)
  top = y * (height - side)
  return left, top, min(left + side, width), min(top + side, height)


def choose_caption(
  texts: Sequence[str], rng: np.random.Generator, clean: Callable[[str], str] = clean_caption
) -> str:
  """Draws one of the texts that are not empty after cleaning; '' if there is none."""
  candidates = [text for text in map(clean, texts) if text]
  if not candidates:
    return ''
  if len(candidates) == 1:
    return candidates[0]
  return candidates[rng.integers(len(candidates))]
