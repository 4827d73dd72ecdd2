"""The training sprite that an image resembles most, pixel by pixel.

A model that draws a sprite may have learnt to draw, or remember a training image. A visitor can
tell only if the nearest training image is shown too.

The inputs of the demo contain all training sprites as thumbnails on one sheet, `sprites.png`, in
rows from the left. `sprites.json` has the side of a thumbnail in pixels, [name, style] of each
sprite, and the licences of the styles.

Axes: M sprites, S side of a thumbnail in pixels, K crops of an image.
"""

from __future__ import annotations

import io
import json
import math
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image

from lavit_jax.errors import UserError
from lavit_jax.output import write_atomic, write_json

SIDE = 24  # pixels of a thumbnail: enough to tell sprites apart
SHEET = 'sprites.png'
NAMES = 'sprites.json'

_COLUMNS = 64
_LEVELS = 32  # of each channel of a thumbnail: a third less to store than all 256
_CONTRAST = 40  # least difference of a channel, of 255, between foreground and background
_BORDER_SAMPLE = 256  # pixels of the border of an image, by which its background is found
_SHIFTS = (-1, 0, 1)  # pixels of a thumbnail; the edge of a foreground is not exact

# Upper limits of the distance, and what to call it. By benchmarks/neighbors.py, 95% of the images
# of training sprites are below the first limit, and 95% of those of held-out concepts above it. The
# second is between three quarters of the images whose sprites are turned and stretched, and three
# quarters of those of held-out concepts.
_WORDS = ((0.10, 'almost the same'), (0.14, 'similar'))
_BEYOND = 'different'


class Sprites(NamedTuple):
  """All training sprites.

  Attributes:
    pixels: uint8[M, S, S, 4], RGBA.
    names: [name, style] of each.
  """

  pixels: np.ndarray
  names: list[list[str]]


class Neighbor(NamedTuple):
  """The training sprite that is nearest to an image.

  Attributes:
    index: of the sprite.
    name: of the sprite, 'owl'.
    style: of the sprite, 'noto'.
    distance: root of the mean squared difference of the channels, in 0..1.
    thumbnail: uint8[S, S, 3], the sprite on the background of the image.
  """

  index: int
  name: str
  style: str
  distance: float
  thumbnail: np.ndarray

  def in_words(self) -> str:
    """How near the sprite is: 'almost the same, colors differ by 4%'."""
    words = _BEYOND
    for limit, name in reversed(_WORDS):
      if self.distance < limit:
        words = name
    return f'{words}, colors differ by {self.distance:.0%}'


def write_sprites(
  folder: pathlib.Path,
  pixels: np.ndarray,
  names: list[list[str]],
  licences: Mapping[str, str],
) -> None:
  """Writes `sprites.png` and `sprites.json`.

  Args:
    folder: the folder.
    pixels: uint8[M, H, H, 4], RGBA with premultiplied alpha.
    names: [name, style] of each sprite.
    licences: {style: licence}.
  """
  rows = math.ceil(len(pixels) / _COLUMNS)
  sheet = Image.new('RGBA', (min(len(pixels), _COLUMNS) * SIDE, rows * SIDE))
  for index, sprite in enumerate(pixels):
    row, column = divmod(index, _COLUMNS)
    image = Image.frombuffer('RGBa', sprite.shape[:2], np.ascontiguousarray(sprite))
    thumbnail = image.resize((SIDE, SIDE), Image.Resampling.BOX).convert('RGBA')
    sheet.paste(thumbnail, (column * SIDE, row * SIDE))
  values = np.asarray(sheet).astype(np.float32)
  rounded = np.rint(values * (_LEVELS - 1) / 255) * 255 / (_LEVELS - 1)
  rounded = np.rint(rounded).astype(np.uint8)
  rounded[rounded[..., 3] == 0] = 0
  buffer = io.BytesIO()
  Image.fromarray(rounded).save(buffer, 'PNG', optimize=True)
  write_atomic(folder / SHEET, buffer.getvalue())
  description = {'side': SIDE, 'licences': dict(licences), 'sprites': names}
  write_json(folder / NAMES, description)


def read_sprites(folder: pathlib.Path) -> Sprites | None:
  """Reads what `write_sprites` wrote; None if the folder has no sprites.

  Raises:
    UserError: a file is damaged; the message names it.
  """
  path = folder / NAMES
  if not path.exists():
    return None
  try:
    description = json.loads(path.read_text())
    names = [[str(text) for text in (name, style)] for name, style in description['sprites']]
    side = int(description['side'])
    path = folder / SHEET
    sheet = np.asarray(Image.open(path).convert('RGBA'))
    rows, columns = sheet.shape[0] // side, sheet.shape[1] // side
    tiles = sheet.reshape(rows, side, columns, side, 4).swapaxes(1, 2)
    pixels = tiles.reshape(-1, side, side, 4)[: len(names)]
    if len(pixels) < len(names):
      raise ValueError(f'{len(names)} names, but {len(pixels)} sprites')
  except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
    raise UserError(
      f'{path} is damaged ({error!r}); make it again by `python -m lavit_jax.apps.demo --make`, '
      f'or delete {NAMES} to show no nearest sprites'
    ) from None
  return Sprites(pixels, names)


def find_nearest(image: np.ndarray, sprites: Sprites) -> Neighbor | None:
  """Finds the training sprite that is nearest to what an image shows.

  The image is cropped to its foreground, and so is each sprite on the background of the image: of a
  white flag on white, neither shows more than the pole. The distance is that of the best of a few
  crops, which differ by a pixel of a thumbnail.

  Args:
    image: uint8[H, W, 3].
    sprites: at least one.

  Returns:
    The nearest sprite; None if the image shows nothing but its background.
  """
  color = background_color(image)
  square = foreground_square(image, color)
  if square is None:
    return None
  side = sprites.pixels.shape[1]
  crops = _crop(image, color, square, side)
  alpha = sprites.pixels[..., 3:].astype(np.float32) / 255
  shown = sprites.pixels[..., :3] * alpha + color * (1 - alpha)
  flat_shown = _crop_to_foregrounds(shown, color).reshape(len(shown), -1) / 255
  flat_crops = crops.reshape(len(crops), -1) / 255
  # |a - b|^2 as a product of matrices, [K, M]. It is exact to about 1e-4 in the mean.
  squares = (flat_crops**2).sum(1)[:, None] + (flat_shown**2).sum(1) - 2 * flat_crops @ flat_shown.T
  index = int(squares.min(0).argmin())
  # The one distance that is shown is computed exactly.
  difference = flat_crops[squares[:, index].argmin()] - flat_shown[index]
  distance = math.sqrt(np.mean(difference.astype(np.float64) ** 2))
  name, style = sprites.names[index]
  thumbnail = np.rint(shown[index]).astype(np.uint8)
  return Neighbor(index, name, style, distance, thumbnail)


def background_color(image: np.ndarray) -> np.ndarray:
  """Returns the most common color f32[3] of the border of an image uint8[H, W, 3]."""
  border = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
  # A generated image has noise, so that colors near each other count as one.
  sample = border[:: max(1, len(border) // _BORDER_SAMPLE)].astype(np.int16)
  near = np.abs(sample[:, None] - sample).max(-1) < _CONTRAST
  most_common = near.sum(1).argmax()
  return np.median(sample[near[most_common]], axis=0).astype(np.float32)


def foreground_square(image: np.ndarray, color: np.ndarray) -> tuple[float, float, float] | None:
  """Finds the square around all that differs from the background.

  Args:
    image: uint8[H, W, 3].
    color: f32[3], of the background.

  Returns:
    Left, top and side in pixels; None if nothing differs. The square may reach beyond the image.
  """
  differs = _differs(image, color)
  columns = np.flatnonzero(differs.any(0))
  rows = np.flatnonzero(differs.any(1))
  if not len(columns):
    return None
  width = columns[-1] + 1 - columns[0]
  height = rows[-1] + 1 - rows[0]
  side = max(width, height)
  left = columns[0] + (width - side) / 2
  top = rows[0] + (height - side) / 2
  return float(left), float(top), float(side)


def _differs(image: np.ndarray, color: np.ndarray) -> np.ndarray:
  """Whether any channel of [..., 3] differs from the background, bool[...]."""
  red, green, blue = (np.abs(image[..., i] - color[i]) > _CONTRAST for i in range(3))
  return red | green | blue


def _crop_to_foregrounds(shown: np.ndarray, color: np.ndarray) -> np.ndarray:
  """Crops sprites f32[M, S, S, 3], of which the background hides a part, to what it leaves."""
  side = shown.shape[1]
  differs = _differs(shown, color)
  left, right = _extent(np.any(differs, axis=1))
  top, bottom = _extent(np.any(differs, axis=2))
  is_smaller = np.maximum(right - left, bottom - top) < side - 1
  is_beside = np.maximum(np.abs(left + right - side), np.abs(top + bottom - side)) > 1
  cropped = shown.copy()
  for index in np.flatnonzero(is_smaller | is_beside):
    square = foreground_square(shown[index], color)
    if square is not None:
      padded = _pad(np.rint(shown[index]).astype(np.uint8), color, side)
      cropped[index] = _resize(padded, side, square, side)
  return cropped


def _extent(occupied: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns where the true values of each row of bool[M, S] begin and end, i64[M] each."""
  return occupied.argmax(1), occupied.shape[1] - occupied[:, ::-1].argmax(1)


def _crop(
  image: np.ndarray, color: np.ndarray, square: tuple[float, float, float], side: int
) -> np.ndarray:
  """Crops an image to a square and to others a little beside it, smaller or larger.

  Returns:
    f32[K, side, side, 3].
  """
  left, top, length = square
  unit = length / side  # a pixel of a thumbnail
  margin = math.ceil(length)
  padded = _pad(image, color, margin)
  crops = []
  for growth in _SHIFTS:
    shrunk = -growth * unit / 2
    for dx in _SHIFTS:
      for dy in _SHIFTS:
        x = left + shrunk + dx * unit / 2
        y = top + shrunk + dy * unit / 2
        crops.append(_resize(padded, margin, (x, y, length + growth * unit), side))
  return np.stack(crops)


def _pad(image: np.ndarray, color: np.ndarray, margin: int) -> Image.Image:
  """Puts an image uint8[H, W, 3] in a frame of a color."""
  height, width = image.shape[:2]
  fill = tuple(int(channel) for channel in np.rint(color))
  padded = Image.new('RGB', (width + 2 * margin, height + 2 * margin), fill)
  padded.paste(Image.fromarray(image), (margin, margin))
  return padded


def _resize(
  padded: Image.Image, margin: int, square: tuple[float, float, float], side: int
) -> np.ndarray:
  """Resizes a square of the image in a frame, f32[side, side, 3]."""
  left, top, length = square
  x, y = left + margin, top + margin
  box = (x, y, x + length, y + length)
  return np.asarray(padded.resize((side, side), Image.Resampling.BOX, box), np.float32)
