"""Scores captions by what they name: the emoji, its group, and the background."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from lavit_jax.data.emoji.scenes import Example
from lavit_jax.data.emoji.sprites import Sprites

_TAIL = re.compile(r'(, \w+ style,?)? on an? (\w+) background$')


def parse_subject(caption: str) -> str:
  """Returns 'cat' of 'cat, noto style, on a red background'."""
  return _TAIL.sub('', caption)


def parse_background(caption: str) -> str | None:
  """Returns 'red' of 'cat, noto style, on a red background'; None if there is no background."""
  match = _TAIL.search(caption)
  return match[2] if match else None


def spoken_name(name: str) -> str:
  """Returns a name as captions have it: they end at a full stop, so 'Mrs. Claus' is 'Mrs'."""
  return name.split('.')[0].strip()


def groups_by_name(sprites: Sprites) -> dict[str, str]:
  """Returns the group of every concept of a data set, held out or not, by its spoken name."""
  return {spoken_name(sprite.name): sprite.group for sprite in sprites.metadata}


def score_captions(
  captions: Sequence[str],
  examples: Sequence[Example],
  groups: dict[str, str],
  train: Sequence[Example],
) -> dict[str, float]:
  """Scores captions of images of one sprite each.

  Args:
    captions: one for each example.
    examples: the images.
    groups: of `groups_by_name`.
    train: training examples, for the baseline.

  Returns:
    name: fraction of captions with the exact name.
    category: fraction with a name of the right group; an unknown name is wrong.
    background: fraction with the right background.
    named: fraction with a name of the data set, right or wrong.
    *_majority: what the most frequent value of `train` would score.
  """
  subjects = [parse_subject(caption) for caption in captions]
  objects = [example.facts.objects[0] for example in examples]

  def majority(value: Callable[[Example], str]) -> float:
    ((most_common, _),) = Counter(map(value, train)).most_common(1)
    return mean(value(example) == most_common for example in examples)

  has_name = [
    subject == spoken_name(item.name) for subject, item in zip(subjects, objects, strict=True)
  ]
  has_group = [
    groups.get(subject) == item.group for subject, item in zip(subjects, objects, strict=True)
  ]
  has_background = [
    parse_background(caption) == example.facts.background
    for caption, example in zip(captions, examples, strict=True)
  ]
  return {
    'name': mean(has_name),
    'category': mean(has_group),
    'background': mean(has_background),
    'named': mean(subject in groups for subject in subjects),
    'name_majority': majority(lambda example: example.facts.objects[0].name),
    'category_majority': majority(lambda example: example.facts.objects[0].group),
    'background_majority': majority(lambda example: example.facts.background),
  }


def mean(values: Iterable[float]) -> float:
  """Returns the mean of numbers or booleans; NaN if there are none."""
  values = [float(value) for value in values]
  return sum(values) / len(values) if values else float('nan')
