"""Answers are scored by type, beside the usual answer of the training split."""

import pytest

from lavit_jax.data.emoji import corpus
from lavit_jax.evaluation import vqa


@pytest.mark.parametrize(
  'answer, same',
  [
    ('Yes', 'yes'),
    ('an owl.', 'owl'),
    ('  The owl\nQuestion: what', 'owl'),
    ('red, I think', 'red'),
    ('', ''),
    ('theatre', 'theatre'),
  ],
)
def test_normalise(answer, same):
  assert vqa.normalise(answer) == same


def test_majority_and_score_by_type():
  train = [
    vqa.VQAExample(0, 'colour', 'q', 'red'),
    vqa.VQAExample(0, 'colour', 'q', 'Red'),
    vqa.VQAExample(1, 'colour', 'q', 'blue'),
    vqa.VQAExample(1, 'colour', 'the sky?', 'blue'),
    vqa.VQAExample(2, 'colour', 'q', 'red'),
    vqa.VQAExample(1, 'yes/no', 'q?', 'no'),
  ]
  usual = vqa.fit_majority(train)
  assert usual == ({'colour': 'red', 'yes/no': 'no'}, {'q': 'red', 'the sky?': 'blue', 'q?': 'no'})
  asked = [
    vqa.VQAExample(0, 'colour', 'q', 'red'),
    vqa.VQAExample(0, 'colour', 'the sky?', 'blue'),
    vqa.VQAExample(0, 'yes/no', 'new', 'yes'),
    vqa.VQAExample(0, 'what', 'what?', 'owl'),
  ]
  scores = vqa.score(['blue', 'Blue.', 'yes', 'an owl'], asked, usual)
  assert scores['colour'] == dict(accuracy=0.5, majority=0.5, blind=1.0, count=2)
  assert scores['yes/no'] == dict(accuracy=1.0, majority=0.0, blind=0.0, count=1)
  assert scores['what'] == dict(accuracy=1.0, majority=0.0, blind=0.0, count=1)
  assert scores['all'] == dict(accuracy=0.75, majority=0.25, blind=0.5, count=4)
  with pytest.raises(ValueError):
    vqa.score(['one'], asked, usual)


def test_true_answers_score_one():
  asked = vqa.ask(
    corpus.examples('embedded', 'heldout', 1, 10, 'scene')
    + corpus.examples('embedded', 'heldout', 1, 10)
  )
  scores = vqa.score([each.answer for each in asked], asked, vqa.fit_majority(asked))
  assert {kind: row['accuracy'] for kind, row in scores.items()} == dict.fromkeys(scores, 1.0)
  assert scores['all']['count'] == len(asked) and 0 < scores['all']['majority'] < 1
