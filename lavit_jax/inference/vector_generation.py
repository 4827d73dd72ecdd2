"""Prompts of images and texts to the vectors of new images, by Emu's interface.

The language model continues a prompt that ends with [IMG] by vectors in place of codes: the
regression head predicts each from the slot before it. Images of the prompt stand in it as the
vectors that the interface makes of them.
Source: Sun et al. 2023, Emu, section 2.

Axes: B prompts, n vectors of an image, H hidden size of the language model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lavit_jax.data.images import read_images
from lavit_jax.inference import batching, compiled, faults
from lavit_jax.inference.prompt_checks import check_prompt_lengths, shared_argument
from lavit_jax.inference.runner import ModelRunner


def regress_vectors(runner: ModelRunner, prompts: Sequence[Sequence[Any]]) -> np.ndarray:
  """The vectors of an image for each prompt; nothing is sampled.

  Args:
    runner: the model, with a `RegressingInterface`.
    prompts: B sequences of images and texts; one without parts is the unconditional prompt.

  Returns:
    f32[B, n, H].

  Raises:
    InputError: a text is blank, or a prompt too long.
    NotFinite: NaN or infinity came out of a module.
  """
  modules = runner.modules
  n = modules.num_image_vectors
  vocabulary = modules.vocabulary
  texts = [[runner.encode_text(part) for part in _texts(prompt)] for prompt in prompts]
  images = [[part for part in prompt if not isinstance(part, str)] for prompt in prompts]
  lengths = []
  for row_texts, row_images in zip(texts, images, strict=True):
    lengths.append(1 + sum(map(len, row_texts)) + (n + 2) * len(row_images))
  check_prompt_lengths(lengths, runner.params.max_length - n)
  seen = _see(runner, images)

  def pieces(row: int, first: int) -> list[Sequence[int]]:
    """Of a prompt whose images have the vectors from row `first` of the batch on."""
    row_texts = iter(texts[row])
    parts: list[Sequence[int]] = []
    for part in prompts[row]:
      if isinstance(part, str):
        parts.append(next(row_texts))
        continue
      parts += [[vocabulary.image_start], range(first, first + n), [vocabulary.image_end]]
      first += n
    return [*parts, [vocabulary.image_start]]

  def draw() -> Iterator[tuple[int, Any]]:
    for count, rows in batching.batch_ranges(len(prompts), batching.MAX_BATCH):
      starts = n * np.cumsum([0, *(len(images[row]) for row in rows)])
      batch = [pieces(row, start) for row, start in zip(rows, starts, strict=False)]
      vectors = [image for row in rows for image in seen[row]]
      features = jax.device_put(np.stack(vectors)) if vectors else None
      embeddings, mask = runner.embed_prompts(batch, features)
      yield (
        count,
        runner.run(
          compiled.regress,
          ('llama', 'interface'),
          embeddings,
          mask,
          cache_dtype=runner.cache_dtype,
        ),
      )

  fetched = batching.fetch_batches(draw(), len(prompts), 'vectors')
  if not fetched:
    return np.zeros((0, n, modules.llama.hidden_size), np.float32)
  vectors, row_faults = (
    np.concatenate([result[part][:count] for count, result in fetched]) for part in range(2)
  )
  faults.check(row_faults, vectors)
  return vectors


def negative_vectors(runner: ModelRunner, negative_prompt: str | None) -> np.ndarray:
  """The vectors f32[n, H] that guidance leads away from: of [IMG] alone, or after a text.

  Raises:
    UserError: the negative prompt is no text, blank or too long.
  """
  prompt = []
  with shared_argument('negative_prompt'):
    if negative_prompt not in (None, ''):
      runner.encode_text(negative_prompt)  # a check: what is no text would be an image below
      prompt.append(negative_prompt)
    return regress_vectors(runner, [prompt])[0]


def _texts(prompt: Sequence[Any]) -> list[str]:
  return [part for part in prompt if isinstance(part, str)]


def _see(runner: ModelRunner, images: Sequence[Sequence[Any]]) -> list[Sequence[np.ndarray]]:
  """The vectors [n, H] of the images of each prompt."""
  rows = [row for row, of_prompt in enumerate(images) for _ in of_prompt]
  if not rows:
    return [[] for _ in images]
  all_images = [image for of_prompt in images for image in of_prompt]
  pixels = read_images(all_images, runner.modules.image_size)
  vectors, counts = runner.run_batches(
    compiled.read_by_interface, ('vit', 'interface'), pixels, None
  )
  faults.check(np.maximum(-counts, 0), rows=rows)
  ends = np.cumsum([len(of_prompt) for of_prompt in images])
  return [list(part) for part in np.split(vectors, ends[:-1])]
