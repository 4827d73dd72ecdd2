"""Plain text is read in full, each token once in a round of epochs, also by a resumed run."""

import collections
import json

import numpy as np
import pytest
from numbered_images import FOLDER, batches, write_tar

from lavit_jax.data import long_text, text
from lavit_jax.data.long_text import select_piece

TOKENS = text.TextTokenizer.load(FOLDER)


def letters(string: str) -> list[int]:
  return [ord(letter) for letter in string]


@pytest.mark.parametrize(
  'string',
  [
    'short',
    'x' * 100,
    ' '.join(f'word{i}' for i in range(700)),
    'no-space-' * 200,
    '\n'.join('abc' * 40),
  ],
)
def test_the_pieces_of_a_round_of_epochs_are_the_text(string):
  length = 5  # so blocks of about 80 letters, and at most 160
  most = 2 * long_text.CHARACTERS
  rounds = -(-len(string) // (long_text.CHARACTERS * length)) * most
  pieces = set()
  ends = collections.Counter()
  for epoch in range(rounds):
    ids, end = select_piece(string, letters, length, epoch)
    assert 0 < len(ids) <= length
    pieces.add(tuple(ids))
    ends[tuple(ids)] += end
  # The pieces tile the text: each piece is in it, and each letter is in a piece.
  covered = np.zeros(len(string), bool)
  for ids in pieces:
    piece = ''.join(map(chr, ids))
    start = string.find(piece)
    assert start >= 0
    while start >= 0:
      covered[start : start + len(piece)] = True
      start = string.find(piece, start + 1)
  assert covered.all()
  (last,) = [''.join(map(chr, ids)) for ids, count in ends.items() if count]
  assert string.endswith(last)


def test_one_epoch_over_many_texts_reads_openings_and_ends_alike():
  """Each of four blocks is read of a quarter of 400 texts, within 5 standard deviations."""
  blocks = collections.Counter()
  for i in range(400):
    string = f'{i:05d}' + ''.join(f'{k:03d}' for k in range(105))  # 320 letters

    def number(block, string=string):
      return [string.index(block) // 80]

    ids, _ = select_piece(string, number, 5, epoch=0)
    blocks[ids[0]] += 1
  assert set(blocks) == {0, 1, 2, 3}
  assert all(abs(count - 100) < 5 * (400 * 0.25 * 0.75) ** 0.5 for count in blocks.values())


def test_a_source_of_long_texts_gives_all_their_words(tmp_path):
  """Also line breaks and addresses; a resumed run reads the same rows."""
  documents = []
  for i in range(3):
    lines = [f'line {k} of text {i}\nhttps://a.b/{i}/{k}' for k in range(60)]
    documents.append('\n\n'.join(lines))
  write_tar(
    tmp_path / 't.tar', [(str(i), {'txt': string.encode()}) for i, string in enumerate(documents)]
  )
  source = dict(format='tars', path=str(tmp_path / 't.tar'), use='text', window=2)
  longest = max(len(TOKENS.encode(string)) for string in documents)
  rows = 3 * 4 * longest // 24  # four times what one token an id needs
  iterator = batches(source, batch_size=3)
  pieces = []
  states = []
  kept = []
  for _ in range(rows // 3):
    states.append(json.loads(json.dumps(iterator.get_state())))
    batch = next(iterator)
    kept.append(batch['text'])
    for ids, count, weights in zip(batch['text'], batch['text_length'], batch['text_weight']):
      pieces.append(TOKENS.decode(ids[:count]))
      goes_on = not any(string.endswith(pieces[-1]) for string in documents)
      assert (weights[:count] == 1).all() and not (goes_on and weights[count:].any())
  for i, string in enumerate(documents):
    assert any(piece.endswith(string[-10:]) for piece in pieces), i
    assert any(string.startswith(piece) for piece in pieces), i
  assert any('\n\n' in piece for piece in pieces) and any('https://' in piece for piece in pieces)
  resumed = batches(source, batch_size=3)
  resumed.set_state(states[7])
  np.testing.assert_array_equal(next(resumed)['text'], kept[7])
