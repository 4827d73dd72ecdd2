"""Captions are scored by what they name."""

import math

import pytest

from lavit_jax.data.emoji import corpus, sprites
from lavit_jax.evaluation import captions as captioning


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
def test_a_caption_is_taken_apart(caption, subject, background):
  assert captioning.subject(caption) == subject
  assert captioning.background(caption) == background


def test_every_true_caption_scores_one():
  examples = corpus.examples('embedded', 'heldout', 0, 40)
  groups = captioning.groups_by_name(sprites.load('embedded'))
  captions = [example.caption.split('.')[0] for example in examples]
  scores = captioning.score(captions, examples, groups, examples)
  assert [scores[key] for key in ('name', 'category', 'background', 'named')] == [1, 1, 1, 1]
  assert 0 < scores['name_majority'] <= scores['category_majority'] < 1


def test_wrong_captions_score_what_they_got_right():
  examples = corpus.examples('embedded', 'train', 0, 200)
  pizza = [e for e in examples if e.facts.objects[0].name == 'pizza'][:1]
  apple = [e for e in examples if e.facts.objects[0].name == 'red apple'][:1]
  groups = captioning.groups_by_name(sprites.load('embedded'))
  scores = captioning.score(['red apple', 'nonsense'], pizza + apple, groups, pizza)
  assert (scores['name'], scores['category'], scores['named'], scores['background']) == (
    0,
    0.5,
    0.5,
    0,
  )
  assert scores['name_majority'] == 0.5


def test_mean_of_nothing_is_not_a_number():
  assert math.isnan(captioning.mean([])) and captioning.mean([True, False]) == 0.5
