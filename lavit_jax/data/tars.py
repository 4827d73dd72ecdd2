"""Samples of WebDataset and img2dataset tars: consecutive members of the same key.

    000000012.jpg  000000012.txt  000000012.json  ->  'laion/000000012', {'jpg': ..., 'txt': ..., 'json': ...}

Key and extension are webdataset's: the extension, in lower case, is all that follows the first dot
of a name without its folder; the key is what comes before it, with the folder. docs/data-tars-parquet.md
says what is read, counted and refused.

Read front to back, from any sample on; Python's tarfile, which could do that too, takes a damaged header for the end of the archive.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Container, Iterator
from typing import BinaryIO, NamedTuple

from lavit_jax.data import sparse
from lavit_jax.data.archives import Broken, what_else

BLOCK = 512
_ZEROS = bytes(BLOCK)
_META = re.compile(r'__[^/]*__($|/)')  # webdataset's own
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_HEADERS = (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)  # that say nothing of a regular file


class _Unmarked(Broken):
  """It ends at the end of a member, but without an end mark."""


class Sample(NamedTuple):
  """Consecutive members of one key, in the bytes `start` to `end` of a tar; the next sample starts there."""

  start: int
  end: int
  key: str | None  # None: nothing but `unread` members at the end of a tar
  fields: dict[str, bytes]  # by extension; of what occurs twice the first
  repeated: tuple[str, ...]  # extensions that occur twice
  unread: tuple[tuple[str, str], ...]  # (why, name) of members that are not read


class _Member(NamedTuple):
  start: int  # of the first header that belongs to it
  end: int
  name: str
  content: bytes
  unread: str = ''  # why its content is not read


def samples(file: BinaryIO, start: int = 0, wanted: Container[str] | None = None) -> Iterator[Sample]:
  """Yields each sample from byte `start` on, which is where a sample starts. Contents that are not `wanted` are left empty.

  A tar may lack its end mark. Then its last sample is taken for whole if it has all the extensions of the one before it, or
  if there is none to compare it with. Whatever follows an end mark is read on, as another tar.

  Raises:
    Broken: after the last sample that is whole.
  """
  file.seek(start)
  key, fields, repeated, unread = None, {}, [], []
  end, before = start, set()

  def made() -> Sample:
    return Sample(start, end, key, fields, tuple(repeated), tuple(unread))

  try:
    for member in _members(file, start):
      name = key if member is None or member.unread else _key(member.name)
      if member is None or name not in (None, key) and key is not None:
        if key is not None:
          yield made()
          start, before = end, set(fields)
          key, fields, repeated, unread = None, {}, [], []
        if member is None:
          continue
      end = member.end
      if member.unread:
        unread.append((member.unread, member.name))
      elif name is None:
        if _is_data(member.name):
          unread.append(('member without extension', member.name))
      else:
        key = name
        extension = member.name.rpartition('/')[2].partition('.')[2].lower()
        if extension in fields:
          repeated.append(extension)
        else:
          fields[extension] = member.content if wanted is None or extension in wanted else b''
  except _Unmarked:
    if before - set(fields):
      raise
  if key is not None or unread:
    yield made()


def _key(name: str) -> str | None:
  """'a/b.c.jpg' -> 'a/b'; None of a name without extension and of what is not data."""
  folder, slash, base = name.rpartition('/')
  stem, dot, _ = base.partition('.')
  return folder + slash + stem if stem and dot and _is_data(name) else None


def _is_data(name: str) -> bool:
  """Whether a member may be data: not a hidden file, as macOS adds ('._NAME', '.DS_Store', '__MACOSX/'), nor webdataset's '__NAME__'."""
  base = name.rpartition('/')[2]
  return not (base.startswith('.') or name.startswith('__') and (_META.match(name) or name.startswith('__MACOSX/')) or '/__MACOSX/' in name)


def _members(file: BinaryIO, offset: int) -> Iterator[_Member | None]:
  """Each member but folders; `start` is that of the long-name headers before it, if there are any. None: an end mark that something follows."""
  start, pax, marked = offset, {}, False  # what pax and GNU headers say of the next member
  while True:
    header = file.read(BLOCK)
    if header == _ZEROS:
      offset += BLOCK
      start, marked = offset, True
      continue
    if not header and marked:
      return
    if not header and not pax and offset:
      raise _Unmarked('ends without an end mark')
    if marked:
      yield None
      marked = False
    plain = _plain(header)
    extra = 0  # bytes of headers behind the first one
    spread = None
    if plain:
      kind, name, size = tarfile.REGTYPE, *plain
    else:
      try:
        info = tarfile.TarInfo.frombuf(header, 'utf-8', 'surrogateescape')
        if info.type == tarfile.GNUTYPE_SPARSE:
          *spread, extra = sparse.gnu_map(header, file)
      except (tarfile.HeaderError, ValueError) as error:
        what = what_else(header) if not offset else ''
        what = f'it is {what}' if what else f'{error} at byte {offset}' if header else 'it is empty'
        raise Broken(what) from None
      kind, name, size = tarfile.REGTYPE if info.isreg() else info.type, info.name, info.size
    size = 0 if kind in _WITHOUT_DATA else int(pax.get('size', size))
    content = file.read(size)
    if len(content) < size:
      raise Broken(f'ends in the middle of {name}')
    file.read(-size % BLOCK)
    offset += BLOCK + extra + size + -size % BLOCK
    if kind in _PAX:
      pax |= _pax(content)
      continue
    if kind == tarfile.GNUTYPE_LONGNAME:
      pax['path'] = content.rstrip(b'\0').decode('utf-8', 'surrogateescape')
      continue
    if kind in _HEADERS:
      continue
    name = pax.get('GNU.sparse.name', pax.get('path', name))
    unread = '' if kind == tarfile.REGTYPE else 'link' if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE) else 'special member'
    if spread or _is_sparse(pax):
      try:
        content = sparse.expand(*spread, content) if spread else sparse.expand_pax(pax, content)
      except ValueError:
        content, unread = b'', 'damaged sparse member'
    if kind != tarfile.DIRTYPE:
      yield _Member(start, offset, name, content, unread)
    start, pax = offset, {}


def _plain(header: bytes) -> tuple[str, int] | None:
  """Name and size of a regular file with an ordinary, sound header, in a tenth of tarfile's time; None: ask tarfile."""
  try:
    if header[156:157] != b'0' or header[345] or int(header[148:155].rstrip(b'\0 '), 8) != sum(header) - sum(header[148:156]) + 256:
      return None
    return header[:100].partition(b'\0')[0].decode('utf-8', 'surrogateescape'), int(header[124:136].rstrip(b'\0 '), 8)
  except (ValueError, IndexError):
    return None


def _pax(content: bytes) -> dict[str, str | int]:
  """'21 path=name of a file\\n' and so on; of these the path, the size, and what GNU tar says of sparse members."""
  found = {}
  try:
    while content.strip(b'\0'):
      length, _ = content.split(b' ', 1)
      if not len(length) < int(length) <= len(content):
        raise ValueError(length)
      record, content = content[len(length) + 1:int(length) - 1], content[int(length):]
      name, _, value = record.decode('utf-8', 'surrogateescape').partition('=')
      if name in ('GNU.sparse.offset', 'GNU.sparse.numbytes'):  # version 0.0 has one of each a piece
        found['GNU.sparse.map'] = f'{found.get("GNU.sparse.map", "")},{value}'
      else:
        found[name] = int(value) if name == 'size' else value
  except ValueError:
    raise Broken('a pax header is damaged') from None
  return {name: value for name, value in found.items() if name in ('path', 'size') or name.startswith('GNU.sparse.')}


def _is_sparse(pax: dict) -> bool:
  return bool(pax) and ('GNU.sparse.map' in pax or 'GNU.sparse.major' in pax)
