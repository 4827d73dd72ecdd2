"""Composes examples: sprites on a background, and the caption and the facts that follow from where they were put.

Everything is a function of (seed, index): no state, no files, the same example on any machine and any number of workers.
Pictures are laid out on a canvas of 64 x 64 units and painted at any size.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from lavit_jax.data.emoji import colors, grammar, questions, splits
from lavit_jax.data.emoji.sprites import Sprites

CANVAS = 64
_WHITE_SHARE = 0.25  # Plain white is what most pictures of things have behind them.


class SceneObject(NamedTuple):
  """Equal sprites of a picture. boxes: (left, top, side) of each, in canvas units."""

  sprite: int
  codepoint: str
  name: str
  group: str
  colour: str
  boxes: tuple[tuple[float, float, float], ...]

  @property
  def count(self) -> int:
    return len(self.boxes)


class Facts(NamedTuple):
  """What is true of a picture. relation: where things[0] is, seen from things[1] ('left' or 'above'), or None.

  heldout: None in training, else why the picture cannot occur there ('concept', 'pair' or 'combination').
  """

  index: int
  style: str
  background: str
  things: tuple[SceneObject, ...]
  relation: str | None
  heldout: str | None


class Example(NamedTuple):
  """image: uint8[H, W, 3]; questions: (type, question, answer) triples, see questions.py."""

  image: np.ndarray
  caption: str
  questions: tuple[tuple[str, str, str], ...]
  facts: Facts


class Composer:
  """Makes the examples of one split. `composer(seed, index)` is an Example; raises ValueError if the split is empty."""

  def __init__(
    self, sprites: Sprites, split: str = 'train', scene_share: float = 0.3, image_size: int = 64
  ):
    self.sprites, self.scene_share, self.image_size = sprites, scene_share, image_size
    rows = sprites.rows
    concept = np.array([splits.heldout_concept(row.codepoint) for row in rows])
    pair = np.array([splits.heldout_pair(row.style, row.codepoint) for row in rows]) & ~concept
    trained = ~concept & ~pair
    self.heldout_names = frozenset(row.name for row, heldout in zip(rows, concept) if heldout)
    combined = trained & np.array(
      [
        any(splits.heldout_combination(row.group, name) for name in colors.BACKGROUNDS)
        for row in rows
      ]
    )
    focus = {None: trained, 'concept': concept, 'pair': pair, 'combination': combined}
    wanted = splits.parse(split) or (None,)
    self._focus = {
      reason: np.flatnonzero(focus[reason]) for reason in wanted if focus[reason].any()
    }
    if not self._focus:
      raise ValueError(f'none of the {len(rows)} sprites belongs to the split {split!r}')
    self._companions = {
      style: np.flatnonzero(trained & np.array([row.style == style for row in rows]))
      for style in dict.fromkeys(row.style for row in rows)
    }
    # A wrong answer comes from where the right one does, or else 'never heard of it' would mean 'yes'.
    names = {
      reason: sorted({rows[i].name for i in members}) for reason, members in self._focus.items()
    }
    known = sorted({rows[i].name for i in np.flatnonzero(trained)})
    self._names = {reason: own if len(own) > 8 else known for reason, own in names.items()}

  def __call__(self, seed: int, index: int) -> Example:
    rng = np.random.default_rng((seed, index))
    reason = list(self._focus)[rng.integers(len(self._focus))]
    focus = _any(rng, self._focus[reason])
    if rng.random() < self.scene_share:
      layout, relation = self._scene(rng, focus)
    else:
      side = rng.uniform(52, 64)
      layout, relation = [(focus, ((*rng.uniform(0, CANVAS - side, 2), side),))], None
    things = tuple(self._thing(sprite, boxes) for sprite, boxes in layout)
    background = _background(rng, things, reason)
    facts = Facts(index, self.sprites.rows[focus].style, background, things, relation, reason)
    asked = questions.ask(rng, facts, self._names[reason])
    return Example(self._paint(rng, facts), _caption(rng, facts), asked, facts)

  def _thing(self, sprite: int, boxes) -> SceneObject:
    row = self.sprites.rows[sprite]
    return SceneObject(int(sprite), row.codepoint, row.name, row.group, row.colour, tuple(boxes))

  def _scene(self, rng, focus):
    """Two to four sprites: equal ones in the quarters of the picture, or two kinds in its halves."""
    half = CANVAS / 2
    if rng.random() < 0.4:
      quarters = rng.permutation(4)[: rng.integers(2, 5)]
      return [
        (focus, [_box(rng, half * (q % 2), half * (q // 2), half, half) for q in quarters])
      ], None
    companions = self._companions[self.sprites.rows[focus].style]
    other = _any(rng, companions)
    while self.sprites.rows[other].name == self.sprites.rows[focus].name:
      other = _any(rng, companions)
    counts = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1))[rng.integers(6)]
    relation = ('left', 'above')[rng.integers(2)]
    layout = []
    for sprite, count, offset in zip(rng.permutation([focus, other]), counts, (0, half)):
      step = CANVAS / count
      slots = [
        (offset, step * i, half, step) if relation == 'left' else (step * i, offset, step, half)
        for i in range(count)
      ]
      layout.append((sprite, [_box(rng, *slot) for slot in slots]))
    return layout, relation

  def _paint(self, rng, facts: Facts) -> np.ndarray:
    colour = np.array(colors.BACKGROUNDS[facts.background]) + rng.integers(
      -colors.JITTER, colors.JITTER + 1, 3
    )
    image = Image.new('RGB', (self.image_size, self.image_size), tuple(colour.tolist()))
    scale = self.image_size / CANVAS
    for thing in facts.things:
      pixels = self.sprites.pixels[thing.sprite]
      source = Image.frombuffer(
        'RGBa', pixels.shape[1::-1], pixels
      )  # Premultiplied: resizing must not bleed.
      for left, top, side in thing.boxes:
        size = max(1, int(side * scale))
        sprite = source.resize((size, size), Image.Resampling.BOX).convert('RGBA')
        image.paste(sprite, (int(left * scale), int(top * scale)), sprite)
    return np.array(image)


def _any(rng, choices):
  return choices[rng.integers(len(choices))]  # `rng.choice` takes five times as long.


def _box(rng, left: float, top: float, width: float, height: float) -> tuple[float, float, float]:
  """A square of 20 to 30 units somewhere in a slot."""
  side = rng.uniform(20, min(30, width, height))
  return (
    float(left + rng.uniform(0, width - side)),
    float(top + rng.uniform(0, height - side)),
    float(side),
  )


def _background(rng, things: tuple[SceneObject, ...], reason: str | None) -> str:
  """A colour on which the things may stand for this reason, and, if possible, none of them has."""

  def heldout(colour):
    return any(splits.heldout_combination(thing.group, colour) for thing in things)

  allowed = [
    colour for colour in colors.BACKGROUNDS if heldout(colour) == (reason == 'combination')
  ]
  clear = [
    colour for colour in allowed if all(colour != thing.colour for thing in things)
  ] or allowed
  if 'white' in clear and rng.random() < _WHITE_SHARE:
    return 'white'
  return _any(rng, clear)


def _caption(rng, facts: Facts) -> str:
  first, *others = facts.things
  if others:
    phrases = [grammar.counted(thing.name, thing.count) for thing in facts.things]
    if rng.random() < 0.5:
      relation = facts.relation
    else:
      relation, phrases = questions.OPPOSITE[facts.relation], phrases[::-1]
    subject = f'{phrases[0]} {questions.PREPOSITION[relation]} {phrases[1]}'
  else:
    subject = first.name if first.count == 1 else grammar.counted(first.name, first.count)
  style = f', {facts.style} style,' if rng.random() < 0.5 else ''
  return f'{subject}{style} on {grammar.indefinite(facts.background)} background'
