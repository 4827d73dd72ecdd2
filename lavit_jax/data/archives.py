"""A tar's file -> its plain bytes. What compresses it is known by its content, not by its name.

| content | read by |
|---|---|
| a tar | as it is |
| gzip, bzip2, xz | the standard library |
| zstd | pyarrow |

A position in a compressed tar counts its plain bytes: whoever goes on at one decompresses what lies
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
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow

from lavit_jax.data import paths

ENDINGS = ('.tar', '.tar.gz', '.tgz', '.tar.bz2', '.tbz2', '.tbz', '.tar.xz', '.txz', '.tar.zst',
           '.tzst')
_MAGIC = {b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zXZ\0': 'xz', b'\x28\xb5\x2f\xfd': 'zstd'}
_DECOMPRESS = {
    'gzip': lambda file: gzip.GzipFile(fileobj=file),
    'bzip2': bz2.BZ2File,
    'xz': lzma.LZMAFile,
    'zstd': lambda file: pyarrow.CompressedInputStream(file, 'zstd'),
}
_OTHERS = {  # what people take for a tar
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
def open_tar(path: str, kinds: dict[str, str] | None = None, **options) -> Iterator[BinaryIO]:
  """Opens a tar, compressed or not, for reading and for seeking forward.

  `kinds` remembers what the paths that were opened before are compressed with, for from a store
  far away it costs time to look again. `options` are those of `paths.open_file`, which also says
  what it raises. Reading raises Broken where compressed data are damaged or break off.
  """
  kinds = {} if kinds is None else kinds
  with paths.open_file(path, **options) as raw:
    if path not in kinds:
      kinds[path] = _kind(raw.read(8))
      raw.seek(0)
    if not kinds[path]:
      yield raw
      return
    with io.BufferedReader(_Decompressed(raw, kinds[path]), 1 << 20) as file:
      yield file


def _kind(head: bytes) -> str:
  """What compresses a file that begins with `head`; '' of a plain one."""
  for magic, kind in _MAGIC.items():
    if head.startswith(magic):
      return kind
  return ''


def what_else(head: bytes) -> str:
  """What a file is that begins with `head` and is no tar; '' if that is not known."""
  for magic, name in _OTHERS.items():
    if head.startswith(magic):
      return name
  return ''


def stem(path: str) -> str:
  """The name of a tar's file without folders and without its ending: 'a/0.tar.gz' -> '0'."""
  name = os.path.basename(path)
  for ending in sorted(ENDINGS, key=len, reverse=True):
    if name.lower().endswith(ending) and len(name) > len(ending):
      return name[:-len(ending)]
  return os.path.splitext(name)[0]


class _Decompressed(io.RawIOBase):
  """The plain bytes of a compressed file, from front to back."""

  def __init__(self, raw: BinaryIO, kind: str):
    self._kind = kind
    self._at = 0
    self._file = _DECOMPRESS[kind](raw)

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    try:
      data = self._file.read(len(buffer))
    except paths.NO_FILE:
      raise
    except _DAMAGE as error:  # a fault of the network or the disk is none of these by now (paths.py)
      raise Broken(f'its {self._kind} data are damaged or break off: {error}') from None
    buffer[:len(data)] = data
    self._at += len(data)
    return len(data)

  def tell(self) -> int:
    return self._at

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    target = offset + (self._at if whence == os.SEEK_CUR else 0)
    if whence == os.SEEK_END or target < self._at:
      raise io.UnsupportedOperation('compressed data are read forward only')
    room = memoryview(bytearray(1 << 20))
    while self._at < target and self.readinto(room[:target - self._at]):
      pass
    return self._at
