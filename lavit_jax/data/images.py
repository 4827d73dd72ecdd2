"""Whatever people hand over as a picture -> uint8 RGB at the model's size.

A path or a file: URL, the bytes of a file, a PIL image or an array; palette, CMYK, 16-bit, grey, with alpha (laid on white), turned by its
EXIF tag, one pixel large: all of these are pictures. What is not raises a UserError that names the file and the remedy.
"""

from __future__ import annotations

import io
import os
import pathlib
import urllib.parse
import urllib.request
import warnings

import numpy as np
from PIL import Image, ImageOps

from lavit_jax.errors import UserError
from lavit_jax.local_paths import expand_home

MAX_PIXELS = 80_000_000  # of training and inference; 240 MB decoded; a larger header is a mistake or a decompression bomb (Pillow warns from 89 million)
SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.gif', '.bmp', '.tif', '.tiff')


def read_images(sources, size: int | tuple[int, int]) -> np.ndarray:
  """One picture or a sequence of them -> uint8[B, H, W, 3]; `size` is the side of a square, or (H, W).

  The resize is bicubic and straight to the size, aspect ratio not kept (specification, Image encoder). Raises UserError as `read_image`.
  """
  images = [
    resize(read_image(source, f'image {i}'), size) for i, source in enumerate(as_list(sources))
  ]
  return np.stack(images) if images else np.zeros((0, *_sides(size), 3), np.uint8)


def as_list(sources) -> list:
  """One picture, or several in a sequence or in an array [B, H, W, C], as a list."""
  if is_one(sources):
    return [sources]
  try:
    return list(sources)
  except TypeError:
    raise UserError(
      f'pictures are paths, bytes, PIL images or arrays, one or a list of them; got {type(sources).__name__}'
    ) from None


def is_one(source) -> bool:
  """Whether this would be one picture, by its type."""
  return (
    isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image))
    or getattr(source, 'ndim', 4) < 4
  )


def resize(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
  """uint8[H, W, 3] -> uint8[size, size, 3], or of (H, W), bicubic; untouched if it has that size already."""
  if image.shape[:2] == _sides(size):
    return image
  return np.asarray(Image.fromarray(image).resize(_sides(size)[::-1], Image.Resampling.BICUBIC))


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
  return (size, size) if isinstance(size, int) else tuple(size)


def read_image(source, name: str = 'image') -> np.ndarray:
  """One picture -> uint8[H, W, 3] RGB.

  Args:
    source: a path or a file: URL, bytes, a PIL image, or an array [H, W], [H, W, 1 | 3 | 4] of uint8, uint16 or floats in [0, 1].
    name: what to call a source that has no file name in messages.

  Raises:
    UserError: missing, empty, not a picture, truncated, too large, or an array of another shape or type.
  """
  if isinstance(source, (str, os.PathLike)):
    return _decode(_read(source), str(source))
  if isinstance(source, (bytes, bytearray, memoryview)):
    return _decode(bytes(source), name)
  if isinstance(source, Image.Image):
    return _rgb(source, name)
  return _from_array(np.asarray(source), name)


def _read(path) -> bytes:
  if str(path).startswith('file:'):
    path = urllib.request.url2pathname(urllib.parse.urlsplit(str(path)).path)
  try:
    return pathlib.Path(expand_home(path)).read_bytes()
  except FileNotFoundError:
    raise UserError(f'{path}: no such file; give the path of a picture') from None
  except IsADirectoryError:
    raise UserError(f'{path}: a folder; name the pictures in it') from None
  except OSError as error:
    raise UserError(
      f'{path}: cannot be read ({error.strerror}); check the path and its permissions'
    ) from None


def _decode(data: bytes, name: str) -> np.ndarray:
  return _rgb(open_image(data, name), name)


def open_image(data: bytes, name: str) -> Image.Image:
  """The bytes of an image's file, of which only the header is read; training opens images by it too.

  Raises:
    UserError: nothing that Pillow can read, or more than MAX_PIXELS pixels.
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
  except Exception:  # a decoder may throw anything at damaged bytes
    raise UserError(
      f'{name}: not a picture that Pillow can read; convert it to PNG or JPEG'
    ) from None
  _check_size(*image.size, name)
  return image


def _check_size(width: int, height: int, name: str) -> None:
  """For pictures in files this runs on the header, before anything large is decoded."""
  if width * height > MAX_PIXELS:
    raise UserError(
      f'{name}: {width} x {height} is too large; scale it below {MAX_PIXELS // 10**6} million pixels'
    )
  if not width * height:
    raise UserError(f'{name}: the picture has no pixels; give one of at least 1 x 1')


def _rgb(image: Image.Image, name: str) -> np.ndarray:
  _check_size(*image.size, name)
  try:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(('I', 'F')):
      pixels = _deep(np.asarray(image), name)
    elif image.mode == 'La':  # which Pillow turns into nothing but LA
      pixels = np.asarray(_on_white(image.convert('LA').convert('RGBA')))
    elif image.has_transparency_data:
      pixels = np.asarray(_on_white(image.convert('RGBA')))
    else:
      pixels = np.asarray(image.convert('RGB'))
  except UserError:
    raise
  except Exception as error:  # as above; this is where Pillow decodes
    raise UserError(
      f'{name}: the picture is truncated or damaged ({error}); copy or export it again'
    ) from None
  return _from_array(pixels, name)


def _on_white(image: Image.Image) -> Image.Image:
  return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')


def _deep(pixels: np.ndarray, name: str) -> np.ndarray:
  """The pixels of Pillow's integer and float modes, which its own conversion clips at 255 -> uint8, uint16 or floats in [0, 1].

  Floats in [0, 1] are shares of white. Whole numbers, in floats too, are of 8 bits if none is beyond 255, else of 16. What else a file may
  hold, such as radiances or depths, has no white that could be known here.

  Raises:
    UserError: numbers below 0, beyond 16 bits, NaN, or fractions beyond 1.
  """
  if pixels.dtype.kind == 'u' and pixels.itemsize == 2:
    return pixels.astype(np.uint16)  # of whichever byte order
  low, top = pixels.min(), pixels.max()
  if pixels.dtype.kind == 'f' and low >= 0 and top <= 1:
    return pixels
  if not (low >= 0 and top <= 65535):  # written so that NaN fails too
    raise UserError(
      f'{name}: its numbers go from {low:g} to {top:g}; scale them to 0..1, or save the picture with 8 or 16 bits'
    )
  whole = pixels.astype(np.uint8 if top <= 255 else np.uint16)
  if (whole != pixels).any():
    raise UserError(
      f'{name}: its numbers are fractions from {low:g} to {top:g}, of which none is known to be white; scale them to 0..1'
    )
  return whole


def _from_array(pixels: np.ndarray, name: str) -> np.ndarray:
  if pixels.ndim == 2:
    pixels = pixels[..., None]
  if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3, 4):
    raise UserError(f'{name}: an array of shape {pixels.shape}; give [height, width, 3]')
  height, width, channels = pixels.shape
  _check_size(width, height, name)
  if pixels.dtype == np.uint16:
    pixels = np.round(pixels / 257).astype(np.uint8)
  elif pixels.dtype.kind == 'f':
    if not (pixels.min() >= 0 and pixels.max() <= 1):  # written so that NaN fails too
      raise UserError(f'{name}: floats outside [0, 1]; scale them, or give uint8')
    pixels = np.round(pixels * 255.0).astype(np.uint8)
  elif pixels.dtype != np.uint8:
    raise UserError(f'{name}: an array of {pixels.dtype}; give uint8, uint16 or floats in [0, 1]')
  if channels == 4:
    return np.asarray(_on_white(Image.fromarray(pixels)))
  return np.repeat(pixels, 3, -1) if channels == 1 else pixels
