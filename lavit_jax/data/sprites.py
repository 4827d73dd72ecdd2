"""Reads the emoji records back: all sprites of a data set as one array, with their names beside it."""

import functools
import io
import os
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lavit_jax.local_paths import expand_home


class Sprite(NamedTuple):
  """One drawing of one emoji; the fields of the record that are text."""
  codepoint: str
  style: str
  name: str
  keywords: str
  group: str
  subgroup: str
  colour: str


class Sprites(NamedTuple):
  """pixels: uint8[M, 96, 96, 4], RGBA with premultiplied alpha; rows: what each of the M is, ordered by codepoint, style."""
  pixels: np.ndarray
  rows: tuple[Sprite, ...]


@functools.cache
def load(source: str = 'embedded', skin_tones: bool = False) -> Sprites:
  """Loads a data set: 'embedded' (with the package) or the `data_dir` that `lavit_jax.data.emoji` wrote. Cached.

  Raises FileNotFoundError, naming the remedy, when there is none.
  """
  import tensorflow_datasets as tfds  # Here, because it takes seconds.
  folder = find(source)
  builder = tfds.builder_from_directory(folder)
  wanted = ['plain', 'toned'] if skin_tones and 'toned' in builder.info.splits else ['plain']
  decoders = {'image': tfds.decode.SkipDecoding()}
  records = [record for split in wanted for record in builder.as_data_source(split, decoders=decoders)]
  records.sort(key=lambda record: (record['codepoint'], record['style']))  # Whatever the files' order.
  pixels = np.stack([_premultiplied(record['image']) for record in records])
  return Sprites(pixels, tuple(Sprite(*(record[field].decode() for field in Sprite._fields)) for record in records))


def find(source: str) -> str:
  """The folder of the newest version of the data set below a `data_dir`."""
  root = resources.files('lavit_jax') / 'assets/emoji_sample' if source == 'embedded' else Path(expand_home(source))
  found = sorted(Path(str(root)).glob('emoji/*/*/dataset_info.json'),
                 key=lambda path: (path.parts[-3] == 'full', [int(part) for part in path.parts[-2].split('.')]))
  if not found:
    raise FileNotFoundError(f'{root} has no emoji data set; build one: lavit data build --data_dir {source}')
  return os.fspath(found[-1].parent)


def _premultiplied(png: bytes) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(png)).convert('RGBA').convert('RGBa'))
