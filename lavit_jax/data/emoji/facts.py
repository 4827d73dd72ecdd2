"""What is true of a composed image: its objects, their relation, and questions about them."""

from typing import NamedTuple

CANVAS = 64  # units of a side of an image


class SceneObject(NamedTuple):
  """Equal sprites of one image.

  Attributes:
    sprite: index into `Sprites`.
    codepoint: of the emoji, '1F989'.
    name: of the emoji, 'owl'.
    group: of Unicode, 'Animals & Nature'.
    color: dominant color, '' if there is none.
    boxes: (left, top, side) of each sprite, in canvas units.
  """

  sprite: int
  codepoint: str
  name: str
  group: str
  color: str
  boxes: tuple[tuple[float, float, float], ...]

  @property
  def count(self) -> int:
    """Number of sprites."""
    return len(self.boxes)


class Facts(NamedTuple):
  """The composition of an image.

  Attributes:
    index: of the example in its stream.
    style: 'twemoji', 'openmoji' or 'noto'.
    background: name of a color.
    objects: one or two.
    relation: where objects[0] is, as seen from objects[1]: 'left' or 'above'; None for one object.
    heldout: why the image cannot occur in training: 'concept', 'pair' or 'combination'; None if it
      can.
  """

  index: int
  style: str
  background: str
  objects: tuple[SceneObject, ...]
  relation: str | None
  heldout: str | None


class Question(NamedTuple):
  """A question about an image; `type` is one of `questions.TYPES`."""

  type: str
  question: str
  answer: str
