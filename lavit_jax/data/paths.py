"""Where data lies: braces and globs become lists of files; files are opened here or wherever fsspec reaches (gs://, s3://, hf://).

A store that does not answer is asked again, and in the end it is an error: a fault of the network never passes for one of the data, so that
processes which read the same files see the same records.
"""

from __future__ import annotations

import errno
import glob
import io
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import fsspec
import numpy as np

from lavit_jax.errors import Unreachable, UserError
from lavit_jax.local_paths import expand_home

_GLOB = re.compile(r'[*?\[]')
_BRACES = re.compile(r'\{([^{}]*)\}')
_AHEAD, _LEAST_AHEAD = 8 << 20, 256 << 10  # bytes asked of a remote store at a time
_TOGETHER = 400 << 20  # of all files that are read in turn; with their buffers, half a gigabyte
_BUFFER = 1 << 20  # or an eighth of what is read ahead
NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)  # no matter of patience
_WAITS = (1.0, 4.0, 16.0)  # seconds before another try
_SIZED = 512  # files of a source whose sizes are asked for, at most


def expand(path: str | Sequence[str], suffix: str) -> list[str]:
  """'a/{000..002}.tar', 'a/{x,y}.tar', 'a/*.tar', 'a' (a local folder: its files that end with `suffix`), or a list of these -> files.

  Braces come in their order, globs sorted; 'file://' is left out, '~' is the home folder. A path that exists as it is written is
  meant literally, whatever characters it has; so is the part of a path that exists: '/data [2024]/*.tar'.

  Raises:
    UserError: a glob that finds nothing, or a store for which a package is missing.
  """
  paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
  files = []
  for each in paths:
    files += _expand_one(os.fspath(each).removeprefix('file://'), suffix)
  if not files:
    raise UserError(f'{path!r} names no files; give a path, a glob or a list')
  return files


def _expand_one(path: str, suffix: str) -> list[str]:
  path = path if is_remote(path) else expand_home(path)
  there = _existing(path)
  if there == path:
    return _files_of(path, suffix)
  found = []
  for rest in _braces(path[len(there):]):
    each = there + rest
    there_too = _existing(each)
    if there_too == each:
      found += _files_of(each, suffix)
    elif _GLOB.search(each[len(there_too):]):
      found += _glob(each, there_too)
    else:
      found.append(each)
  return found


def _files_of(path: str, suffix: str) -> list[str]:
  """A local folder -> its files that end with `suffix`; any other path as it is."""
  if path.endswith(suffix) or is_remote(path) or not os.path.isdir(path):
    return [path]
  return _glob(os.path.join(path, f'*{suffix}'), path)


def _existing(path: str) -> str:
  """The longest part of a local path, up to a '/' or all of it, that exists; '' of a remote one."""
  if is_remote(path):
    return ''
  part = path
  while part and not os.path.exists(part):
    part = path[:part.rstrip('/').rfind('/') + 1]
  return part


def is_remote(path: str) -> bool:
  return '://' in path and not path.startswith('file://')


def ahead_of(files: int) -> int:
  """How much to read ahead of each of so many files that are read in turn."""
  return min(max(_TOGETHER // max(files, 1), _LEAST_AHEAD), _AHEAD)


def open_file(path: str, ahead: int = _AHEAD) -> BinaryIO:
  """Opens for reading and seeking; what fails is tried again, in longer and longer intervals. It holds about 1.25 x `ahead` bytes.

  Raises:
    NO_FILE: when opening.
    Unreachable: when opening and reading: it does not work in the end.
    UserError: the store refuses, or a package is missing for such a path.
  """
  return io.BufferedReader(_Patient(path, ahead), min(_BUFFER, ahead // 8))


class _Patient(io.RawIOBase):
  """A file that is opened anew, at the same place, when reading fails."""

  def __init__(self, path: str, ahead: int):
    self._path, self._ahead, self._at, self._file = path, ahead, 0, None
    self._do(lambda file: None)

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    count = self._do(lambda file: file.readinto(buffer))
    self._at += count
    return count

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    self._at = self._do(lambda file: file.seek(offset, whence))
    return self._at

  def tell(self) -> int:
    return self._at

  def close(self) -> None:
    self._drop()
    super().close()

  def _do(self, act: Callable[[BinaryIO], int | None]) -> int | None:
    def once():
      try:
        if self._file is None:
          self._file = _open(self._path, self._ahead)
          self._file.seek(self._at)
        return act(self._file)
      except Exception:
        self._drop()
        raise

    return _patiently(self._path, once)

  def _drop(self) -> None:
    file, self._file = self._file, None
    try:
      if file is not None:
        file.close()
    except Exception:  # it is of no use any more
      pass


def _open(path: str, ahead: int) -> BinaryIO:
  if is_remote(path):
    return store(path)[0].open(path, 'rb', block_size=ahead)
  return open(path.removeprefix('file://'), 'rb', buffering=0)


def _patiently(path: str, act: Callable[[], Any]) -> Any:
  """act(), tried a few times. Raises NO_FILE at once, and in the end Unreachable, or UserError of a store that refuses."""
  for wait in (*_WAITS, None):
    try:
      return act()
    except (*NO_FILE, UserError):
      raise
    except Exception as error:  # not all that the packages of remote stores raise is an OSError
      if getattr(error, 'errno', None) in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL):
        raise FileNotFoundError(error.errno, os.strerror(error.errno), path) from error
      reason = ' '.join(str(error).split())[:200] or type(error).__name__
      if wait is None:
        refused = getattr(error, 'code', None) == 401 or reason.startswith('Forbidden')  # in the words of gcsfs
        raise (UserError if refused else Unreachable)(
            f'{path} cannot be read ({reason}; tried {1 + len(_WAITS)} times); see to the {"permissions" if refused else "network or the disk"}, '
            'and start the same command again: it goes on from where it was saved') from error
      logging.getLogger(__name__).warning('%s cannot be read (%s); again in %g s', path, reason, wait)
      time.sleep(wait)


def names_and_sizes(files: Sequence[str]) -> list[tuple[str, int | None]]:
  """What tells files from others without reading them: of each its name, without folders, for they may be moved, and the size in bytes.

  Not the size of all, where there are many: a question to a store takes its time. None: not asked; -1: there is no such file.
  """
  def size(file: str) -> int:
    try:
      if not is_remote(file):
        return _patiently(file, lambda: os.path.getsize(file.removeprefix('file://')))
      files, inside = store(file)
      return _patiently(file, lambda: files.size(inside))
    except NO_FILE:
      return -1

  asked = np.unique(np.linspace(0, len(files) - 1, min(len(files), _SIZED)).astype(int)).tolist()
  with ThreadPoolExecutor(16) as pool:
    sizes = dict(zip(asked, pool.map(lambda i: size(files[i]), asked)))
  return [(os.path.basename(file), sizes.get(i)) for i, file in enumerate(files)]


def names_below(folder: str) -> list[str]:
  """The files in a remote folder and below it, relative to it."""
  files, inside = store(folder)
  inside = inside.rstrip('/')
  found = _patiently(folder, lambda: files.find(inside))
  return [name.removeprefix(inside).lstrip('/') for name in found]


def store(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
  """The file system of a path, and the path in it."""
  try:
    return fsspec.core.url_to_fs(path)
  except (ImportError, ValueError) as error:
    raise UserError(f"{path}: {error}; install what fsspec needs for it (gs://: pip install -e '.[gcs]' -c launch/constraints.txt, "
                    's3://: pip install s3fs)') from error


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


def _glob(path: str, literal: str = '') -> list[str]:
  """The files that match `path`, whose beginning `literal` has no wildcards.

  Raises UserError when there is none. A remote path of which no pattern matches may itself exist.
  """
  if is_remote(path):
    files, inside = store(path)
    found = sorted(_patiently(path, lambda: files.glob(inside)))
    if not found and _patiently(path, lambda: files.exists(inside)):
      return [path]
    found = [files.unstrip_protocol(name) for name in found]
  else:
    found = sorted(glob.glob(glob.escape(literal) + path[len(literal):], recursive=True))
  if not found:
    raise UserError(f'{path} matches no file; check the path')
  return found
