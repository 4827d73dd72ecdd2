"""Images in HTML: the tag of an image, the patches that became tokens, the page of the demo."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lavit_jax.output import encode_png
from lavit_jax.visualization import shade_dropped_patches

STYLE = """
    body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fafafa; \
max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
    h2 { margin: 2.5rem 0 .2rem } p, small { color: #666 } figure { margin: 0; text-align: center }
    section { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); \
gap: 1rem }
    article { background: #fff; border: 1px solid #e4e4e4; border-radius: .6rem; padding: .8rem }
    article > div { display: flex; gap: .6rem; margin-bottom: .5rem } dl { margin: 0 } \
dt { color: #666; font-size: .85em } dd { margin: 0 }
    img { width: 96px; height: 96px; border-radius: .3rem; image-rendering: pixelated; \
border: 1px solid #eee }"""


class Figure(NamedTuple):
  """An image uint8[H, W, 3] and its caption."""

  image: np.ndarray
  caption: str


class Statement(NamedTuple):
  """A text under a term, and the true text if there is one."""

  term: str
  text: str
  truth: str | None = None


@dataclasses.dataclass
class Section:
  """A heading, a paragraph, and cards as HTML."""

  title: str
  text: str
  cards: list[str] = dataclasses.field(default_factory=list)

  def html(self) -> str:
    """The section as HTML."""
    heading = f'<h2>{html.escape(self.title)}</h2><p>{html.escape(self.text)}</p>'
    return f'{heading}\n<section>\n' + '\n'.join(self.cards) + '\n</section>'


class Page:
  """An HTML page of sections of cards that needs no other file."""

  def __init__(self):
    self.sections: list[Section] = []

  def add_section(self, title: str, text: str) -> None:
    """Begins a section."""
    self.sections.append(Section(title, text))

  def add_card(self, figures: Sequence[Figure], statements: Sequence[Statement]) -> None:
    """Adds a card to the last section: figures in a line, statements below."""
    images = []
    for image, caption in figures:
      images.append(
        f'<figure>{image_tag(image, caption)}'
        f'<figcaption><small>{html.escape(caption)}</small></figcaption></figure>'
      )
    lines = []
    for term, text, truth in statements:
      note = '' if truth is None else f' <small>({html.escape(truth)})</small>'
      lines.append(f'<dt>{html.escape(term)}</dt><dd>{html.escape(text)}{note}</dd>')
    self.sections[-1].cards.append(
      f'<article><div>{"".join(images)}</div><dl>{"".join(lines)}</dl></article>'
    )

  def html(self, title: str, text: str) -> str:
    """The page as HTML."""
    title = html.escape(title)
    body = '\n'.join(section.html() for section in self.sections)
    return (
      f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>'
      f'<style>{STYLE}</style>\n'
      f'<h1>{title}</h1><p>{html.escape(text)}</p>\n{body}\n</html>\n'
    )


def image_tag(image: np.ndarray, alt: str) -> str:
  """uint8[H, W, 3] -> an <img> that contains the image itself."""
  data = base64.b64encode(encode_png(image)).decode()
  return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def show_kept_patches(image: np.ndarray, keep: np.ndarray) -> np.ndarray:
  """Bleaches the patches of an image that did not become tokens.

  Args:
    image: uint8[S, S, 3].
    keep: bool[N], the patches that became tokens, in raster order.

  Returns:
    uint8[S, S, 3].
  """
  return np.asarray(shade_dropped_patches(image[None], keep[None])[0])
