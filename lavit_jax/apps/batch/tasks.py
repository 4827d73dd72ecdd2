"""The tasks that run on rows: what each reads, writes and calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lavit_jax.inference.outputs import DecodedImages, ImageOutput
from lavit_jax.inference.pipeline import Lavit

Row = dict[str, Any]


class Outcome(NamedTuple):
  """What a row becomes.

  Attributes:
    values: the keys that its result line has besides those of the row.
    image: uint8[H, W, 3], to be written to a file; None for tasks that give text.
  """

  values: dict[str, Any]
  image: np.ndarray | None = None


class Task(NamedTuple):
  """A command on rows.

  Attributes:
    inputs: the keys of a row that the task reads: 'image', 'question' and 'prompt' are texts,
      'parts' is a list of texts.
    outputs: the keys that it writes: 'file' is the name of a generated image, 'flagged' is true
      where the safety checker replaced the image by a black one and absent elsewhere.
    text_format: the format of a result on the terminal, with all of these keys.
    compute: (model, rows with images as arrays, **options of the model's method) -> an outcome for
      each row.
  """

  inputs: tuple[str, ...]
  outputs: tuple[str, ...]
  text_format: str
  compute: Callable[..., list[Outcome]]


def _caption(model: Lavit, rows: Sequence[Row], **options) -> list[Outcome]:
  captions = model.caption(_column(rows, 'image'), **options)
  return [Outcome({'caption': text}) for text in captions]


def _answer(model: Lavit, rows: Sequence[Row], **options) -> list[Outcome]:
  answers = model.answer(_column(rows, 'image'), _column(rows, 'question'), **options)
  return [Outcome({'answer': text}) for text in answers]


def _tokenize(model: Lavit, rows: Sequence[Row], **options) -> list[Outcome]:
  outcomes = []
  for ids, keep, count in zip(*model.tokenize(_column(rows, 'image'), **options), strict=True):
    patches = keep.nonzero()[0].tolist()
    outcomes.append(Outcome({'count': int(count), 'ids': ids.tolist(), 'patches': patches}))
  return outcomes


def _generate(model: Lavit, rows: Sequence[Row], **options) -> list[Outcome]:
  return _image_outcomes(model.generate_outputs(_column(rows, 'prompt'), **options))


def _synthesize(model: Lavit, rows: Sequence[Row], **options) -> list[Outcome]:
  return _image_outcomes(model.synthesize_outputs(_column(rows, 'parts'), **options))


def _reconstruct(
  model: Lavit, rows: Sequence[Row], decoder_guidance_scale: float | None = None, **options
) -> list[Outcome]:
  images = _column(rows, 'image')
  return _image_outcomes(
    model.reconstruct_outputs(images, guidance_scale=decoder_guidance_scale, **options)
  )


def _image_outcomes(output: DecodedImages | ImageOutput) -> list[Outcome]:
  outcomes = []
  for image, flagged in zip(output.images, output.flagged, strict=True):
    outcomes.append(Outcome({'flagged': True} if flagged else {}, image))
  return outcomes


def _column(rows: Sequence[Row], key: str) -> list[Any]:
  return [row[key] for row in rows]


TASKS = {
  'caption': Task(('image',), ('caption',), '{image}: {caption}', _caption),
  'answer': Task(('image', 'question'), ('answer',), '{image}: {question} {answer}', _answer),
  'tokenize': Task(
    ('image',), ('count', 'ids', 'patches'), '{image}: {count} tokens {ids}', _tokenize
  ),
  'generate': Task(('prompt',), ('file', 'flagged'), '{file}', _generate),
  'synthesize': Task(('parts',), ('file', 'flagged'), '{file}', _synthesize),
  'reconstruct': Task(('image',), ('file', 'flagged'), '{file}', _reconstruct),
}
