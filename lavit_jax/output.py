"""Files that are written whole or not at all: first under another name, then renamed."""

from __future__ import annotations

import io
import json
import os
import pathlib
import re
import tempfile
from typing import Any

import numpy as np
from PIL import Image

from lavit_jax.data.images import IMAGE_SUFFIXES
from lavit_jax.errors import UserError


def write_atomic(path: str | os.PathLike, data: bytes | str) -> pathlib.Path:
  """Writes a file atomically and makes its folder; text is written as UTF-8.

  Returns:
    The path.

  Raises:
    UserError: the file cannot be written (full disk, no permission). Nothing is left of it, and an
      earlier file is unchanged.
  """
  path = pathlib.Path(path)
  temporary = None
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
    with os.fdopen(handle, 'wb') as file:
      file.write(data.encode() if isinstance(data, str) else data)
    os.chmod(temporary, 0o644)  # mkstemp makes private files
    os.replace(temporary, path)
    temporary = None
  except OSError as error:
    reason = error.strerror or error
    raise UserError(
      f'cannot write {path}: {reason}; free some space or choose another place'
    ) from error
  finally:
    if temporary is not None:
      os.unlink(temporary)
  return path


def write_json(path: str | os.PathLike, value: Any) -> pathlib.Path:
  """Writes `value` as indented JSON; returns the path and raises as `write_atomic`."""
  return write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + '\n')


def encode_png(image: np.ndarray) -> bytes:
  """Encodes uint8[H, W, 3] as PNG."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, 'PNG')
  return buffer.getvalue()


def slug(text: str) -> str:
  """A short, safe file name of a text: lower-case words, without the suffixes of image files."""
  suffix = f'({"|".join(map(re.escape, IMAGE_SUFFIXES))})(?= |$)'
  without_suffixes = re.sub(suffix, '', text.lower())
  name = re.sub('[^a-z0-9]+', '-', without_suffixes).strip('-')
  return name[:60] or 'picture'
