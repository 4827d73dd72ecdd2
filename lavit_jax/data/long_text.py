"""Plain text of any length -> the piece of it that one row has room for.

A record gives one row an epoch. A text that is longer than a row is divided into pieces, and each
epoch takes another one, so that all of the text is read: after as many epochs as it has pieces,
or a few more. Where it begins depends on the text and the seed, so that one epoch over many texts
reads openings, middles and ends alike. The piece depends on the text, the seed and the epoch
alone: a run that goes on, on any number of processes, reads the same.

A text is divided twice, because only the block that is needed is worth the time of the tokenizer:
into blocks of about `CHARACTERS` x row length characters, which begin at a word, and a block's
tokens into equal pieces that fit a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import xxhash

CHARACTERS = 16  # of a block, for each token of a row: more than a row of any language has
_SPACE = re.compile(r'\s')


def piece_of(
  text: str, encode: Callable[[str], Sequence[int]], length: int, epoch: int, seed: int = 0
) -> tuple[Sequence[int], bool]:
  """The ids of the piece of `text` that a row of `length` tokens has in `epoch`.

  Args:
    text: clean and not empty.
    encode: a text -> its ids, without begin and end tokens.
    length: the most ids to return.
    epoch: how many times the record has been read before, from 0.

  Returns:
    The ids, at most `length`, and whether the text ends with them.
  """
  size = CHARACTERS * length
  count = max(-(-len(text) // size), 1)
  start = xxhash.xxh64_intdigest(text.encode('utf-8', 'replace'), seed)
  turn = epoch + start % count
  block = turn % count
  ids = encode(text[_edge(text, block, size) : _edge(text, block + 1, size)])
  pieces = max(-(-len(ids) // length), 1)
  piece = (turn // count + (start >> 32)) % pieces
  ids = ids[piece * len(ids) // pieces : (piece + 1) * len(ids) // pieces]
  return ids, block == count - 1 and piece == pieces - 1


def _edge(text: str, block: int, size: int) -> int:
  """Where a block begins: behind the first space from `block` x `size` on, if one is near."""
  place = block * size
  if not 0 < place < len(text):
    return min(place, len(text))
  space = _SPACE.search(text, place, place + size)
  return space.end() if space else place
