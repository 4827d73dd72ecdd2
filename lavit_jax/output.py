"""Files that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import io
import json
import os
import pathlib
import re
import tempfile

import numpy as np
from PIL import Image

from lavit_jax.data.images import SUFFIXES
from lavit_jax.errors import UserError


def write_atomic(path, data: bytes | str) -> pathlib.Path:
  """Writes a file atomically, making its folder. Raises UserError naming it (full disk, no permission); leaves no fragment."""
  path = pathlib.Path(path)
  scratch = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
    with os.fdopen(handle, 'wb') as file:
      file.write(data.encode() if isinstance(data, str) else data)
    os.chmod(scratch, 0o644)  # mkstemp is private; a result is not
    os.replace(scratch, path)
    scratch = None
  except OSError as error:
    raise UserError(
      f'cannot write {path}: {error.strerror or error}; free some space or choose another place'
    ) from error
  finally:
    if scratch is not None:
      os.unlink(scratch)
  return path


def write_json(path, value) -> pathlib.Path:
  """Writes `value` as indented JSON."""
  return write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + '\n')


def encode_png(image: np.ndarray) -> bytes:
  """uint8[H, W, 3] -> the bytes of a PNG."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, 'PNG')
  return buffer.getvalue()


def slug(text: str) -> str:
  """A short, safe file name that still says what it is: the words, without the endings of pictures' names."""
  ending = f'({"|".join(map(re.escape, SUFFIXES))})(?= |$)'
  return re.sub('[^a-z0-9]+', '-', re.sub(ending, '', text.lower())).strip('-')[:60] or 'picture'
