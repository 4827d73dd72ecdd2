"""Plain text is read in full: every token, once in a round of epochs; the same when a run goes on."""

import collections
import json

import numpy as np
import pytest
from things import FOLDER, batches, write_tar

from lavit_jax.data import long_text, text
from lavit_jax.data.long_text import select_piece

TOKENS = text.TextTokenizer.load(FOLDER)


def letters(words: str) -> list[int]:
  return [ord(letter) for letter in words]


@pytest.mark.parametrize(
  'words',
  [
    'short',
    'x' * 100,
    ' '.join(f'word{i}' for i in range(700)),
    'no-space-' * 200,
    '\n'.join('abc' * 40),
  ],
)
def test_the_pieces_of_a_round_of_epochs_are_the_text(words):
  length = 5  # so blocks of about 80 letters, and at most 160
  most = 2 * long_text.CHARACTERS
  rounds = -(-len(words) // (long_text.CHARACTERS * length)) * most
  pieces, ends = set(), collections.Counter()
  for epoch in range(rounds):
    ids, end = select_piece(words, letters, length, epoch)
    assert 0 < len(ids) <= length
    pieces.add(tuple(ids))
    ends[tuple(ids)] += end
  # An independent account: the pieces tile the text, so each is in it and all letters are in some.
  covered = np.zeros(len(words), bool)
  for ids in pieces:
    piece = ''.join(map(chr, ids))
    start = words.find(piece)
    assert start >= 0
    while start >= 0:
      covered[start : start + len(piece)] = True
      start = words.find(piece, start + 1)
  assert covered.all()
  (last,) = [''.join(map(chr, ids)) for ids, count in ends.items() if count]
  assert words.endswith(last)


def test_one_epoch_over_many_texts_reads_openings_and_ends_alike():
  """Of 400 texts of four equal blocks: a share within 5 standard deviations of a quarter."""
  places = collections.Counter()
  for i in range(400):
    words = f'{i:05d}' + ''.join(f'{k:03d}' for k in range(105))  # 320 letters
    ids, _ = select_piece(words, lambda block: [words.index(block) // 80], 5, epoch=0)
    places[ids[0]] += 1
  assert set(places) == {0, 1, 2, 3}
  assert all(abs(count - 100) < 5 * (400 * 0.25 * 0.75) ** 0.5 for count in places.values())


def test_a_source_of_long_texts_gives_all_their_words(tmp_path):
  """And their line breaks and addresses; a run that goes on reads the same rows."""
  documents = []
  for i in range(3):
    lines = [f'line {k} of text {i}\nhttps://a.b/{i}/{k}' for k in range(60)]
    documents.append('\n\n'.join(lines))
  write_tar(
    tmp_path / 't.tar', [(str(i), {'txt': words.encode()}) for i, words in enumerate(documents)]
  )
  source = dict(format='tars', path=str(tmp_path / 't.tar'), use='text', window=2)
  longest = max(len(TOKENS.encode(words)) for words in documents)
  rows = 3 * 4 * longest // 24  # four times what one token an id needs
  iterator, found, states, kept = batches(source, batch_size=3), [], [], []
  for step in range(rows // 3):
    states.append(json.loads(json.dumps(iterator.get_state())))
    batch = next(iterator)
    kept.append(batch['text'])
    for ids, count, weights in zip(batch['text'], batch['text_length'], batch['text_weight']):
      found.append(TOKENS.decode(ids[:count]))
      goes_on = not any(words.endswith(found[-1]) for words in documents)
      assert (weights[:count] == 1).all() and not (goes_on and weights[count:].any())
  for i, words in enumerate(documents):
    assert any(piece.endswith(words[-10:]) for piece in found), i
    assert any(words.startswith(piece) for piece in found), i
  assert any('\n\n' in piece for piece in found) and any('https://' in piece for piece in found)
  again = batches(source, batch_size=3)
  again.set_state(states[7])
  np.testing.assert_array_equal(next(again)['text'], kept[7])
