"""The file of a tar -> its uncompressed bytes. Compression is detected by content, not by name.

| content | read by |
|---|---|
| a tar | as it is |
| gzip, bzip2, xz | the standard library |
| zstd | pyarrow |

A position in a compressed tar counts uncompressed bytes: to go on at one is to decompress what lies
before it.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import pyarrow

from lavit_jax.data import paths
from lavit_jax.errors import UserError

ENDINGS = (
  '.tar',
  '.tar.gz',
  '.tgz',
  '.tar.bz2',
  '.tbz2',
  '.tbz',
  '.tar.xz',
  '.txz',
  '.tar.zst',
  '.tzst',
)
_MAGIC = {b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zXZ\0': 'xz', b'\x28\xb5\x2f\xfd': 'zstd'}
_DECOMPRESS = {
  'gzip': lambda file: gzip.GzipFile(fileobj=file),
  'bzip2': bz2.BZ2File,
  'xz': lzma.LZMAFile,
  'zstd': lambda file: pyarrow.CompressedInputStream(file, 'zstd'),
}
_OTHERS = {  # files that are taken for tars
  b'PK\x03\x04': 'a zip archive; unpack it and write a tar',
  b'7z\xbc\xaf': 'a 7z archive; unpack it and write a tar',
  b'Rar!': 'a RAR archive; unpack it and write a tar',
  b'\x04\x22\x4d\x18': 'compressed by lz4; decompress it',
  b'\x1f\x9d': 'compressed by compress; decompress it',
  b'version https://git-lfs': 'a pointer of Git LFS, not the file; run git lfs pull',
  b'<': 'a page of HTML or XML, as servers send with an error; download it again',
  b'PAR1': "a Parquet file; read it with format='parquet'",
}
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException, OSError, ValueError)


class Broken(Exception):
  """A tar breaks off, or a part of it is damaged; what follows is lost."""


@contextlib.contextmanager
def open_tar(
  path: str, compression: dict[str, str] | None = None, **open_options: int
) -> Iterator[BinaryIO]:
  """Opens a tar, compressed or not, for reading and for seeking forward.

  Args:
    path: local or remote.
    compression: remembers the compression of each path that was opened, for a remote store takes
      time to answer.
    **open_options: those of `paths.open_file`.

  Raises:
    Broken: when reading: compressed data are damaged or break off.
    Exception: as `paths.open_file`.
  """
  compression = {} if compression is None else compression
  with paths.open_file(path, **open_options) as raw:
    if path not in compression:
      compression[path] = _detect_compression(raw.read(8))
      raw.seek(0)
    if not compression[path]:
      yield raw
      return
    with io.BufferedReader(_Decompressed(raw, compression[path]), 1 << 20) as file:
      yield file


def _detect_compression(head: bytes) -> str:
  """The compression of a file that begins with `head`; '' of an uncompressed one."""
  for magic, kind in _MAGIC.items():
    if head.startswith(magic):
      return kind
  return ''


def identify_other(head: bytes) -> str:
  """What a file is that begins with `head` and is no tar; '' if it is unknown."""
  for magic, name in _OTHERS.items():
    if head.startswith(magic):
      return name
  return ''


def stem(path: str) -> str:
  """The name of a tar's file without folders and without its ending: 'a/0.tar.gz' -> '0'."""
  name = os.path.basename(path)
  for ending in sorted(ENDINGS, key=len, reverse=True):
    if name.lower().endswith(ending) and len(name) > len(ending):
      return name[: -len(ending)]
  return os.path.splitext(name)[0]


def result_names(files: Iterable[str], ending: str) -> dict[str, str]:
  """{name of the result of a file: the file}, where each file becomes one in the same folder.

  Args:
    files: their paths.
    ending: of the results, such as '.parquet'.

  Raises:
    UserError: two files have the same name.
  """
  names: dict[str, str] = {}
  for file in files:
    name = stem(file) + ending
    other = names.setdefault(name, file)
    if other != file:
      raise UserError(
        f'{other} and {file} would both become {name}; rename one, or give their folders one by '
        'one, each with an --out of its own'
      )
  return names


class _Decompressed(io.RawIOBase):
  """The uncompressed bytes of a compressed file, from front to back."""

  def __init__(self, raw: BinaryIO, kind: str):
    self._kind = kind
    self._position = 0
    self._file = _DECOMPRESS[kind](raw)

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    try:
      data = self._file.read(len(buffer))
    except paths.NO_FILE_ERRORS:
      raise
    except _DAMAGE as error:  # paths.py has turned faults of the network or the disk into others
      raise Broken(f'its {self._kind} data are damaged or break off: {error}') from None
    buffer[: len(data)] = data
    self._position += len(data)
    return len(data)

  def tell(self) -> int:
    return self._position

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    target = offset + (self._position if whence == os.SEEK_CUR else 0)
    if whence == os.SEEK_END or target < self._position:
      raise io.UnsupportedOperation('compressed data are read forward only')
    buffer = memoryview(bytearray(1 << 20))
    while self._position < target and self.readinto(buffer[: target - self._position]):
      pass
    return self._position
