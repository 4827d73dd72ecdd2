"""The sections of the demo's page."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import numpy as np

from lavit_jax.apps.demo.neighbors import Neighbor
from lavit_jax.apps.page import Figure, Page, Statement, show_kept_patches
from lavit_jax.data.images import read_images, resize
from lavit_jax.inference.outputs import VisualTokens
from lavit_jax.visualization import probability_colors


class Descriptions(NamedTuple):
  """What the model makes of B images of the manifest.

  Attributes:
    tokens: the visual tokens of each image.
    probabilities: f32[B, N], that each patch becomes a token.
    captions: a caption of each image, and the mean probability of its tokens.
    answers: the answer to the question about each image, and the mean probability of its tokens.
    reconstructions: uint8[B, S, S, 3], the images decoded from the tokens.
  """

  tokens: VisualTokens
  probabilities: np.ndarray
  captions: list[tuple[str, float]]
  answers: list[tuple[str, float]]
  reconstructions: np.ndarray


class Series(NamedTuple):
  """Images of the same thing, from nothing to much of it.

  Attributes:
    text: what they show.
    labels: how much of it each shows.
    images: uint8[B, S, S, 3].
    keep: bool[B, N], the patches that become tokens without sampling.
  """

  text: str
  labels: list[str]
  images: np.ndarray
  keep: np.ndarray


class Generations(NamedTuple):
  """B images that the model generates.

  Attributes:
    codes: i32[n] for each prompt, the sampled visual tokens.
    images: uint8[B, S, S, 3], the images decoded from them.
    neighbors: the nearest training sprite of each, None for a plain image; None: of none.
  """

  codes: list[np.ndarray]
  images: np.ndarray
  neighbors: list[Neighbor | None] | None

  def part(self, start: int, end: int) -> Generations:
    """Those from `start` to `end`."""
    neighbors = None if self.neighbors is None else self.neighbors[start:end]
    return Generations(self.codes[start:end], self.images[start:end], neighbors)


def add_descriptions(
  page: Page, entries: list[dict[str, str]], images: np.ndarray, described: Descriptions
) -> None:
  """Adds what the model sees in images, and what it says about them."""
  page.add_section(
    'Captions, answers and reconstructions',
    'An image; how probable it is for each patch to become a visual token; the patches '
    'that became tokens, a random choice by these probabilities; the image reconstructed from '
    'these tokens alone. Then the caption and the answer of the model. In parentheses are the '
    'probability that the model gives to a token of its text, on (geometric) average, and the '
    'true text. A model can be sure and wrong.',
    scale='Probability that a patch becomes a token',
  )
  heat_maps = probability_colors(described.probabilities, images.shape[1])
  for i, entry in enumerate(entries):
    probabilities = described.probabilities[i]
    kept = show_kept_patches(images[i], described.tokens.keep[i])
    page.add_card(
      [
        Figure(images[i], 'input'),
        Figure(heat_maps[i], f'{probabilities.min():.0%} to {probabilities.max():.0%}'),
        Figure(kept, f'{described.tokens.counts[i]} tokens'),
        Figure(described.reconstructions[i], 'reconstructed'),
      ],
      [
        _statement('caption', *described.captions[i], entry['caption']),
        _statement(entry['question'], *described.answers[i], entry['answer']),
      ],
    )


def add_series(page: Page, series: list[Series]) -> None:
  """Adds images with more and more in them, and the numbers of their tokens; none: no section."""
  if not series:
    return
  page.add_section(
    'How the number of tokens depends on the image',
    'The same background with more and more on it, and the patches that become tokens. Here the '
    'most probable patches are kept, without chance, so that the numbers differ by the images '
    'alone.',
  )
  for text, labels, images, keep in series:
    inputs = []
    kept = []
    for label, image, image_keep in zip(labels, images, keep, strict=True):
      inputs.append(Figure(image, label))
      kept.append(Figure(show_kept_patches(image, image_keep), f'{image_keep.sum()} tokens'))
    page.add_wide_card([inputs, kept], [Statement('emoji', text)])


def add_text_generations(
  page: Page,
  entries: list[dict[str, str]],
  expected: np.ndarray,
  generated: Generations,
  expected_neighbors: list[Neighbor | None] | None,
) -> None:
  """Adds images from texts.

  Args:
    page: the page.
    entries: the texts.
    expected: uint8[B, S, S, 3], held-out images with these texts as captions.
    generated: the images from the texts.
    expected_neighbors: the nearest training sprites of the held-out images.
  """
  text = 'Generated from the text alone, beside a held-out image that has this caption.'
  if generated.neighbors is not None:
    text += (
      ' Between them is the training sprite that is nearest to the generated image, pixel by '
      'pixel: if the two look the same, the model may remember instead of drawing. The distance of '
      'the held-out image to its own nearest sprite is given for comparison: it is small where '
      'only the background is new, and larger where the emoji is.'
    )
  page.add_section('Text to image', text)
  for i, entry in enumerate(entries):
    figures = [Figure(generated.images[i], f'generated, {len(generated.codes[i])} tokens')]
    statements = [Statement('text', entry['text'])]
    if generated.neighbors is not None:
      expected_neighbor = None if expected_neighbors is None else expected_neighbors[i]
      note = None
      if expected_neighbor is not None:
        note = f'the held-out image: {expected_neighbor.distance:.0%}'
      _add_neighbor(figures, statements, generated.neighbors[i], note)
    figures.append(Figure(expected[i], 'held-out'))
    page.add_card(figures, statements)


def add_mixed_generations(
  page: Page, prompts: list[list[str | pathlib.Path]], size: int, generated: Generations
) -> None:
  """Adds images from prompts of images and texts."""
  last = 'the last image is generated'
  if generated.neighbors is not None:
    last = 'the next image is generated, and the last is the training sprite nearest to it'
  page.add_section(
    'Images and text to image',
    f'The prompt contains the visual tokens of its images; {last}.',
  )
  for i, parts in enumerate(prompts):
    figures = []
    statements = []
    for part in parts:
      if isinstance(part, str):
        statements.append(Statement('text', part))
      else:
        figures.append(Figure(read_images(part, size)[0], 'input'))
    figures.append(Figure(generated.images[i], f'generated, {len(generated.codes[i])} tokens'))
    if generated.neighbors is not None:
      _add_neighbor(figures, statements, generated.neighbors[i])
    page.add_card(figures, statements)


def _add_neighbor(
  figures: list[Figure],
  statements: list[Statement],
  neighbor: Neighbor | None,
  note: str | None = None,
) -> None:
  """Adds the sprite that is nearest to the last of the figures."""
  term = 'nearest training sprite'
  if neighbor is None:
    statements.append(Statement(term, 'none, for the generated image is plain', note))
    return
  size = figures[-1].image.shape[:2]
  figures.append(Figure(resize(neighbor.thumbnail, size), 'nearest in training'))
  name = f'{neighbor.name}, {neighbor.style} style'
  statements.append(Statement(term, f'{name}: {neighbor.in_words()}', note))


def _statement(term: str, text: str, probability: float, truth: str) -> Statement:
  return Statement(term, text, f'{probability:.0%} sure; true: {truth}')
