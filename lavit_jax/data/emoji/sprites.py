"""Reads the sprites of the emoji data set as one array, with their names."""

import functools
import io
import os
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lavit_jax.local_paths import expand_home

_MIN_VERSION = 2  # of the full data set; before, it had all emoji
_FIELDS = ('codepoint', 'style', 'name', 'keywords', 'group', 'subgroup', 'colour')  # of a record


class Sprite(NamedTuple):
  """The text fields of one drawing of one emoji; dataset.py describes them."""

  codepoint: str
  style: str
  name: str
  keywords: str
  group: str
  subgroup: str
  color: str


class Sprites(NamedTuple):
  """The sprites of a data set.

  Attributes:
    pixels: uint8[M, 96, 96, 4], RGBA with premultiplied alpha.
    metadata: the text fields of the M sprites, ordered by codepoint and style.
  """

  pixels: np.ndarray
  metadata: tuple[Sprite, ...]


@functools.cache
def load(source: str = 'embedded') -> Sprites:
  """Loads the sprites of a data set, once.

  Args:
    source: 'embedded' (part of the package), or the data_dir that `lavit data build` wrote.

  Raises:
    FileNotFoundError: there is no such data set; the message names the command that builds it.
  """
  import tensorflow_datasets as tfds  # Imported here, because it takes seconds.

  builder = tfds.builder_from_directory(find_dataset(source))
  decoders = {'image': tfds.decode.SkipDecoding()}
  # The decorator of tfds hides the parameters.
  records = list(builder.as_data_source('plain', decoders=decoders))  # pyright: ignore[reportCallIssue]
  records.sort(key=lambda record: (record['codepoint'], record['style']))
  pixels = np.stack([_premultiplied(record['image']) for record in records])
  return Sprites(pixels, tuple(_metadata(record) for record in records))


def find_dataset(source: str) -> str:
  """Returns the folder of the newest version of the data set; the full one before the sample.

  Args:
    source: 'embedded' or a data_dir.

  Raises:
    FileNotFoundError: there is none, or the full one is of an earlier version, with other emoji.
  """
  if source == 'embedded':
    root = Path(str(resources.files('lavit_jax') / 'assets/emoji_sample'))
  else:
    root = Path(expand_home(source))
  descriptions = sorted(root.glob('emoji/*/*/dataset_info.json'), key=_version)
  if not descriptions:
    raise FileNotFoundError(
      f'{root} has no emoji data set; build one: lavit data build --data_dir {source}'
    )
  newest = descriptions[-1]
  is_full, version = _version(newest)
  if is_full and version < [_MIN_VERSION]:
    raise FileNotFoundError(
      f'{newest.parent} is of an earlier version, with other emoji; build the present one: '
      f'lavit data build --data_dir {source}'
    )
  return os.fspath(newest.parent)


def _version(description: Path) -> tuple[bool, list[int]]:
  """Sorts '.../full/1.10.0/dataset_info.json' after older versions and after samples."""
  config, version = description.parts[-3:-1]
  return config == 'full', [int(number) for number in version.split('.')]


def _metadata(record: dict[str, bytes]) -> Sprite:
  return Sprite(*(record[field].decode() for field in _FIELDS))


def _premultiplied(png: bytes) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(png)).convert('RGBA').convert('RGBa'))
