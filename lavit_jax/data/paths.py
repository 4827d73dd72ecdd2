"""Paths of data files: expands braces and globs, and opens files here or wherever fsspec reaches.

Remote files (gs://, s3://, hf://) are tried again if a store does not answer, and in the end that
is an error. A network fault is never taken for a fault of the data, so all processes that read the
same files see the same records.
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
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
import fsspec.core
import numpy as np

from lavit_jax.errors import Unreachable, UserError
from lavit_jax.local_paths import expand_home

_T = TypeVar('_T')

NO_FILE_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_NO_FILE_CODES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)  # of OSErrors with that meaning
_WAITS = (1.0, 4.0, 16.0)  # seconds before each new try

_GLOB = re.compile(r'[*?\[]')
_BRACES = re.compile(r'\{([^{}]*)\}')

_MAX_AHEAD = 8 << 20  # bytes that are read ahead of a remote file
_MIN_AHEAD = 256 << 10
_TOTAL_AHEAD = 400 << 20  # of all files that are read in turn; with their buffers, 500 MB
_BUFFER = 1 << 20  # bytes; at most an eighth of what is read ahead

_MAX_SIZES = 512  # files of a source whose sizes are requested
_SIZE_THREADS = 16


# -------------------------------------------------------------------------------------- expansion


def expand(path: str | Sequence[str], suffix: str) -> list[str]:
  """Expands a path to files.

  A path that exists as it is written is literal, whatever characters it has. So is the part of a
  path that exists, as in '/data [2024]/*.tar'.

  Args:
    path: 'a/{000..002}.tar', 'a/{x,y}.tar', 'a/*.tar', 'a' (a local folder stands for its files
      with the suffix), or a list of these. '~' is the home folder; 'file://' is dropped.
    suffix: of files in folders.

  Returns:
    The files: those of braces in their order, those of globs sorted.

  Raises:
    UserError: there are no files, or a package for the store is missing.
  """
  patterns = [path] if isinstance(path, (str, os.PathLike)) else list(path)
  files = []
  for pattern in patterns:
    files += _expand_pattern(os.fspath(pattern).removeprefix('file://'), suffix)
  if not files:
    raise UserError(f'{path!r} names no files; give a path, a glob or a list')
  return files


def _expand_pattern(pattern: str, suffix: str) -> list[str]:
  if not is_remote(pattern):
    pattern = expand_home(pattern)
  existing = _existing_part(pattern)
  if existing == pattern:
    return _list_folder(pattern, suffix)
  files = []
  for tail in expand_braces(pattern[len(existing) :]):
    path = existing + tail
    literal = _existing_part(path)
    if literal == path:
      files += _list_folder(path, suffix)
    elif _GLOB.search(path[len(literal) :]):
      files += _expand_glob(path, literal)
    else:
      files.append(path)
  return files


def _list_folder(path: str, suffix: str) -> list[str]:
  """Lists the files of a local folder that have the suffix; any other path stands for itself."""
  if path.endswith(suffix) or is_remote(path) or not os.path.isdir(path):
    return [path]
  return _expand_glob(os.path.join(path, f'*{suffix}'), path)


def _existing_part(path: str) -> str:
  """Returns the longest part of a local path, up to a '/' or all of it, that exists.

  Of a remote path, it is ''.
  """
  if is_remote(path):
    return ''
  part = path
  while part and not os.path.exists(part):
    part = path[: part.rstrip('/').rfind('/') + 1]
  return part


def expand_braces(path: str) -> list[str]:
  """Expands '{000..002}' and '{x,y}', also several of them; other paths stand for themselves."""
  match = _BRACES.search(path)
  if not match:
    return [path]
  low, dots, high = match[1].partition('..')
  if dots and low.isdecimal() and high.isdecimal():
    choices = [f'{i:0{len(low)}d}' for i in range(int(low), int(high) + 1)]
  else:
    choices = match[1].split(',')
  head = path[: match.start()]
  tails = expand_braces(path[match.end() :])
  result = []
  for choice in choices:
    result += [head + choice + tail for tail in tails]
  return result


def _expand_glob(path: str, literal: str = '') -> list[str]:
  """Lists the files that match a path, sorted.

  Args:
    path: a glob; if a remote one matches nothing, a file of that very name.
    literal: the beginning of the path, where characters are not wildcards.

  Raises:
    UserError: nothing matches.
  """
  if is_remote(path):
    filesystem, inner_path = filesystem_of(path)
    names = sorted(retry(path, lambda: filesystem.glob(inner_path)))
    if not names and retry(path, lambda: filesystem.exists(inner_path)):
      return [path]
    files = [filesystem.unstrip_protocol(str(name)) for name in names]
  else:
    files = sorted(glob.glob(glob.escape(literal) + path[len(literal) :], recursive=True))
  if not files:
    raise UserError(f'{path} matches no file; check the path')
  return files


# ------------------------------------------------------------------------------------------ files


def is_remote(path: str) -> bool:
  """Whether the path is a URL of a store, such as gs://."""
  return '://' in path and not path.startswith('file://')


def filesystem_of(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
  """Returns the file system of a path, and the path inside it.

  Raises:
    UserError: a package for the store is missing.
  """
  try:
    return fsspec.core.url_to_fs(path)
  except (ImportError, ValueError) as error:
    raise UserError(
      f'{path}: {error}; install what fsspec needs for it '
      "(gs://: pip install -e '.[gcs]' -c launch/constraints.txt, s3://: pip install s3fs)"
    ) from error


def list_files(folder: str) -> list[str]:
  """Lists the files in a remote folder and below it, relative to it."""
  filesystem, inner_path = filesystem_of(folder)
  inner_path = inner_path.rstrip('/')
  names = retry(folder, lambda: filesystem.find(inner_path))
  return [name.removeprefix(inner_path).lstrip('/') for name in names]


def names_and_sizes(files: Sequence[str]) -> list[tuple[str, int | None]]:
  """Identifies files without reading them.

  Returns:
    Of each file, its name without folders, because files may be moved, and its size in bytes. The
    size is -1 if there is no such file, and None if it was not requested: of more than 512 files,
    only so many are, because each request to a store takes its time.
  """
  count = min(len(files), _MAX_SIZES)
  indices = np.unique(np.linspace(0, len(files) - 1, count).astype(int)).tolist()
  with ThreadPoolExecutor(_SIZE_THREADS) as pool:
    sizes = list(pool.map(_file_size, [files[i] for i in indices]))
  size_of = dict(zip(indices, sizes, strict=True))
  return [(os.path.basename(file), size_of.get(i)) for i, file in enumerate(files)]


def _file_size(file: str) -> int | None:
  """Returns the size in bytes; -1 if there is no such file; None if the store does not say."""
  try:
    if not is_remote(file):
      return retry(file, lambda: os.path.getsize(file.removeprefix('file://')))
    filesystem, inner_path = filesystem_of(file)
    return retry(file, lambda: filesystem.size(inner_path))
  except NO_FILE_ERRORS:
    return -1


def read_ahead_size(files: int) -> int:
  """Returns how many bytes to read ahead of each of `files` files that are read in turn."""
  return min(max(_TOTAL_AHEAD // max(files, 1), _MIN_AHEAD), _MAX_AHEAD)


def open_file(path: str, ahead: int = _MAX_AHEAD) -> BinaryIO:
  """Opens a file for reading and seeking. What fails is tried again, after longer and longer waits.

  Args:
    path: local, or of a store.
    ahead: bytes to read ahead of a remote file; it takes about 1.25 times as much memory.

  Raises:
    NO_FILE_ERRORS: there is no such file. Only opening raises them.
    Unreachable: the store does not answer in the end. Reading raises it, too.
    UserError: the store refuses, or a package for it is missing.
  """
  buffered = io.BufferedReader(_RetryingFile(path, ahead), min(_BUFFER, ahead // 8))
  return cast(BinaryIO, buffered)


class _RetryingFile(io.RawIOBase):
  """A file that is opened again at the same position if reading fails."""

  def __init__(self, path: str, ahead: int):
    self._path = path
    self._ahead = ahead
    self._position = 0
    self._file: Any = None
    self._attempt(lambda file: None)

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    count = self._attempt(lambda file: file.readinto(buffer))
    self._position += count
    return count

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    self._position = self._attempt(lambda file: file.seek(offset, whence))
    return self._position

  def tell(self) -> int:
    return self._position

  def close(self) -> None:
    self._close_file()
    super().close()

  def _attempt(self, act: Callable[[Any], _T]) -> _T:
    """Calls act(file), and again with a newly opened file if that fails."""

    def act_once() -> _T:
      try:
        if self._file is None:
          self._file = _open_raw(self._path, self._ahead)
          self._file.seek(self._position)
        return act(self._file)
      except Exception:
        self._close_file()
        raise

    return retry(self._path, act_once)

  def _close_file(self) -> None:
    file = self._file
    self._file = None
    try:
      if file is not None:
        file.close()
    except Exception:  # the file is not used any more
      pass


def _open_raw(path: str, ahead: int) -> Any:
  if is_remote(path):
    filesystem, _ = filesystem_of(path)
    return filesystem.open(path, 'rb', block_size=ahead)
  return open(path.removeprefix('file://'), 'rb', buffering=0)


# ---------------------------------------------------------------------------------------- retries


def retry(path: str, act: Callable[[], _T], done: str = 'read') -> _T:
  """Calls act() until it succeeds, at most four times.

  Args:
    path: what it reads, for messages.
    act: the call.
    done: what it does to the path, for messages.

  Raises:
    NO_FILE_ERRORS: at once.
    Unreachable: in the end, if the store does not answer.
    UserError: in the end, if the store refuses; at once, if a package is missing.
  """
  waits = iter(_WAITS)
  while True:
    try:
      return act()
    except (*NO_FILE_ERRORS, UserError):
      raise
    except Exception as error:  # not all packages of stores raise OSErrors
      _raise_if_no_file(path, error)
      wait = next(waits, None)
      if wait is None:
        raise _final_error(path, error, done) from error
      reason = _reason(error)
    logging.getLogger(__name__).warning(
      '%s cannot be %s (%s); again in %g s', path, done, reason, wait
    )
    time.sleep(wait)


def _raise_if_no_file(path: str, error: Exception) -> None:
  code = getattr(error, 'errno', None)
  if code in _NO_FILE_CODES:
    raise FileNotFoundError(code, os.strerror(code), path) from error


def _reason(error: Exception) -> str:
  """Returns the message of an error in one line."""
  return ' '.join(str(error).split())[:200] or type(error).__name__


def _final_error(path: str, error: Exception, done: str) -> UserError:
  """Returns the error that is raised after the last try."""
  reason = _reason(error)
  # gcsfs starts its message with this word.
  is_refused = getattr(error, 'code', None) == 401 or reason.startswith('Forbidden')
  cause = 'permissions' if is_refused else 'network or the disk'
  error_type = UserError if is_refused else Unreachable
  return error_type(
    f'{path} cannot be {done} ({reason}; tried {1 + len(_WAITS)} times); see to the {cause}, '
    'and start the same command again: it goes on from where it was saved'
  )
