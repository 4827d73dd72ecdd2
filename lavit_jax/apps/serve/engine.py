"""The thread that computes: texts by continuous batching, images in batches between their steps."""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lavit_jax.data.text import TextTokenizer
from lavit_jax.errors import InputError, UserError
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.inference.slot_decoder import MAX_JOINING, NewToken, SlotDecoder, TextSequence

LOG = logging.getLogger(__name__)
MAX_IMAGES = 8  # that are generated at once
STEPS_BETWEEN_IMAGES = 16  # of text, while images wait


class Overloaded(Exception):
  """The queue is full."""


class Closed(Exception):
  """The engine has ended, or is about to."""


@dataclasses.dataclass(eq=False)
class TextJob:
  """Sequences of one request.

  Attributes:
    sequences: what to generate.
    on_token: called in the engine's thread for each new token.
    on_error: called in the engine's thread if the engine fails.
  """

  sequences: Sequence[TextSequence]
  on_token: Callable[[NewToken], None]
  on_error: Callable[[Exception], None]


@dataclasses.dataclass(eq=False)
class ImageJob:
  """Images of one request.

  Attributes:
    parts: of the prompt: texts, and images uint8[H, W, 3]. A text alone is generated as by
      `Lavit.generate`, others as by `Lavit.synthesize`.
    count: images to generate.
    size: (height, width) in pixels; None for the default.
    num_inference_steps: denoising steps; None for the default.
    seed: of the sampling.
    on_images: called in the engine's thread with uint8[count, H, W, 3].
    on_error: called in the engine's thread if there are none.
  """

  parts: Sequence[str | np.ndarray]
  count: int
  size: tuple[int, int] | None
  num_inference_steps: int | None
  seed: int
  on_images: Callable[[np.ndarray], None]
  on_error: Callable[[Exception], None]

  @property
  def is_text(self) -> bool:
    """Whether the prompt is one text."""
    return len(self.parts) == 1 and isinstance(self.parts[0], str)

  @property
  def options(self) -> tuple[Any, ...]:
    """What jobs of a batch have in common."""
    return self.is_text, self.count, self.size, self.num_inference_steps


class Flagged(InputError):
  """The safety checker flagged an image."""


class Engine:
  """Runs jobs in a thread.

  Args:
    model: computes.
    num_slots: texts that are generated at once.
    prompt_tokens: the most tokens of a prompt.
    new_tokens: the most new tokens of a text.
    max_queue: jobs that may wait.
  """

  def __init__(
    self, model: Lavit, num_slots: int, prompt_tokens: int, new_tokens: int, max_queue: int
  ):
    self.model = model
    self._decoder = SlotDecoder(model, num_slots, prompt_tokens, new_tokens)
    self._max_queue = max_queue
    self._texts: collections.deque[tuple[TextJob, TextSequence]] = collections.deque()
    self._images: collections.deque[ImageJob] = collections.deque()
    self._jobs: dict[TextSequence, TextJob] = {}  # in slots
    self._left: list[TextSequence] = []  # cancelled, but still in slots
    self._changed = threading.Condition()
    self._is_closing = False
    self._thread = threading.Thread(target=self._run, name='lavit-engine', daemon=True)
    self._thread.start()

  @property
  def tokenizer(self) -> TextTokenizer:
    """Of the model."""
    return self.model.tokenizer

  @property
  def max_new_tokens(self) -> int:
    """The most new tokens of a text."""
    return self._decoder.new_tokens

  @property
  def num_waiting(self) -> int:
    """The jobs that wait."""
    return len({id(job) for job, _ in list(self._texts)}) + len(self._images)

  @property
  def num_active(self) -> int:
    """The texts that are being generated."""
    return self._decoder.num_active

  def submit(self, job: TextJob | ImageJob) -> None:
    """Adds a job.

    Raises:
      InputError: it asks for more than the engine has room for.
      Overloaded: too many jobs wait.
      Closed: no more jobs are taken.
    """
    if isinstance(job, TextJob):
      for sequence in job.sequences:
        self._decoder.check(sequence)
    with self._changed:
      if self._is_closing:
        raise Closed
      if self.num_waiting >= self._max_queue:
        raise Overloaded
      if isinstance(job, TextJob):
        self._texts.extend((job, sequence) for sequence in job.sequences)
      else:
        self._images.append(job)
      self._changed.notify()

  def cancel(self, job: TextJob | ImageJob) -> None:
    """Drops what is left of a job: it frees its slots, and nothing more is called for it."""
    with self._changed:
      if isinstance(job, ImageJob):
        if job in self._images:
          self._images.remove(job)
        return
      kept = [entry for entry in self._texts if entry[0] is not job]
      self._texts = collections.deque(kept)
      for sequence in job.sequences:
        if self._jobs.pop(sequence, None) is not None:
          self._left.append(sequence)
      self._changed.notify()

  def close(self) -> None:
    """Takes no more jobs, and returns when those that were taken are done."""
    with self._changed:
      self._is_closing = True
      self._changed.notify()
    self._thread.join()

  def warm_up(self) -> None:
    """Compiles the programs for texts, by a short one with an image."""
    size = self.model.modules.image_size
    image = np.zeros((size, size, 3), np.uint8)
    done = threading.Event()
    errors: list[Exception] = []

    def on_token(token: NewToken) -> None:
      if token.error:
        errors.append(token.error)
      if token.is_last:
        done.set()

    def on_error(error: Exception) -> None:
      errors.append(error)
      done.set()

    sequence = TextSequence([image], min_new_tokens=2, max_new_tokens=2)
    self.submit(TextJob([sequence], on_token, on_error))
    done.wait()
    if errors:
      raise errors[0]

  # The thread.

  def _run(self) -> None:
    steps = STEPS_BETWEEN_IMAGES
    while True:
      with self._changed:
        while not (self._texts or self._images or self._jobs or self._left or self._is_closing):
          self._changed.wait()
        if not (self._texts or self._images or self._jobs):
          if self._is_closing:
            return
        for sequence in self._left:
          self._decoder.leave(sequence)
        self._left.clear()
        joining = self._take_texts()
        images = []
        if steps >= STEPS_BETWEEN_IMAGES or not (self._jobs or joining):
          images = self._take_images()
      if joining:
        self._guard(lambda joining=joining: self._decoder.join(joining))
      if images:
        self._generate(images)
        steps = 0
      if self._decoder.num_active:
        self._guard(self._decoder.advance)
        steps += 1

  def _take_texts(self) -> list[TextSequence]:
    joining = []
    while self._texts and len(joining) < min(MAX_JOINING, self._decoder.num_free):
      job, sequence = self._texts.popleft()
      self._jobs[sequence] = job
      joining.append(sequence)
    return joining

  def _take_images(self) -> list[ImageJob]:
    jobs: list[ImageJob] = []
    while self._images and len(jobs) * self._images[0].count < MAX_IMAGES:
      if jobs and self._images[0].options != jobs[0].options:
        break
      jobs.append(self._images.popleft())
    return jobs

  def _guard(self, step: Callable[[], list[NewToken]]) -> None:
    """Runs a step of the slots, and reports its tokens, or its failure to all jobs in slots."""
    try:
      tokens = step()
    except Exception as error:
      LOG.exception('the engine failed')
      with self._changed:
        jobs = list(dict.fromkeys(self._jobs.values()))
        self._jobs.clear()
      self._decoder.reset()
      for job in jobs:
        job.on_error(error)
      return
    for token in tokens:
      with self._changed:
        job = self._jobs.get(token.sequence)
        if token.is_last:
          self._jobs.pop(token.sequence, None)
      if job is not None:
        job.on_token(token)

  def _generate(self, jobs: Sequence[ImageJob]) -> None:
    """Generates the images of jobs with equal options; if it fails, of each by itself."""
    first = jobs[0]
    options: dict[str, Any] = dict(
      seed=[job.seed for job in jobs],
      num_return_sequences=first.count,
      size=first.size,
      num_inference_steps=first.num_inference_steps,
    )
    try:
      if first.is_text:
        output = self.model.generate_outputs([str(job.parts[0]) for job in jobs], **options)
      else:
        output = self.model.synthesize_outputs([list(job.parts) for job in jobs], **options)
    except Exception as error:
      if len(jobs) > 1:
        for job in jobs:
          self._generate([job])
        return
      if not isinstance(error, UserError):
        LOG.exception('images could not be generated')
      first.on_error(error)
      return
    for i, job in enumerate(jobs):
      own = slice(i * job.count, (i + 1) * job.count)
      if output.flagged[own].any():
        job.on_error(Flagged('the safety checker flagged an image; try another prompt or seed'))
      else:
        job.on_images(output.images[own])
