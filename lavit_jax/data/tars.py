"""Samples of WebDataset and img2dataset tars: consecutive members of the same key.

    000000012.jpg  000000012.txt  000000012.json
      ->  'laion/000000012', {'jpg': ..., 'txt': ..., 'json': ...}

Key and extension are those of webdataset: the extension, in lower case, is everything after the
first dot of a name without its folder; the key is what comes before it, with the folder.
docs/data-tars-parquet.md lists what is read, counted and refused.

A tar is read from front to back, from any sample on. Python's tarfile could do that too, but takes
a damaged header for the end of the archive.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Container, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from lavit_jax.data import sparse
from lavit_jax.data.archives import Broken, identify_other

BLOCK = 512
_ZEROS = bytes(BLOCK)
_WEBDATASET_NAME = re.compile(r'__[^/]*__($|/)')  # of members with its own metadata
_TYPES_WITHOUT_DATA = (
  tarfile.LNKTYPE,
  tarfile.SYMTYPE,
  tarfile.CHRTYPE,
  tarfile.BLKTYPE,
  tarfile.DIRTYPE,
  tarfile.FIFOTYPE,
)
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_IGNORED_HEADERS = (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)  # not about regular files
_SPARSE_PIECE = ('GNU.sparse.offset', 'GNU.sparse.numbytes')  # in version 0.0, once for each piece


class _Unmarked(Broken):
  """The tar ends at the end of a member, but without an end mark."""


class Sample(NamedTuple):
  """Consecutive members of one key.

  Attributes:
    start: the first byte of the sample in the tar.
    end: the byte where the next sample starts.
    key: None if there are only `unread` members, at the end of a tar.
    fields: content by extension; the first one of an extension that occurs twice.
    repeated: extensions that occur twice.
    unread: (reason, name) of members that are not read.
  """

  start: int
  end: int
  key: str | None
  fields: dict[str, bytes]
  repeated: tuple[str, ...]
  unread: tuple[tuple[str, str], ...]


class _Member(NamedTuple):
  """A member of a tar; `unread` is the reason why its content is not read, or ''."""

  start: int  # of the first header that belongs to it
  end: int
  name: str
  content: bytes
  unread: str = ''


class _Group:
  """The members of a sample as they are collected."""

  def __init__(self, start: int, requested: Container[str] | None):
    self.start = start
    self.end = start
    self.key: str | None = None
    self.fields: dict[str, bytes] = {}
    self.unread: list[tuple[str, str]] = []
    self._repeated: list[str] = []
    self._requested = requested

  def add(self, member: _Member, key: str | None) -> None:
    self.end = member.end
    if member.unread:
      self.unread.append((member.unread, member.name))
    elif key is None:
      if _is_data(member.name):
        self.unread.append(('member without extension', member.name))
    else:
      self.key = key
      self._add_field(_extension(member.name), member.content)

  def _add_field(self, extension: str, content: bytes) -> None:
    if extension in self.fields:
      self._repeated.append(extension)
    elif self._requested is None or extension in self._requested:
      self.fields[extension] = content
    else:
      self.fields[extension] = b''

  def sample(self) -> Sample:
    return Sample(
      self.start, self.end, self.key, self.fields, tuple(self._repeated), tuple(self.unread)
    )


def samples(
  file: BinaryIO, start: int = 0, requested: Container[str] | None = None
) -> Iterator[Sample]:
  """Yields the samples of a tar.

  A tar may lack its end mark. Then its last sample counts as whole if it has all the extensions of
  the one before it, or if there is none to compare it with. What follows an end mark is read as
  another tar.

  Args:
    file: an uncompressed tar.
    start: the byte to read from, where a sample starts.
    requested: extensions; the contents of others are left empty. None: all.

  Raises:
    Broken: after the last whole sample.
  """
  file.seek(start)
  group = _Group(start, requested)
  extensions_before: set[str] = set()
  try:
    for member in _members(file, start):
      if member is None:  # an end mark
        key = None
        is_new = True
      else:
        key = None if member.unread else _key(member.name)
        is_new = key not in (None, group.key)
      if is_new and group.key is not None:
        yield group.sample()
        extensions_before = set(group.fields)
        group = _Group(group.end, requested)
      if member is not None:
        group.add(member, key)
  except _Unmarked:
    if extensions_before - set(group.fields):
      raise
  if group.key is not None or group.unread:
    yield group.sample()


def _key(name: str) -> str | None:
  """'a/b.c.jpg' -> 'a/b'; None of a name without extension and of what is not data."""
  folder, slash, base = name.rpartition('/')
  stem, dot, _ = base.partition('.')
  return folder + slash + stem if stem and dot and _is_data(name) else None


def _extension(name: str) -> str:
  """'a/b.c.JPG' -> 'c.jpg'."""
  return name.rpartition('/')[2].partition('.')[2].lower()


def _is_data(name: str) -> bool:
  """Whether a member may be data.

  Hidden files, as macOS adds them ('._NAME', '.DS_Store', '__MACOSX/'), and webdataset's
  '__NAME__' are not.
  """
  base = name.rpartition('/')[2]
  if base.startswith('.') or '/__MACOSX/' in name or name.startswith('__MACOSX/'):
    return False
  return not _WEBDATASET_NAME.match(name)


def _members(file: BinaryIO, offset: int) -> Iterator[_Member | None]:
  """Yields each member except folders, and None for an end mark that something follows.

  Args:
    file: an uncompressed tar, at a header.
    offset: the position of the header.

  Raises:
    Broken: the tar is damaged, or breaks off.
    _Unmarked: it has no end mark.
  """
  start = offset  # of the first header of the next member
  pax: dict[str, Any] = {}  # what pax and GNU headers say of the next member
  marked = False
  while True:
    header = file.read(BLOCK)
    if header == _ZEROS:
      offset += BLOCK
      start = offset
      marked = True
      continue
    if not header and marked:
      return
    if not header and not pax and offset:
      raise _Unmarked('ends without an end mark')
    if marked:
      yield None
      marked = False
    parsed = _parse_header(header, file, offset)
    size = 0 if parsed.type in _TYPES_WITHOUT_DATA else int(pax.get('size', parsed.size))
    content = file.read(size)
    if len(content) < size:
      raise Broken(f'ends in the middle of {parsed.name}')
    padding = -size % BLOCK
    file.read(padding)
    offset += BLOCK + parsed.more_headers + size + padding
    if parsed.type in _PAX_TYPES:
      pax |= _parse_pax(content)
    elif parsed.type == tarfile.GNUTYPE_LONGNAME:
      pax['path'] = content.rstrip(b'\0').decode('utf-8', 'surrogateescape')
    elif parsed.type not in _IGNORED_HEADERS:
      if parsed.type != tarfile.DIRTYPE:
        yield _make_member(start, offset, parsed, pax, content)
      start = offset
      pax = {}


class _SparseMap(NamedTuple):
  """Where the data of an old GNU sparse member belong (sparse.gnu_map)."""

  pairs: list[int]
  size: int


class _Header(NamedTuple):
  """A header of a tar; `more_headers` are bytes of headers after it."""

  type: bytes
  name: str
  size: int
  sparse_map: _SparseMap | None = None
  more_headers: int = 0


def _parse_header(header: bytes, file: BinaryIO, offset: int) -> _Header:
  """Parses a header at `offset`, and reads the sparse map after it from `file`.

  Raises:
    Broken: it is no header.
  """
  parsed = _parse_plain_header(header)
  if parsed is not None:
    return parsed
  try:
    info = tarfile.TarInfo.frombuf(header, 'utf-8', 'surrogateescape')
    kind = tarfile.REGTYPE if info.isreg() else info.type
    if info.type != tarfile.GNUTYPE_SPARSE:
      return _Header(kind, info.name, info.size)
    pairs, size, more_headers = sparse.gnu_map(header, file)
    return _Header(kind, info.name, info.size, _SparseMap(pairs, size), more_headers)
  except (tarfile.HeaderError, ValueError) as error:
    other = '' if offset else identify_other(header)
    if other:
      raise Broken(f'it is {other}') from None
    if not header:
      raise Broken('it is empty') from None
    raise Broken(f'{error} at byte {offset}') from None


def _parse_plain_header(header: bytes) -> _Header | None:
  """Parses an ordinary, undamaged header of a regular file in a tenth of tarfile's time.

  None: it is another header, for tarfile to parse.
  """
  try:
    if header[156:157] != b'0' or header[345]:
      return None
    checksum = sum(header) - sum(header[148:156]) + 256
    if int(header[148:155].rstrip(b'\0 '), 8) != checksum:
      return None
    name = header[:100].partition(b'\0')[0].decode('utf-8', 'surrogateescape')
    return _Header(tarfile.REGTYPE, name, int(header[124:136].rstrip(b'\0 '), 8))
  except (ValueError, IndexError):
    return None


def _make_member(
  start: int, end: int, header: _Header, pax: Mapping[str, Any], content: bytes
) -> _Member:
  """The member of a header and the pax headers before it."""
  name = pax.get('GNU.sparse.name', pax.get('path', header.name))
  if header.type == tarfile.REGTYPE:
    unread = ''
  elif header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
    unread = 'link'
  else:
    unread = 'special member'
  try:
    if header.sparse_map:
      content = sparse.expand(header.sparse_map.pairs, header.sparse_map.size, content)
    elif 'GNU.sparse.map' in pax or 'GNU.sparse.major' in pax:
      content = sparse.expand_pax(pax, content)
  except ValueError:
    content = b''
    unread = 'damaged sparse member'
  return _Member(start, end, name, content, unread)


def _parse_pax(content: bytes) -> dict[str, Any]:
  r"""Parses a pax header: '21 path=name of a file\n' and so on.

  Returns:
    The path, the size, and what GNU tar says of sparse members.

  Raises:
    Broken: it is damaged.
  """
  values: dict[str, Any] = {}
  try:
    while content.strip(b'\0'):
      digits, _ = content.split(b' ', 1)
      length = int(digits)
      if not len(digits) < length <= len(content):
        raise ValueError(digits)
      record = content[len(digits) + 1 : length - 1]
      content = content[length:]
      name, _, value = record.decode('utf-8', 'surrogateescape').partition('=')
      if name in _SPARSE_PIECE:
        values['GNU.sparse.map'] = f'{values.get("GNU.sparse.map", "")},{value}'
      else:
        values[name] = int(value) if name == 'size' else value
  except ValueError:
    raise Broken('a pax header is damaged') from None
  return {
    name: value
    for name, value in values.items()
    if name in ('path', 'size') or name.startswith('GNU.sparse.')
  }
