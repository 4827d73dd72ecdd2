"""How often a caption names what is there: by its exact name, and by its kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from lavit_jax.data.emoji.scenes import Example
from lavit_jax.data.emoji.sprites import Sprites

_TAIL = re.compile(r'(, \w+ style,?)? on an? (\w+) background$')


def subject(caption: str) -> str:
  """'cat, noto style, on a red background' -> 'cat': the caption without style and background."""
  return _TAIL.sub('', caption)


def background(caption: str) -> str | None:
  """'cat, noto style, on a red background' -> 'red'; None when it does not say."""
  found = _TAIL.search(caption)
  return found and found[2]


def spoken(name: str) -> str:
  """A name as a caption can say it: captions end at the first full stop, so 'Mrs. Claus' is 'Mrs'."""
  return name.split('.')[0].strip()


def groups_by_name(sprites: Sprites) -> dict[str, str]:
  """The group of every concept of a data set, held out or not, by its spoken name."""
  return {spoken(sprite.name): sprite.group for sprite in sprites.metadata}


def score(
  captions: Sequence[str],
  examples: Sequence[Example],
  groups: dict[str, str],
  train: Sequence[Example],
) -> dict[str, float]:
  """Scores captions of pictures of one thing each.

  Returns:
    name: share with the exact name.
    category: share that names a thing of the right group (a name that the data set does not know counts as wrong).
    background: share with the right background.
    named: share that names a thing of the data set at all, right or wrong.
    *_majority: what always saying the most frequent value of the pictures `train` would score.
  """
  said = [subject(caption) for caption in captions]
  truth = [example.facts.objects[0] for example in examples]

  def majority(value):
    ((most, _),) = Counter(map(value, train)).most_common(1)
    return mean(value(example) == most for example in examples)

  return dict(
    name=mean(text == spoken(thing.name) for text, thing in zip(said, truth)),
    category=mean(groups.get(text) == thing.group for text, thing in zip(said, truth)),
    background=mean(
      background(text) == example.facts.background for text, example in zip(captions, examples)
    ),
    named=mean(text in groups for text in said),
    name_majority=majority(lambda example: example.facts.objects[0].name),
    category_majority=majority(lambda example: example.facts.objects[0].group),
    background_majority=majority(lambda example: example.facts.background),
  )


def mean(values) -> float:
  """The mean of numbers or truths; nan of none."""
  values = [float(value) for value in values]
  return sum(values) / len(values) if values else float('nan')
