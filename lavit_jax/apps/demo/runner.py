"""Runs every task once on the inputs of the demo."""

from __future__ import annotations

import math
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from lavit_jax.apps.demo import sections
from lavit_jax.apps.demo.inputs import read_manifest, resolve_parts
from lavit_jax.apps.demo.neighbors import find_nearest, read_sprites
from lavit_jax.apps.demo.sections import Descriptions, Generations, Series
from lavit_jax.apps.page import Page
from lavit_jax.data.images import read_images
from lavit_jax.inference.outputs import PatchSelection, TextOutput, VisualTokens
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.output import write_atomic

NUM_STEPS = 25  # DDIM; half of the published 50, with no visible difference at 64 pixels

# The published ones. With them, scores are turned into probabilities.
_CAPTION_LENGTH_PENALTY = 1.0
_ANSWER_LENGTH_PENALTY = 0.0


class Log:
  """Prints lines with the seconds since the start."""

  def __init__(self):
    self.start = time.monotonic()

  def __call__(self, text: str) -> None:
    """Prints a line."""
    print(f'[{self.seconds():5.1f} s] {text}', flush=True)

  def seconds(self) -> float:
    """The seconds since the start."""
    return time.monotonic() - self.start


def run(
  model: Lavit, inputs: str | os.PathLike, out: str | os.PathLike, seed: int = 0
) -> pathlib.Path:
  """Runs every task on a folder of inputs.

  Args:
    model: the model.
    inputs: the folder with images and `manifest.json`.
    out: the folder of the page.
    seed: of all tasks.

  Returns:
    The page, `out`/index.html.

  Raises:
    UserError: the inputs or the checkpoint are missing or damaged; the page cannot be written.
  """
  inputs = pathlib.Path(inputs)
  manifest = read_manifest(inputs)
  sprites = read_sprites(inputs)
  log = Log()
  size = model.modules.image_size
  images = read_images([inputs / entry['file'] for entry in manifest['pictures']], size)
  expected = read_images([inputs / entry['file'] for entry in manifest['texts']], size)
  series_files = []
  for entry in manifest['series']:
    series_files.extend(inputs / image['file'] for image in entry['images'])
  series_images = read_images(series_files, size)

  tokens, selection = _tokenize(model, images, series_images, seed, log)
  captions, answers = _describe(model, images, manifest['pictures'], seed, log)
  prompts = [resolve_parts(inputs, parts) for parts in manifest['mixed']]
  codes = _generate(model, manifest, prompts, seed, log)
  generated_images = model.decode_images(codes, num_inference_steps=NUM_STEPS, seed=seed)
  log('reconstruct')
  reconstructions = model.decode_images(tokens.ids, num_inference_steps=NUM_STEPS, seed=seed)

  page = Page()
  described = Descriptions(
    tokens, selection.probabilities[: len(images)], captions, answers, reconstructions
  )
  sections.add_descriptions(page, manifest['pictures'], images, described)
  series = _split_series(manifest['series'], series_images, selection, len(images))
  sections.add_series(page, series)
  neighbors = None
  expected_neighbors = None
  if sprites is not None:
    log(f'find the nearest of {len(sprites.names)} training sprites')
    neighbors = [find_nearest(image, sprites) for image in generated_images]
    expected_neighbors = [find_nearest(image, sprites) for image in expected]
  generated = Generations(codes, generated_images, neighbors)
  num_texts = len(manifest['texts'])
  sections.add_text_generations(
    page, manifest['texts'], expected, generated.part(0, num_texts), expected_neighbors
  )
  from_parts = generated.part(num_texts, len(codes))
  sections.add_mixed_generations(page, prompts, size, from_parts)
  summary = f'{len(images)} held-out images, seed {seed}, {log.seconds():.0f} s'
  path = write_atomic(
    pathlib.Path(out) / 'index.html', page.html(f'LaVIT {model.modules.variant}', summary)
  )
  log(f'wrote {path}')
  return path


def mean_probability(output: TextOutput, length_penalty: float) -> float:
  """Returns the (geometric) mean of the probabilities of the tokens of a text from a beam search.

  Args:
    output: of the search.
    length_penalty: of the search.
  """
  length = max(1, len(output.ids))
  return math.exp(output.score * length**length_penalty / length)


def _tokenize(
  model: Lavit, images: np.ndarray, series_images: np.ndarray, seed: int, log: Log
) -> tuple[VisualTokens, PatchSelection]:
  """Samples tokens of the images, and runs the selector on the images and on the series."""
  log(f'tokenize: {len(images)} images of {model.modules.num_patches} patches')
  tokens = model.tokenize(images, seed=seed)
  log(f'  kept {", ".join(map(str, tokens.counts))} patches')
  selection = model.select_patches(np.concatenate([images, series_images]))
  if len(series_images):
    counts = selection.counts[len(images) :]
    log(f'  images with more and more in them: {", ".join(map(str, counts))} patches')
  return tokens, selection


def _describe(
  model: Lavit, images: np.ndarray, entries: list[dict[str, str]], seed: int, log: Log
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
  """Returns captions and answers, with the mean probability of their tokens."""
  log('caption')
  outputs = model.caption_outputs(images, seed=seed, length_penalty=_CAPTION_LENGTH_PENALTY)
  captions = _with_probabilities(outputs, _CAPTION_LENGTH_PENALTY)
  for entry, (text, probability) in zip(entries, captions, strict=True):
    log(f'  {text!r} ({probability:.0%}); it is {entry["caption"]!r}')
  log('answer')
  questions = [entry['question'] for entry in entries]
  outputs = model.answer_outputs(
    images, questions, seed=seed, length_penalty=_ANSWER_LENGTH_PENALTY
  )
  answers = _with_probabilities(outputs, _ANSWER_LENGTH_PENALTY)
  for entry, (text, probability) in zip(entries, answers, strict=True):
    log(f'  {entry["question"]} {text!r} ({probability:.0%}); it is {entry["answer"]!r}')
  return captions, answers


def _with_probabilities(
  outputs: Sequence[TextOutput], length_penalty: float
) -> list[tuple[str, float]]:
  return [(output.text, mean_probability(output, length_penalty)) for output in outputs]


def _generate(
  model: Lavit, manifest: dict[str, Any], prompts: list[list[Any]], seed: int, log: Log
) -> list[np.ndarray]:
  """Samples codes from the texts of the manifest, then from its mixed prompts."""
  log('generate from text, from image and text, from image and image')
  texts = [entry['text'] for entry in manifest['texts']]
  codes = model.sample_codes([[text] for text in texts], guidance_scale=4.0, seed=seed)
  codes += model.sample_codes(prompts, guidance_scale=5.0, seed=seed)
  names = texts + [' + '.join(parts) for parts in manifest['mixed']]
  for name, ids in zip(names, codes, strict=True):
    log(f'  {name}: {len(ids)} tokens')
  return codes


def _split_series(
  entries: list[dict[str, Any]], images: np.ndarray, selection: PatchSelection, start: int
) -> list[Series]:
  """Returns the series of the manifest with their images and kept patches.

  Args:
    entries: of the manifest.
    images: uint8[B, S, S, 3], of all series.
    selection: of other images and these.
    start: the index of the first of these in `selection`.
  """
  series = []
  first = 0
  for entry in entries:
    labels = [image['label'] for image in entry['images']]
    last = first + len(labels)
    keep = selection.keep[start + first : start + last]
    series.append(Series(entry['text'], labels, images[first:last], keep))
    first = last
  return series
