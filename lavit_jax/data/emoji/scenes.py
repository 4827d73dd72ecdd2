"""Composes examples: sprites on a background, with the caption and the facts of their layout.

An example is a function of (seed, index) alone, so it is the same on every machine and for every
number of workers. The layout is on a canvas of 64 x 64 units, and is drawn at any size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from lavit_jax.data.emoji import colors, grammar, questions, splits
from lavit_jax.data.emoji.facts import CANVAS, Facts, Question, SceneObject
from lavit_jax.data.emoji.sprites import Sprite, Sprites

_WHITE_SHARE = 0.25  # of backgrounds, as many images of single things have a white one
_REPEATED_SHARE = 0.4  # of scenes: two to four equal sprites
_SINGLE_SIDES = (28, 64)  # of the sprite in images of one; those of scenes have 20 to 30 units
_TURN = 12  # degrees to either side, when sprites are augmented
_STRETCH = 0.12  # of either side of a sprite, at most
_COLOR_GAIN = 0.12  # of the colors of an image, at most; a third of it differs between channels
_COUNTS = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1))  # of the two objects of other scenes
_OPAQUE = [0] * 128 + [255] * 128  # alpha -> whether it covers most of a pixel
_MIN_NAMES = 8  # of held-out emoji, for wrong answers that are held out too

_Box = tuple[float, float, float]  # left, top, side
_Layout = list[tuple[int, list[_Box]]]  # (sprite, boxes) of each object


class Example(NamedTuple):
  """A composed image with its text.

  Attributes:
    image: uint8[H, W, 3].
    caption: one of several wordings.
    questions: with answers.
    facts: the composition.
    object_map: uint8[H, W], what covers most of each pixel: 0 the background, i + 1 a sprite of
      `facts.objects[i]`.
  """

  image: np.ndarray
  caption: str
  questions: tuple[Question, ...]
  facts: Facts
  object_map: np.ndarray


class Composer:
  """Composes the examples of one split; `composer(seed, index)` is an `Example`.

  Args:
    sprites: of a data set.
    split: 'train', 'heldout' or 'heldout/REASON' (splits.py).
    scene_share: share of examples that show several sprites.
    image_size: side of the images in pixels.
    augment: turn and stretch each sprite a little, and change the colors of each image a little.

  Attributes:
    trained_sprites: i64[T], indices of the sprites of training images, whatever the split.

  Raises:
    ValueError: the split is unknown, or none of the sprites belongs to it.
  """

  def __init__(
    self,
    sprites: Sprites,
    split: str = 'train',
    scene_share: float = 0.3,
    image_size: int = 64,
    augment: bool = False,
  ):
    self.sprites = sprites
    self.augment = augment
    self.scene_share = scene_share
    self.image_size = image_size
    metadata = sprites.metadata
    members = _members_by_reason(metadata)
    trained = members[None]
    self.heldout_names = frozenset(metadata[i].name for i in members['concept'])
    self.trained_sprites = trained
    self._all_members = members
    self._members = {}
    for reason in _reasons(split):
      if len(members[reason]):
        self._members[reason] = members[reason]
    if not self._members:
      raise ValueError(f'none of the {len(metadata)} sprites belongs to the split {split!r}')
    styles = np.array([sprite.style for sprite in metadata])
    companions = np.concatenate([trained, members['style']])
    self._companions = {
      style: companions[styles[companions] == style] for style in dict.fromkeys(styles.tolist())
    }
    # Wrong answers come from the same names as right ones. Otherwise an unknown name would tell
    # the answer.
    trained_names = _names(metadata, trained)
    self._names = {}
    for reason, indices in self._members.items():
      names = _names(metadata, indices)
      self._names[reason] = names if len(names) > _MIN_NAMES else trained_names

  def has_split(self, split: str) -> bool:
    """Whether any of the sprites belongs to a split.

    Raises:
      ValueError: the split is unknown.
    """
    return any(len(self._all_members[reason]) for reason in _reasons(split))

  def __call__(self, seed: int, index: int) -> Example:
    """Composes one example."""
    rng = np.random.default_rng((seed, index))
    reason = list(self._members)[rng.integers(len(self._members))]
    focus = _choose(rng, self._members[reason])
    if rng.random() < self.scene_share:
      layout, relation = self._scene_layout(rng, focus)
    else:
      side = rng.uniform(*_SINGLE_SIDES)
      layout = [(focus, [(*rng.uniform(0, CANVAS - side, 2), side)])]
      relation = None
    objects = tuple(self._scene_object(sprite, boxes) for sprite, boxes in layout)
    background = _choose_background(rng, objects, reason)
    style = self.sprites.metadata[focus].style
    facts = Facts(index, style, background, objects, relation, reason)
    scene_questions = questions.make_questions(rng, facts, self._names[reason])
    image, object_map = self._render(rng, facts)
    return Example(image, _write_caption(rng, facts), scene_questions, facts, object_map)

  def draw(self, facts: Facts) -> np.ndarray:
    """Draws an image of given facts, uint8[H, W, 3].

    Args:
      facts: of an example of these sprites, perhaps with other boxes, or without objects.
    """
    image, _ = self._render(np.random.default_rng(0), facts)
    return image

  def _scene_object(self, sprite: int, boxes: list[_Box]) -> SceneObject:
    fields = self.sprites.metadata[sprite]
    return SceneObject(
      int(sprite), fields.codepoint, fields.name, fields.group, fields.color, tuple(boxes)
    )

  def _scene_layout(self, rng: np.random.Generator, focus: int) -> tuple[_Layout, str | None]:
    """Places two to four sprites: equal ones in quarters of the image, or two kinds in its halves.

    Returns:
      The layout, and the relation of its first object to its second.
    """
    half = CANVAS / 2
    if rng.random() < _REPEATED_SHARE:
      quarters = rng.permutation(4)[: rng.integers(2, 5)]
      boxes = [_place_box(rng, half * (q % 2), half * (q // 2), half, half) for q in quarters]
      return [(focus, boxes)], None
    other = self._companion(rng, focus)
    counts = _COUNTS[rng.integers(len(_COUNTS))]
    relation = ('left', 'above')[rng.integers(2)]
    layout = []
    for sprite, count, offset in zip(
      rng.permutation([focus, other]), counts, (0, half), strict=True
    ):
      step = CANVAS / count
      boxes = []
      for i in range(count):
        if relation == 'left':
          boxes.append(_place_box(rng, offset, step * i, half, step))
        else:
          boxes.append(_place_box(rng, step * i, offset, step, half))
      layout.append((sprite, boxes))
    return layout, relation

  def _companion(self, rng: np.random.Generator, focus: int) -> int:
    """Draws a sprite of a trained concept, of the same style and another name."""
    metadata = self.sprites.metadata
    companions = self._companions[metadata[focus].style]
    other = _choose(rng, companions)
    while metadata[other].name == metadata[focus].name:
      other = _choose(rng, companions)
    return other

  def object_mask(self, facts: Facts) -> np.ndarray:
    """Returns how much of each pixel the sprites cover, f32[H, W] in 0..1.

    Args:
      facts: of an example that this composer, or another one with the same sprites, composed.
    """
    mask = Image.new('L', (self.image_size, self.image_size))
    for _, sprite, corner in self._scaled_sprites(facts):
      mask.paste(255, corner, sprite.getchannel('A'))
    return np.array(mask, np.float32) / 255

  def _render(self, rng: np.random.Generator, facts: Facts) -> tuple[np.ndarray, np.ndarray]:
    """Draws the image and its object map (`Example`)."""
    jitter = rng.integers(-colors.JITTER, colors.JITTER + 1, 3)
    color = np.array(colors.BACKGROUNDS[facts.background]) + jitter
    size = (self.image_size, self.image_size)
    image = Image.new('RGB', size, tuple(color.tolist()))
    object_map = Image.new('L', size)
    for number, sprite, corner in self._scaled_sprites(facts, rng if self.augment else None):
      image.paste(sprite, corner, sprite)
      covered = sprite.getchannel('A').point(_OPAQUE)
      object_map.paste(number + 1, corner, covered)
    pixels = np.array(image)
    if self.augment:
      pixels = _change_colors(rng, pixels)
    return pixels, np.array(object_map)

  def _scaled_sprites(
    self, facts: Facts, rng: np.random.Generator | None = None
  ) -> Iterator[tuple[int, Image.Image, tuple[int, int]]]:
    """Yields each sprite of an image: its object's number, RGBA, left top corner in pixels.

    Args:
      facts: of the image.
      rng: turns and stretches the sprites; None: they stay as they are.
    """
    scale = self.image_size / CANVAS
    for number, scene_object in enumerate(facts.objects):
      pixels = self.sprites.pixels[scene_object.sprite]
      # Premultiplied alpha: otherwise the resize would mix in the color of clear pixels.
      source = Image.frombuffer('RGBa', pixels.shape[1::-1], pixels)
      for left, top, side in scene_object.boxes:
        size = max(1, int(side * scale))
        x, y = int(left * scale), int(top * scale)
        if rng is None:
          sprite = source.resize((size, size), Image.Resampling.BOX)
        else:
          sprite = _turn_and_stretch(rng, source, size)
          x += (size - sprite.width) // 2
          y += (size - sprite.height) // 2
        yield number, sprite.convert('RGBA'), (x, y)


def _turn_and_stretch(rng: np.random.Generator, source: Image.Image, size: int) -> Image.Image:
  """Scales a sprite to about `size`, a little narrower or lower, and turns it a little."""
  width, height = (max(1, int(size * (1 - rng.uniform(0, _STRETCH)))) for _ in range(2))
  sprite = source.resize((width, height), Image.Resampling.BOX)
  return sprite.rotate(rng.uniform(-_TURN, _TURN), Image.Resampling.BILINEAR, expand=False)


def _change_colors(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
  """Makes an image brighter or darker, and its channels a little more or less so."""
  gain = 1 + rng.uniform(-_COLOR_GAIN, _COLOR_GAIN)
  gain = gain + rng.uniform(-_COLOR_GAIN, _COLOR_GAIN, 3) / 3
  return np.clip(image * gain, 0, 255).astype(np.uint8)


def _reasons(split: str) -> tuple[str | None, ...]:
  """Returns why the examples of a split are held out; (None,) for training."""
  return splits.heldout_reasons(split) or (None,)


def _members_by_reason(metadata: tuple[Sprite, ...]) -> dict[str | None, np.ndarray]:
  """Returns the indices of the sprites of each held-out reason; None: of training."""
  style = np.array([splits.heldout_style(sprite.style) for sprite in metadata])
  concept = np.array([splits.heldout_concept(sprite.name) for sprite in metadata])
  pair = np.array([splits.heldout_pair(sprite.style, sprite.codepoint) for sprite in metadata])
  trained = ~style & ~concept & ~pair
  has_combination = np.array([_has_heldout_background(sprite.group) for sprite in metadata])
  masks = {
    None: trained,
    'concept': concept & ~style,
    'pair': pair & ~concept & ~style,
    'style': style & ~concept,
    'combination': trained & has_combination,
  }
  return {reason: np.flatnonzero(mask) for reason, mask in masks.items()}


def _has_heldout_background(group: str) -> bool:
  return any(splits.heldout_combination(group, color) for color in colors.BACKGROUNDS)


def _names(metadata: tuple[Sprite, ...], indices: np.ndarray) -> list[str]:
  return sorted({metadata[i].name for i in indices})


def _choose(rng: np.random.Generator, choices):
  """Draws one of the choices; `rng.choice` takes five times as long."""
  return choices[rng.integers(len(choices))]


def _place_box(
  rng: np.random.Generator, left: float, top: float, width: float, height: float
) -> _Box:
  """Draws a square with a side of 20 to 30 units inside a slot."""
  side = rng.uniform(20, min(30, width, height))
  x = left + rng.uniform(0, width - side)
  y = top + rng.uniform(0, height - side)
  return float(x), float(y), float(side)


def _choose_background(
  rng: np.random.Generator, objects: tuple[SceneObject, ...], reason: str | None
) -> str:
  """Draws a color that the reason allows, and that differs from the objects' colors if possible."""
  allowed = []
  for color in colors.BACKGROUNDS:
    is_heldout = any(splits.heldout_combination(item.group, color) for item in objects)
    if is_heldout == (reason == 'combination'):
      allowed.append(color)
  object_colors = {item.color for item in objects}
  candidates = [color for color in allowed if color not in object_colors] or allowed
  if 'white' in candidates and rng.random() < _WHITE_SHARE:
    return 'white'
  return _choose(rng, candidates)


def _write_caption(rng: np.random.Generator, facts: Facts) -> str:
  phrases = [grammar.counted(item.name, item.count) for item in facts.objects]
  if facts.relation:
    relation = facts.relation
    if rng.random() >= 0.5:
      relation = questions.OPPOSITE[relation]
      phrases.reverse()
    subject = f'{phrases[0]} {questions.PREPOSITION[relation]} {phrases[1]}'
  elif facts.objects[0].count == 1:
    subject = facts.objects[0].name
  else:
    subject = phrases[0]
  with_style = rng.random() < 0.5 and not splits.heldout_style(facts.style)
  style = f', {facts.style} style,' if with_style else ''
  return f'{subject}{style} on {grammar.indefinite(facts.background)} background'
