"""Where data lies: braces and globs become lists of files; files are opened here or wherever fsspec reaches (gs://, s3://, hf://)."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from typing import BinaryIO

import fsspec

from lavit_jax.errors import UserError

_BRACES = re.compile(r'\{([^{}]*)\}')
_AHEAD = 8 << 20  # bytes asked of a remote store at a time


def expand(path: str | Sequence[str]) -> list[str]:
  """'a/{000..002}.tar', 'a/{x,y}.tar', 'a/*.tar', or a list of these -> files; braces in their order, globs sorted.

  Raises:
    UserError: a glob that finds nothing, or a store for which a package is missing.
  """
  paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
  named = list(itertools.chain.from_iterable(_braces(os.fspath(each)) for each in paths))
  files = list(itertools.chain.from_iterable(_glob(each) if re.search(r'[*?\[]', each) else [each] for each in named))
  if not files:
    raise UserError(f'{path!r} names no files; give a path, a glob or a list')
  return files


def is_remote(path: str) -> bool:
  return '://' in path and not path.startswith('file://')


def open_file(path: str) -> BinaryIO:
  """Opens for reading and seeking. Raises OSError, and UserError if a package is missing for such a path."""
  if not is_remote(path):
    return open(path.removeprefix('file://'), 'rb', buffering=1 << 20)
  return store(path)[0].open(path, 'rb', block_size=_AHEAD)


def store(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
  """The file system of a path, and the path in it."""
  try:
    return fsspec.core.url_to_fs(path)
  except (ImportError, ValueError) as error:
    raise UserError(f'{path}: {error}; pip install what fsspec needs for it (gcsfs for gs://, s3fs for s3://)') from error


def _braces(path: str) -> list[str]:
  match = _BRACES.search(path)
  if not match:
    return [path]
  low, dots, high = match[1].partition('..')
  if dots and low.isdecimal() and high.isdecimal():
    inner = [f'{i:0{len(low)}d}' for i in range(int(low), int(high) + 1)]
  else:
    inner = match[1].split(',')
  tails = _braces(path[match.end():])
  return [path[:match.start()] + middle + tail for middle in inner for tail in tails]


def _glob(path: str) -> list[str]:
  files, inside = store(path)
  found = sorted(files.glob(inside))
  if not found:
    raise UserError(f'{path} matches no file; check the path')
  return [files.unstrip_protocol(name) for name in found] if is_remote(path) else found
