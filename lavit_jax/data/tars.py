"""Samples of WebDataset and img2dataset tars: consecutive members whose names are the same up to the first dot.

    000000012.jpg  000000012.txt  000000012.json  ->  'laion/000000012', {'jpg': ..., 'txt': ..., 'json': ...}

Read front to back, from any sample on; Python's tarfile, which could do that too, takes a damaged header for the end of the archive.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

BLOCK = 512


class Broken(Exception):
  """The tar ends in the middle of a sample, or a header is damaged; what follows is lost."""


class _Unmarked(Broken):
  """It ends at the end of a member, but without an end mark."""


def samples(file: BinaryIO, start: int = 0) -> Iterator[tuple[int, int, str, dict[str, bytes]]]:
  """Yields (start, end, key, {extension: content}) of each sample from byte `start` on, which is where a sample starts.

  A tar may lack its end mark. Then its last sample is taken for whole if it has all the extensions of the one before it, or
  if there is none to compare it with.

  Raises:
    Broken: after the last sample that is whole.
  """
  file.seek(start)
  key, sample, end, before = None, {}, start, set()
  try:
    for offset, end, name, content in _members(file, start):
      folder, slash, base = name.rpartition('/')
      stem, _, extension = base.partition('.')
      if key not in (None, folder + slash + stem):
        yield start, offset, key, sample
        start, sample, before = offset, {}, set(sample)
      key = folder + slash + stem
      sample[extension.lower()] = content
  except _Unmarked:
    if before - set(sample):
      raise
  if key is not None:
    yield start, end, key, sample


def _members(file: BinaryIO, offset: int) -> Iterator[tuple[int, int, str, bytes]]:
  """(start, end, name, content) of each regular file; `start` is that of the long-name headers before it, if there are any."""
  start, given = offset, {}  # what pax and GNU headers say of the next member
  while True:
    header = file.read(BLOCK)
    if not header and not given and offset:
      raise _Unmarked('ends without an end mark')
    plain = _plain(header)
    if plain:
      kind, name, size = tarfile.REGTYPE, *plain
    else:
      try:
        info = tarfile.TarInfo.frombuf(header, 'utf-8', 'surrogateescape')
      except tarfile.EOFHeaderError:
        return
      except tarfile.HeaderError as error:
        raise Broken(f'{error} at byte {offset}') from None
      kind, name, size = tarfile.REGTYPE if info.isreg() else info.type, info.name, info.size
    size = given.get('size', size)
    content = file.read(size)
    if len(content) < size:
      raise Broken(f'ends in the middle of {name}')
    file.read(-size % BLOCK)
    offset += BLOCK + size + -size % BLOCK
    if kind == tarfile.XHDTYPE:
      given |= _pax(content)
    elif kind == tarfile.GNUTYPE_LONGNAME:
      given['path'] = content.rstrip(b'\0').decode('utf-8', 'surrogateescape')
    else:
      if kind == tarfile.REGTYPE:
        yield start, offset, given.get('path', name), content
      start, given = offset, {}


def _plain(header: bytes) -> tuple[str, int] | None:
  """Name and size of a regular file with an ordinary, sound header, in a tenth of tarfile's time; None: ask tarfile."""
  try:
    if header[156:157] != b'0' or header[345] or int(header[148:155].rstrip(b'\0 '), 8) != sum(header) - sum(header[148:156]) + 256:
      return None
    return header[:100].partition(b'\0')[0].decode('utf-8', 'surrogateescape'), int(header[124:136].rstrip(b'\0 '), 8)
  except (ValueError, IndexError):
    return None


def _pax(content: bytes) -> dict[str, str | int]:
  """'21 path=name of a file\\n' and so on; of these the path and the size."""
  found = {}
  try:
    while content.strip(b'\0'):
      length, _ = content.split(b' ', 1)
      if not len(length) < int(length) <= len(content):
        raise ValueError(length)
      record, content = content[len(length) + 1:int(length) - 1], content[int(length):]
      name, _, value = record.decode('utf-8', 'surrogateescape').partition('=')
      found[name] = int(value) if name == 'size' else value
  except ValueError:
    raise Broken('a pax header is damaged') from None
  return {name: found[name] for name in ('path', 'size') if name in found}
