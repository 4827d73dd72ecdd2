"""Captions are scored by what they name."""

import math

import pytest

from lavit_jax.data.emoji import corpus, sprites
from lavit_jax.evaluation import captions


@pytest.mark.parametrize(
  'caption, subject, background',
  [
    ('cat face, noto style, on a red background', 'cat face', 'red'),
    ('owl on an orange background', 'owl', 'orange'),
    ('man on a bike on a blue background', 'man on a bike', 'blue'),
    ('owl, noto style', 'owl, noto style', None),
    ('', '', None),
  ],
)
def test_parts_of_a_caption(caption, subject, background):
  assert captions.parse_subject(caption) == subject
  assert captions.parse_background(caption) == background


def test_every_true_caption_scores_one():
  examples = corpus.examples('embedded', 'heldout', 0, 40)
  groups = captions.groups_by_name(sprites.load('embedded'))
  truth = [example.caption.split('.')[0] for example in examples]
  scores = captions.score_captions(truth, examples, groups, examples)
  assert [scores[key] for key in ('name', 'category', 'background', 'named')] == [1, 1, 1, 1]
  assert 0 < scores['name_majority'] <= scores['category_majority'] < 1


def test_wrong_captions_score_what_is_right_in_them():
  examples = corpus.examples('embedded', 'train', 0, 200)
  pizza = next(e for e in examples if e.facts.objects[0].name == 'pizza')
  apple = next(e for e in examples if e.facts.objects[0].name == 'red apple')
  groups = captions.groups_by_name(sprites.load('embedded'))
  scores = captions.score_captions(['red apple', 'nonsense'], [pizza, apple], groups, [pizza])
  assert scores['name'] == 0
  assert scores['category'] == 0.5
  assert scores['named'] == 0.5
  assert scores['background'] == 0
  assert scores['name_majority'] == 0.5


def test_mean_of_nothing_is_not_a_number():
  assert math.isnan(captions.mean([]))
  assert captions.mean([True, False]) == 0.5
