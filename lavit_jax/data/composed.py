"""Batches of composed examples: emoji on backgrounds, with their captions and questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from lavit_jax.data import images
from lavit_jax.data.chat import ASSISTANT, USER, ChatTemplate, Message
from lavit_jax.data.emoji import splits
from lavit_jax.data.emoji.corpus import describe_sprite
from lavit_jax.data.emoji.facts import Question
from lavit_jax.data.emoji.scenes import Composer, Example
from lavit_jax.data.tasks import KIND_OF_USE, UseSampler
from lavit_jax.data.text_fields import TextEncoder, encode_answers

_ENDLESS = 1 << 62  # rows
MAX_OBJECTS = 2  # kinds of sprites in an image
# Types of questions about what is where in an image: one answer gives the others away.
_REVEALING = frozenset({'what', 'place', 'position'})

MakeRow = Callable[[int], dict[str, Any]]


class Batches(Iterator):
  """Batches by their number.

  The state, {'batches': how many were taken}, is the same in every process, and means the same to
  another number of processes.

  Args:
    open_at: number of a batch -> an iterator from this batch on.
  """

  def __init__(self, open_at: Callable[[int], Any]):
    self._open_at = open_at
    self._count = 0
    self._iterator: Any = None

  def __next__(self) -> dict[str, np.ndarray]:
    if self._iterator is None:
      self._iterator = self._open_at(self._count)
    batch = next(self._iterator)
    self._count += 1
    return batch

  def get_state(self) -> dict[str, int]:
    """The position, as JSON."""
    return {'batches': self._count}

  def set_state(self, state: dict[str, int]) -> None:
    """Goes to a position."""
    self._count = state['batches']
    self._iterator = None

  def close(self) -> None:
    """Ends the threads."""
    if self._iterator is not None:
      self._iterator.close()


def composed_batches(
  make_row: MakeRow, rows: Sequence[int], global_batch_size: int, num_threads: int
) -> Batches:
  """The batches of rows that are made by their number.

  Args:
    make_row: number of an example -> its row.
    rows: the rows of a global batch that this process has.
    global_batch_size: the rows of all processes.
    num_threads: threads that make rows.
  """
  batch_size = len(rows)
  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * batch_size)

  def make_row_at(position: int) -> dict[str, Any]:
    batch, row = divmod(position, batch_size)
    return make_row(batch * global_batch_size + int(rows[row]))

  def open_at(first: int) -> grain.DatasetIterator:
    positions = grain.MapDataset.range(first * batch_size, _ENDLESS)
    dataset = positions.map(make_row_at).to_iter_dataset(options)
    return iter(dataset.batch(batch_size, drop_remainder=True))

  return Batches(open_at)


def image_rows(composer: Composer, seed: int, vit_size: int | None) -> MakeRow:
  """Rows of the task 'images': image, and vit_image if there is a `vit_size`."""

  def make_row(index: int) -> dict[str, Any]:
    return _image_fields(composer(seed, index), vit_size)

  return make_row


def contrastive_rows(
  composer: Composer, seed: int, vit_size: int | None, encoder: TextEncoder
) -> MakeRow:
  """Rows of the task 'contrastive': an image with its caption, and where its objects are."""
  concepts = {name: number for number, name in enumerate(splits.concept_names())}

  def make_row(index: int) -> dict[str, Any]:
    example = composer(seed, index)
    text = encoder.encode(example.caption)
    del text['text_weight']
    names = np.full(MAX_OBJECTS, -1, np.int32)
    for number, scene_object in enumerate(example.facts.objects):
      names[number] = concepts[scene_object.name]
    objects = {'object_map': example.object_map, 'object_names': names}
    return {**_image_fields(example, vit_size), **text, **objects}

  return make_row


def lm_rows(
  composer: Composer,
  seed: int,
  vit_size: int | None,
  encoder: TextEncoder,
  shares: Mapping[str, float],
  question_weights: Mapping[str, float],
  max_questions: int,
  draw_text_weight: float,
  drop_text: float,
  template: ChatTemplate,
) -> MakeRow:
  """Rows of the task 'lm': an image with a text, and the kind of the row (tasks.py).

  Args:
    composer: composes examples.
    seed: of the run.
    vit_size: of vit_image; None: none.
    encoder: encodes texts.
    shares: {use: how often}.
    question_weights: {type of question: how often}, for all types.
    max_questions: the most questions that a row of use 'answer' has.
    draw_text_weight: the weight of captions in rows of use 'draw'.
    drop_text: the share of these rows that have no text.
    template: of questions.
  """
  sample_use = UseSampler(shares)

  def make_row(index: int) -> dict[str, Any]:
    example = composer(seed, index)
    rng = np.random.default_rng((seed, index, 1))
    use = sample_use(rng)
    match use:
      case 'caption':
        text = encoder.encode(example.caption)
      case 'answer':
        chosen = _choose_questions(example, rng, question_weights, max_questions)
        text = encode_answers(encoder, _messages(chosen), template)
      case 'draw':
        is_dropped = rng.random() < drop_text  # guidance needs images without a text
        text = encoder.encode('' if is_dropped else example.caption, draw_text_weight)
      case _:
        text = encoder.encode(describe_sprite(composer, example.facts.objects[0].sprite))
    kind = {'kind': np.int32(KIND_OF_USE[use])}
    return {**_image_fields(example, vit_size), **kind, **text}

  return make_row


def _image_fields(example: Example, vit_size: int | None) -> dict[str, np.ndarray]:
  fields = {'image': example.image}
  if vit_size:
    fields['vit_image'] = images.resize(example.image, vit_size)
  return fields


def _messages(chosen: Sequence[Question]) -> list[Message]:
  """The questions with their answers; None stands for the image."""
  messages = []
  for number, (_, text, answer) in enumerate(chosen):
    content = (text,) if number else (None, text)
    messages += [Message(USER, content), Message(ASSISTANT, (answer,))]
  return messages


def _choose_questions(
  example: Example, rng: np.random.Generator, weights: Mapping[str, float], max_questions: int
) -> list[Question]:
  """Some of the example's questions, in random order, drawn by the weights of their types.

  At most one of those whose answers give each other away is among them.
  """
  remaining = list(example.questions)
  chosen = []
  while remaining and len(chosen) < max_questions:
    cumulative = np.cumsum([weights[question.type] for question in remaining])
    drawn = np.searchsorted(cumulative, rng.random() * cumulative[-1], side='right')
    question = remaining.pop(drawn)
    chosen.append(question)
    if question.type in _REVEALING:
      remaining = [other for other in remaining if other.type not in _REVEALING]
  return chosen
