"""Reads images of any kind as uint8 RGB, at the size of the model.

An image is a path or a file: URL, the bytes of a file, a PIL image or an array. It may have a
palette, CMYK, 16 bits, gray levels, alpha (it is put on white), or an EXIF orientation (it is
turned). Every other input raises a UserError that names the file and the remedy.
"""

from __future__ import annotations

import io
import os
import pathlib
import urllib.parse
import urllib.request
import warnings
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from lavit_jax.errors import UserError
from lavit_jax.local_paths import expand_home

# Decoded, this is 240 MB. A larger header is a mistake or a decompression bomb; Pillow warns from
# 89 million on.
MAX_PIXELS = 80_000_000
IMAGE_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp', '.tif', '.tiff')


def read_images(sources: Any, size: int | tuple[int, int]) -> np.ndarray:
  """Reads one image or several and resizes them, bicubic, without keeping the aspect ratio.

  This is the published preprocessing (specification, Image encoder).

  Args:
    sources: what `read_image` takes, a sequence of these, or an array [B, H, W, C].
    size: side of a square in pixels, or (height, width).

  Returns:
    uint8[B, H, W, 3].

  Raises:
    UserError: as in `read_image`.
  """
  images = []
  for i, source in enumerate(as_image_list(sources)):
    images.append(resize(read_image(source, f'image {i}'), size))
  return np.stack(images) if images else np.zeros((0, *_height_width(size), 3), np.uint8)


def as_image_list(sources: Any) -> list[Any]:
  """Returns one image, or several in a sequence or an array [B, H, W, C], as a list.

  Raises:
    UserError: it is neither.
  """
  if is_single_image(sources):
    return [sources]
  try:
    return list(sources)
  except TypeError:
    raise UserError(
      'images are paths, bytes, PIL images or arrays, one or a list of them; '
      f'got {type(sources).__name__}'
    ) from None


def is_single_image(source: Any) -> bool:
  """Whether the source is one image, by its type alone."""
  if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)):
    return True
  return getattr(source, 'ndim', 4) < 4


def resize(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
  """Resizes by Pillow's bicubic, unless the image has that size.

  Args:
    image: uint8[H, W, 3].
    size: side of a square in pixels, or (height, width).

  Returns:
    uint8[height, width, 3].
  """
  height, width = _height_width(size)
  if image.shape[:2] == (height, width):
    return image
  return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
  if isinstance(size, int):
    return size, size
  height, width = size
  return height, width


def read_image(source: Any, name: str = 'image') -> np.ndarray:
  """Reads one image.

  Args:
    source: a path or a file: URL, bytes, a PIL image, or an array [H, W], [H, W, 1], [H, W, 3] or
      [H, W, 4] of uint8, uint16 or floats in [0, 1].
    name: for error messages, if the source has no path.

  Returns:
    uint8[H, W, 3], RGB.

  Raises:
    UserError: the source is missing, empty, no image, truncated, too large, or an array of another
      shape or dtype.
  """
  if isinstance(source, (str, os.PathLike)):
    return _to_rgb(open_image(_read_bytes(source), str(source)), str(source))
  if isinstance(source, (bytes, bytearray, memoryview)):
    return _to_rgb(open_image(bytes(source), name), name)
  if isinstance(source, Image.Image):
    return _to_rgb(source, name)
  return _array_to_rgb(np.asarray(source), name)


def open_image(data: bytes, name: str) -> Image.Image:
  """Opens the bytes of an image file and reads its header; training uses this, too.

  Args:
    data: content of the file.
    name: for error messages.

  Raises:
    UserError: Pillow cannot read it, or it has more than `MAX_PIXELS` pixels.
  """
  if not data:
    raise UserError(f'{name}: the file is empty; copy or download it again')
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('error', Image.DecompressionBombWarning)
      image = Image.open(io.BytesIO(data))
  except (Image.DecompressionBombError, Image.DecompressionBombWarning):
    raise UserError(
      f'{name}: too large; scale it below {MAX_PIXELS // 10**6} million pixels'
    ) from None
  except Exception:  # on damaged bytes, decoders raise exceptions of all kinds
    raise UserError(
      f'{name}: not an image that Pillow can read; convert it to PNG or JPEG'
    ) from None
  _check_size(*image.size, name)
  return image


def _read_bytes(path: str | os.PathLike) -> bytes:
  if str(path).startswith('file:'):
    path = urllib.request.url2pathname(urllib.parse.urlsplit(str(path)).path)
  try:
    return pathlib.Path(expand_home(path)).read_bytes()
  except FileNotFoundError:
    raise UserError(f'{path}: no such file; give the path of an image') from None
  except IsADirectoryError:
    raise UserError(f'{path}: a folder; name the images in it') from None
  except OSError as error:
    raise UserError(
      f'{path}: cannot be read ({error.strerror}); check the path and its permissions'
    ) from None


def _check_size(width: int, height: int, name: str) -> None:
  """Checks the size by the header of a file, before it is decoded."""
  if width * height > MAX_PIXELS:
    raise UserError(
      f'{name}: {width} x {height} is too large; '
      f'scale it below {MAX_PIXELS // 10**6} million pixels'
    )
  if width == 0 or height == 0:
    raise UserError(f'{name}: the image has no pixels; give one of at least 1 x 1')


# ------------------------------------------------------------------------------------- conversion


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
  """Decodes an image of any mode as uint8[H, W, 3]."""
  _check_size(*image.size, name)
  try:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(('I', 'F')):
      pixels = _scale_deep(np.asarray(image), name)
    elif image.mode == 'La':  # Pillow converts it only to LA
      pixels = np.asarray(_on_white(image.convert('LA').convert('RGBA')))
    elif image.has_transparency_data:
      pixels = np.asarray(_on_white(image.convert('RGBA')))
    else:
      pixels = np.asarray(image.convert('RGB'))
  except UserError:
    raise
  except Exception as error:  # Pillow decodes here, and raises exceptions of all kinds
    raise UserError(
      f'{name}: the image is truncated or damaged ({error}); copy or export it again'
    ) from None
  return _array_to_rgb(pixels, name)


def _on_white(image: Image.Image) -> Image.Image:
  background = Image.new('RGBA', image.size, 'white')
  return Image.alpha_composite(background, image).convert('RGB')


def _scale_deep(pixels: np.ndarray, name: str) -> np.ndarray:
  """Interprets the pixels of Pillow's integer and float modes.

  Pillow's own conversion clips them at 255. Floats in [0, 1] are fractions of white. Whole numbers,
  also in floats, have 8 bits if none is above 255, else 16. Other values, such as radiances or
  depths, have no known white.

  Returns:
    uint8, uint16, or floats in [0, 1], of the same shape.

  Raises:
    UserError: there are numbers below 0, above 16 bits, NaN, or fractions above 1.
  """
  if pixels.dtype.kind == 'u' and pixels.itemsize == 2:
    return pixels.astype(np.uint16)  # from either byte order
  low = pixels.min()
  high = pixels.max()
  if pixels.dtype.kind == 'f' and low >= 0 and high <= 1:
    return pixels
  if not (low >= 0 and high <= 65535):  # in this form, NaN fails too
    raise UserError(
      f'{name}: its numbers go from {low:g} to {high:g}; '
      'scale them to 0..1, or save the image with 8 or 16 bits'
    )
  whole = pixels.astype(np.uint8 if high <= 255 else np.uint16)
  if (whole != pixels).any():
    raise UserError(
      f'{name}: its numbers are fractions from {low:g} to {high:g}, of which none is known to be '
      'white; scale them to 0..1'
    )
  return whole


def _array_to_rgb(pixels: np.ndarray, name: str) -> np.ndarray:
  """Converts an array as `read_image` takes it to uint8[H, W, 3]."""
  if pixels.ndim == 2:
    pixels = pixels[..., None]
  if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4):
    raise UserError(f'{name}: an array of shape {pixels.shape}; give [height, width, 3]')
  height, width, channels = pixels.shape
  _check_size(width, height, name)
  pixels = _to_uint8(pixels, name)
  if channels == 4:
    return np.asarray(_on_white(Image.fromarray(pixels)))
  return np.repeat(pixels, 3, -1) if channels == 1 else pixels


def _to_uint8(pixels: np.ndarray, name: str) -> np.ndarray:
  if pixels.dtype == np.uint8:
    return pixels
  if pixels.dtype == np.uint16:
    return np.round(pixels / 257).astype(np.uint8)
  if pixels.dtype.kind != 'f':
    raise UserError(f'{name}: an array of {pixels.dtype}; give uint8, uint16 or floats in [0, 1]')
  if not (pixels.min() >= 0 and pixels.max() <= 1):  # in this form, NaN fails too
    raise UserError(f'{name}: floats outside [0, 1]; scale them, or give uint8')
  return np.round(pixels * 255.0).astype(np.uint8)
