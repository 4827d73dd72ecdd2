"""Sparse members of tars: their data without holes, and a map that says where the data belong.

GNU tar writes them with --sparse, in one of four ways: an old one in the header (type 'S'), and
the pax versions 0.0, 0.1 (the map in the pax header) and 1.0 (the map before the data).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import BinaryIO

BLOCK = 512
_LARGEST = 1 << 30  # bytes with holes; a map may claim any size
_ENTRY = 24  # bytes of an (offset, size) pair in a header


def gnu_map(header: bytes, file: BinaryIO) -> tuple[list[int], int, int]:
  """([offset, size, offset, size ...], size with holes, bytes of further headers read from `file`).

  Raises:
    ValueError: it is damaged.
  """
  pairs = _numbers(header[386:386 + 4 * _ENTRY])
  more = header[482]
  whole = _number(header[483:495])
  read = 0
  while more:
    block = file.read(BLOCK)
    if len(block) < BLOCK:
      raise ValueError('breaks off in its map')
    read += BLOCK
    pairs += _numbers(block[:21 * _ENTRY])
    more = block[504]
  return pairs, whole, read


def expand_pax(pax: Mapping[str, str], content: bytes) -> bytes:
  """The content of a member whose pax header says that it is sparse, with its holes.

  Raises:
    ValueError: the map is damaged, or the content too large.
  """
  whole = int(pax.get('GNU.sparse.realsize', pax.get('GNU.sparse.size', -1)))
  if pax.get('GNU.sparse.major') == '1':
    count, content = _line(content)
    used = len(str(count)) + 1
    pairs = []
    for _ in range(2 * count):
      number, content = _line(content)
      used += len(str(number)) + 1
      pairs.append(number)
    content = content[-used % BLOCK:]
  else:
    pairs = [int(number) for number in pax['GNU.sparse.map'].split(',') if number]
  return expand(pairs, whole, content)


def expand(pairs: Sequence[int], whole: int, content: bytes) -> bytes:
  """`content` spread over `whole` bytes as the (offset, size) `pairs` say; the rest are zeros.

  Raises:
    ValueError: the map does not fit, or `whole` is more than a gibibyte.
  """
  if not 0 <= whole <= _LARGEST or len(pairs) % 2:
    raise ValueError(f'a map of {len(pairs)} numbers for {whole} bytes')
  spread = bytearray(whole)
  at = 0
  for offset, size in zip(pairs[::2], pairs[1::2]):
    if size < 0 or offset < 0 or offset + size > whole or at + size > len(content):
      raise ValueError('a map that does not fit')
    spread[offset:offset + size] = content[at:at + size]
    at += size
  return bytes(spread)


def _numbers(entries: bytes) -> list[int]:
  """The numbers of (offset, size) entries up to the first that is empty."""
  found = []
  for start in range(0, len(entries), _ENTRY):
    entry = entries[start:start + _ENTRY]
    if not entry[0]:
      break
    found += [_number(entry[:12]), _number(entry[12:])]
  return found


def _number(field: bytes) -> int:
  """A number of a tar header: octal digits, or with the first bit set, binary."""
  if field[0] & 0x80:
    return int.from_bytes(field[1:], 'big')
  return int(field.rstrip(b'\0 ') or b'0', 8)


def _line(content: bytes) -> tuple[int, bytes]:
  """The number in the first line, and what follows the line."""
  line, newline, rest = content.partition(b'\n')
  if not newline or len(line) > 20:
    raise ValueError('a map that breaks off')
  return int(line), rest
