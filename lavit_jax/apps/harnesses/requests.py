"""What a harness asks, as calls of `Lavit`: images with a text, and options of the generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lavit_jax.errors import UserError
from lavit_jax.inference.pipeline import Lavit

TASKS = ('answer', 'caption')
OPTIONS = ('max_new_tokens', 'num_beams', 'temperature', 'top_p', 'do_sample')
DEFAULT_MAX_TOKENS = 64


class Request(NamedTuple):
  """One question of a harness.

  Attributes:
    images: those of the question.
    text: the question, or the prompt of a caption.
    options: of the generation, as the harness names them; those outside `OPTIONS` are left out.
  """

  images: Sequence[Any]
  text: str
  options: Mapping[str, Any] = {}


class Responder:
  """Answers requests, as many at once as have the same options."""

  def __init__(self, model: Lavit, task: str, seed: int = 0, batch_size: int = 8):
    """Keeps the model.

    Args:
      model: which answers.
      task: 'answer' puts the text into the template of questions, and the answer ends at the first
        newline, comma or full stop; 'caption' puts it after the image, and ends at a full stop.
      seed: of the patches that become tokens, and of sampling.
      batch_size: requests at once.

    Raises:
      UserError: an unknown task.
    """
    if task not in TASKS:
      raise UserError(f'task={task!r} is none of {", ".join(TASKS)}; choose one of them')
    self.model = model
    self.task = task
    self.seed = seed
    self.batch_size = batch_size

  def __call__(self, requests: Sequence[Request]) -> list[str]:
    """The text for each request.

    Raises:
      UserError: a request has no image, or several.
    """
    groups: dict[tuple, list[int]] = {}
    for index, request in enumerate(requests):
      if len(request.images) != 1:
        raise UserError(
          f'a question has {len(request.images)} images, and lavit takes one; leave this task out'
        )
      options = _options(request)
      if self.task == 'caption':
        options['prompt'] = request.text  # `caption` has one for all
      groups.setdefault(tuple(sorted(options.items())), []).append(index)
    texts = [''] * len(requests)
    for options, indices in groups.items():
      for start in range(0, len(indices), self.batch_size):
        part = indices[start : start + self.batch_size]
        answers = self._generate([requests[index] for index in part], dict(options))
        for index, answer in zip(part, answers, strict=True):
          texts[index] = answer
    return texts

  def _generate(self, requests: Sequence[Request], options: dict[str, Any]) -> list[str]:
    images = [request.images[0] for request in requests]
    if self.task == 'caption':
      return self.model.caption(images, seed=self.seed, **options)
    questions = [request.text for request in requests]
    return self.model.answer(images, questions, seed=self.seed, **options)


def _options(request: Request) -> dict[str, Any]:
  """The options of the generation as `Lavit` takes them: greedy unless the request samples."""
  values = {key: request.options[key] for key in OPTIONS if request.options.get(key) is not None}
  options = {
    'min_new_tokens': 1,
    'max_new_tokens': int(values.get('max_new_tokens', DEFAULT_MAX_TOKENS)),
    'num_beams': int(values.get('num_beams', 1)),
    'do_sample': bool(values.get('do_sample', values.get('temperature', 0) > 0)),
  }
  if options['do_sample']:
    options |= {key: float(values[key]) for key in ('temperature', 'top_p') if key in values}
  return options
