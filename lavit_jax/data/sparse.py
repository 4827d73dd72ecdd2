"""Sparse members of tars: data without holes, and a map of where the data belong.

GNU tar writes them with --sparse, in one of four formats: an old one in the header (type 'S'), and
the pax versions 0.0, 0.1 (the map is in the pax header) and 1.0 (the map is before the data).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import BinaryIO

BLOCK = 512
_MAX_SIZE = 1 << 30  # bytes with holes; a map may claim any size
_ENTRY = 24  # bytes of an (offset, size) pair in a header


def gnu_map(header: bytes, file: BinaryIO) -> tuple[list[int], int, int]:
  """Parses the map of an old GNU sparse member.

  Args:
    header: of the member.
    file: at the byte after the header; further headers are read from it.

  Returns:
    [offset, size, offset, size ...], the size with holes, the bytes of further headers.

  Raises:
    ValueError: it is damaged.
  """
  pairs = _parse_entries(header[386 : 386 + 4 * _ENTRY])
  more = header[482]
  size = _parse_number(header[483:495])
  read = 0
  while more:
    block = file.read(BLOCK)
    if len(block) < BLOCK:
      raise ValueError('breaks off in its map')
    read += BLOCK
    pairs += _parse_entries(block[: 21 * _ENTRY])
    more = block[504]
  return pairs, size, read


def expand_pax(pax: Mapping[str, str], content: bytes) -> bytes:
  """The content with its holes of a member whose pax header marks it as sparse.

  Raises:
    ValueError: the map is damaged, or the content too large.
  """
  size = int(pax.get('GNU.sparse.realsize', pax.get('GNU.sparse.size', -1)))
  if pax.get('GNU.sparse.major') == '1':
    count, content = _split_line(content)
    used = len(str(count)) + 1
    pairs = []
    for _ in range(2 * count):
      number, content = _split_line(content)
      used += len(str(number)) + 1
      pairs.append(number)
    content = content[-used % BLOCK :]
  else:
    pairs = [int(number) for number in pax['GNU.sparse.map'].split(',') if number]
  return expand(pairs, size, content)


def expand(pairs: Sequence[int], size: int, content: bytes) -> bytes:
  """`content` spread over `size` bytes by the (offset, size) `pairs`; the rest are zeros.

  Raises:
    ValueError: the map does not fit, or `size` is more than a gibibyte.
  """
  if not 0 <= size <= _MAX_SIZE or len(pairs) % 2:
    raise ValueError(f'a map of {len(pairs)} numbers for {size} bytes')
  expanded = bytearray(size)
  start = 0
  for offset, length in zip(pairs[::2], pairs[1::2], strict=True):
    end = start + length
    if length < 0 or offset < 0 or offset + length > size or end > len(content):
      raise ValueError('a map that does not fit')
    expanded[offset : offset + length] = content[start:end]
    start = end
  return bytes(expanded)


def _parse_entries(entries: bytes) -> list[int]:
  """The numbers of (offset, size) entries up to the first empty one."""
  numbers = []
  for start in range(0, len(entries), _ENTRY):
    entry = entries[start : start + _ENTRY]
    if not entry[0]:
      break
    numbers += [_parse_number(entry[:12]), _parse_number(entry[12:])]
  return numbers


def _parse_number(field: bytes) -> int:
  """A number of a tar header: octal digits, or binary if the first bit is set."""
  if field[0] & 0x80:
    return int.from_bytes(field[1:], 'big')
  return int(field.rstrip(b'\0 ') or b'0', 8)


def _split_line(content: bytes) -> tuple[int, bytes]:
  """The number in the first line, and what follows the line."""
  line, newline, rest = content.partition(b'\n')
  if not newline or len(line) > 20:
    raise ValueError('a map that breaks off')
  return int(line), rest
