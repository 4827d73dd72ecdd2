"""Examples and sentences of the emoji data set, for evaluation, the demo and the tokenizer."""

from collections.abc import Iterator
from typing import Literal

from lavit_jax.data import prompts
from lavit_jax.data.emoji import questions, sprites
from lavit_jax.data.emoji.scenes import Composer, Example

_SCENE_SHARES = {'single': 0.0, 'scene': 1.0}
_MAX_KEYWORDS = 2
_MAX_KEYWORD_LENGTH = 24  # characters


def examples(
  source: str = 'embedded',
  split: str = 'heldout',
  seed: int = 0,
  count: int = 8,
  kind: Literal['single', 'scene'] = 'single',
  image_size: int = 64,
) -> list[Example]:
  """Composes the first examples of a split.

  Args:
    source: 'embedded' or the data_dir of the emoji data set.
    split: 'train', 'heldout' or 'heldout/REASON' (splits.py).
    seed: of the composer.
    count: number of examples.
    kind: 'single' for images of one sprite, 'scene' for images of several.
    image_size: side of the images in pixels.

  Raises:
    FileNotFoundError: there is no such data set.
    ValueError: the split is unknown or empty.
  """
  composer = Composer(sprites.load(source), split, _SCENE_SHARES[kind], image_size)
  return [composer(seed, index) for index in range(count)]


def describe_sprite(composer: Composer, sprite: int) -> str:
  """Describes an emoji in words.

  The form is 'owl: bird of prey. Kind: nature, animal bird.'

  Keywords that contain a held-out name are left out: 'information desk person' would teach
  'information'.
  """
  fields = composer.sprites.metadata[sprite]
  heldout_names = composer.heldout_names - {fields.name}
  keywords = []
  for keyword in fields.keywords.split(', '):
    has_heldout_name = any(f' {name} ' in f' {keyword} ' for name in heldout_names)
    if len(keyword) <= _MAX_KEYWORD_LENGTH and not has_heldout_name:
      keywords.append(keyword)
  spoken_keywords = ', '.join(keywords[:_MAX_KEYWORDS])
  kind = f'{questions.CATEGORIES[fields.group]}, {fields.subgroup.replace("-", " ")}'
  if spoken_keywords:
    return f'{fields.name}: {spoken_keywords}. Kind: {kind}.'
  return f'{fields.name}. Kind: {kind}.'


def training_texts(source: str = 'embedded', count: int = 20_000, seed: int = 0) -> Iterator[str]:
  """Yields captions, descriptions, and questions with answers of `count` training examples."""
  composer = Composer(sprites.load(source), 'train')
  for index in range(count):
    example = composer(seed, index)
    yield example.caption
    yield describe_sprite(composer, example.facts.objects[0].sprite)
    for _, question, answer in example.questions:
      yield f'{prompts.question_prompt(question)} {answer}'
