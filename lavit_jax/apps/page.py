"""Images in HTML: the tag of an image, the patches that became tokens, the page of the demo."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lavit_jax.output import encode_png
from lavit_jax.visualization import colors_of_scale, shade_dropped_patches

STYLE = """
    body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fafafa; \
max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
    h2 { margin: 2.5rem 0 .2rem } p, small { color: #666 } figure { margin: 0; text-align: center }
    p { max-width: 48rem; margin: .3rem 0 .8rem }
    section { display: grid; grid-template-columns: repeat(auto-fill, minmax(28rem, 1fr)); \
gap: 1rem }
    article { background: #fff; border: 1px solid #e4e4e4; border-radius: .6rem; padding: .8rem }
    article.wide { grid-column: 1 / -1 }
    article > div { display: flex; flex-wrap: wrap; gap: .6rem; margin-bottom: .5rem }
    figcaption { width: 96px; line-height: 1.2 }
    dl { margin: 0 } dt { color: #666; font-size: .85em } dd { margin: 0 }
    img { width: 96px; height: 96px; border-radius: .3rem; image-rendering: pixelated; \
border: 1px solid #eee }
    .wide img, .wide figcaption { width: 9rem } .wide img { height: 9rem }
    .scale img { width: 12rem; height: .8rem; vertical-align: middle; margin: 0 .4rem }
    @media (max-width: 32rem) { section { grid-template-columns: 1fr } }"""


class Figure(NamedTuple):
  """An image uint8[H, W, 3] and its caption."""

  image: np.ndarray
  caption: str


class Statement(NamedTuple):
  """A text under a term, and a note in parentheses if there is one."""

  term: str
  text: str
  note: str | None = None


@dataclasses.dataclass
class Section:
  """A heading, a paragraph, perhaps a scale of colors, and cards as HTML."""

  title: str
  text: str
  scale: str = ''
  cards: list[str] = dataclasses.field(default_factory=list)

  def html(self) -> str:
    """The section as HTML."""
    heading = f'<h2>{html.escape(self.title)}</h2><p>{html.escape(self.text)}</p>{self.scale}'
    return f'{heading}\n<section>\n' + '\n'.join(self.cards) + '\n</section>'


class Page:
  """An HTML page of sections of cards that needs no other file."""

  def __init__(self):
    self.sections: list[Section] = []

  def add_section(self, title: str, text: str, scale: str | None = None) -> None:
    """Begins a section.

    Args:
      title: its heading.
      text: its paragraph.
      scale: what the colors of heat maps mean; it is shown beside these colors.
    """
    self.sections.append(Section(title, text, '' if scale is None else _scale_html(scale)))

  def add_card(self, figures: Sequence[Figure], statements: Sequence[Statement]) -> None:
    """Adds a card to the last section: figures in a line, statements below."""
    self.sections[-1].cards.append(
      f'<article>{_figures_html(figures)}{_statements_html(statements)}</article>'
    )

  def add_wide_card(
    self, rows: Sequence[Sequence[Figure]], statements: Sequence[Statement]
  ) -> None:
    """Adds a card as wide as the page to the last section: statements, then figures in lines."""
    lines = ''.join(map(_figures_html, rows))
    self.sections[-1].cards.append(
      f'<article class="wide">{_statements_html(statements)}{lines}</article>'
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


def _figures_html(figures: Sequence[Figure]) -> str:
  images = []
  for image, caption in figures:
    images.append(
      f'<figure>{image_tag(image, caption)}'
      f'<figcaption><small>{html.escape(caption)}</small></figcaption></figure>'
    )
  return f'<div>{"".join(images)}</div>'


def _statements_html(statements: Sequence[Statement]) -> str:
  lines = []
  for term, text, note in statements:
    addition = '' if note is None else f' <small>({html.escape(note)})</small>'
    lines.append(f'<dt>{html.escape(term)}</dt><dd>{html.escape(text)}{addition}</dd>')
  return f'<dl>{"".join(lines)}</dl>'


def _scale_html(text: str) -> str:
  """The colors of 0 to 1 in a line."""
  colors = colors_of_scale(np.linspace(0, 1, 128))[None]
  return f'<p class="scale">{html.escape(text)}: 0%{image_tag(colors, "colors")}100%</p>'


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
