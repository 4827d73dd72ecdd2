"""Chooses the piece of a long plain text that one row has room for.

A record gives one row an epoch. A text that is longer than a row is divided into pieces, and each
epoch takes another piece. After as many epochs as it has pieces, or a few more, the whole text was
read. The first piece depends on the text and the seed, so one epoch over many texts has openings,
middles and ends alike. The piece depends on the text, the seed and the epoch alone, so a resumed
run reads the same, with any number of processes.

A text is divided twice, because tokenizing all of it would take too long: into blocks of about
`CHARACTERS` x row length characters, which begin at a word, and the tokens of one block into equal
pieces that fit a row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import xxhash

CHARACTERS = 16  # of a block, for each token of a row: more than a row of any language has
_SPACE = re.compile(r'\s')


def select_piece(
  text: str, encode: Callable[[str], Sequence[int]], length: int, epoch: int, seed: int = 0
) -> tuple[Sequence[int], bool]:
  """Returns the ids of the piece of a text that a row has in an epoch.

  Args:
    text: clean and not empty.
    encode: a text -> its ids, without begin and end tokens.
    length: the most ids to return.
    epoch: how many times the record has been read before, from 0.
    seed: of the run.

  Returns:
    The ids, at most `length`, and whether the text ends with them.
  """
  block_size = CHARACTERS * length
  num_blocks = max(math.ceil(len(text) / block_size), 1)
  start = xxhash.xxh64_intdigest(text.encode('utf-8', 'replace'), seed)
  turn = epoch + start % num_blocks
  block = turn % num_blocks
  begin = _block_start(text, block, block_size)
  end = _block_start(text, block + 1, block_size)
  ids = encode(text[begin:end])
  num_pieces = max(math.ceil(len(ids) / length), 1)
  piece = (turn // num_blocks + (start >> 32)) % num_pieces
  piece_ids = ids[piece * len(ids) // num_pieces : (piece + 1) * len(ids) // num_pieces]
  is_end = block == num_blocks - 1 and piece == num_pieces - 1
  return piece_ids, is_end


def _block_start(text: str, block: int, block_size: int) -> int:
  """Returns where a block begins.

  That is after the first space from block * block_size on, if one is near. The block after the
  last begins at the end of the text.
  """
  position = block * block_size
  if not 0 < position < len(text):
    return min(position, len(text))
  space = _SPACE.search(text, position, position + block_size)
  return space.end() if space else position
