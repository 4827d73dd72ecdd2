"""Images to text: captions and answers.

The language model continues [IMG] features [/IMG] prompt (specification, Inference). With
Flamingo's interface it continues [IMG] [/IMG] prompt, and extra layers read the features.

Axes: B images, N slots for the features of an image, H hidden size of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array

from lavit_jax.data import chat
from lavit_jax.data import prompts as templates
from lavit_jax.data.images import read_images
from lavit_jax.errors import UserError
from lavit_jax.inference import batching, compiled, faults
from lavit_jax.inference.generation_config import GenerationConfig
from lavit_jax.inference.outputs import TextOutput
from lavit_jax.inference.prompt_checks import as_texts, require_text, shared_argument
from lavit_jax.inference.rng import (
  Purpose,
  Seed,
  example_keys,
  optional_keys,
  purpose_keys,
  take_keys,
)
from lavit_jax.inference.runner import ModelRunner, score_faults, sequences_of
from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.vocabulary import BOS_ID, EOS_ID, Vocabulary


def caption(
  runner: ModelRunner, images: Any, prompt: Any, config: GenerationConfig, seed: Seed | None
) -> list[TextOutput]:
  """Captions images; see `Lavit.caption_outputs`."""
  pixels = read_images(images, runner.modules.image_size)
  if isinstance(prompt, str):
    with shared_argument('prompt'):
      ids = runner.encode_optional_text(prompt)
      if len(pixels):
        runner.check_prompt_lengths(
          [min_image_tokens(runner.modules) + len(ids)], config, lower_bound=True
        )
    encoded = [ids] * len(pixels)
  else:
    encoded = [runner.encode_optional_text(text) for text in as_texts(prompt, 'prompt')]
  if len(encoded) != len(pixels):
    raise UserError(
      f'{len(pixels)} images but {len(encoded)} prompts; give one for each, or one for all'
    )
  outputs = continue_images(runner, pixels, encoded, config, seed)
  return [output._replace(text=templates.parse_caption(output.text)) for output in outputs]


def answer(
  runner: ModelRunner,
  images: Any,
  questions: Any,
  config: GenerationConfig,
  seed: Seed | None,
  *,
  check_answerable: bool,
) -> list[TextOutput]:
  """Answers questions about images; see `Lavit.answer_outputs`."""
  pixels = read_images(images, runner.modules.image_size)
  texts = as_texts(questions, 'questions')
  if len(pixels) != len(texts):
    raise UserError(
      f'{len(pixels)} images but {len(texts)} questions; give one question for each image'
    )

  before: Sequence[int] = ()  # the image, in all prompts

  def encode(template: Callable[[str], str]) -> list[Sequence[int]]:
    """Encodes the questions, and checks their lengths before anything is computed."""
    nonlocal before
    encoded = []
    for text in texts:
      before, ids = _encode_question(runner, text, template)
      encoded.append(ids)
    lengths = [len(before) + min_image_tokens(runner.modules) + len(ids) for ids in encoded]
    runner.check_prompt_lengths(lengths, config, lower_bound=True)
    return encoded

  def answers(encoded: Sequence[Sequence[int]]) -> list[TextOutput]:
    outputs = continue_images(runner, pixels, encoded, config, seed, before)
    return [output._replace(text=templates.parse_answer(output.text)) for output in outputs]

  encoded = encode(str)
  if not check_answerable:
    return answers(encoded)
  encoded_checks = encode(templates.answerable_question)
  outputs = answers(encoded)
  verdicts = answers(encoded_checks)
  checked = []
  for output, verdict in zip(outputs, verdicts, strict=True):
    if templates.is_unanswerable(verdict.text):
      output = output._replace(text=templates.UNANSWERABLE)
    checked.append(output)
  return checked


def min_image_tokens(modules: LavitModules) -> int:
  """[IMG], one visual token unless layers read them, [/IMG]."""
  return 3 if modules.layered_interface is None else 2


def image_reader(modules: LavitModules) -> tuple[Callable[..., Any], tuple[str, ...]]:
  """The program that encodes images for the language model, and the modules that it needs."""
  if modules.interface is not None:
    return compiled.read_by_interface, ('vit', 'interface')
  return compiled.read, ('vit', 'tokenizer', 'understanding')


def _encode_question(
  runner: ModelRunner, text: Any, template: Callable[[str], str]
) -> tuple[Sequence[int], Sequence[int]]:
  """The ids before and after the image, in the model's template of conversations.

  Raises:
    InputError: the text is blank, or not a text.
  """
  require_text(text)
  image = object()
  pieces = chat.question_turn(image, template(text), runner.chat_template).prompt
  position = pieces.index(image)
  before, after = (
    [token for piece in part for token in runner.tokenizer.encode(piece)]
    for part in (pieces[:position], pieces[position + 1 :])
  )
  if before:  # prompts that begin with an image have no <s>
    before = [BOS_ID, *before]
  return before, after


def continue_images(
  runner: ModelRunner,
  images: np.ndarray,
  prompts: Sequence[Sequence[int]],
  config: GenerationConfig,
  seed: Seed | None,
  before: Sequence[int] = (),
) -> list[TextOutput]:
  """Continues [IMG] features [/IMG] prompt with text, for each image.

  Args:
    runner: the model.
    images: uint8[B, H, W, 3], of the size of the image encoder.
    prompts: the ids after each image.
    config: how the language model continues.
    seed: of the patches that become tokens, and of sampling; None keeps the most probable patches.
    before: the ids before each image.

  Returns:
    B * num_return_sequences texts.

  Raises:
    InputError: a prompt is too long.
    NotFinite: NaN or infinity came out of a module.
  """
  tokenizer = runner.tokenizer  # before anything is computed, for its files may be damaged
  keys = (example_keys if config.do_sample else optional_keys)(seed, len(images))
  lengths = [len(before) + min_image_tokens(runner.modules) + len(ids) for ids in prompts]
  runner.check_prompt_lengths(lengths, config, lower_bound=True)
  vocabulary = runner.modules.vocabulary
  suppress = np.arange(vocabulary.size) >= vocabulary.text_size
  image_faults: list[int] = []

  def generate() -> Iterator[tuple[int, Any]]:
    for batch in batching.double_buffer(_encode_batches(runner, images, keys, config)):
      counts = np.asarray(batch.counts)
      image_faults.extend(np.maximum(-counts[: batch.n], 0))
      in_sequence = runner.modules.layered_interface is None
      counts = np.maximum(counts, 1) if in_sequence else np.zeros_like(counts)
      batch_prompts = [prompts[row] for row in batch.rows]
      pieces = _prompt_pieces(batch_prompts, counts, vocabulary, batch.features.shape[1], before)
      runner.check_prompt_lengths(
        [sum(map(len, prompt)) for prompt in pieces], config, rows=batch.rows, count=len(images)
      )
      embeddings, mask = runner.embed_prompts(pieces, batch.features if in_sequence else None)
      extra = None
      if not in_sequence:
        extra = runner.run(compiled.extra_layers, ('interface',), batch.features, mask)
      row_keys = None if keys is None else keys[batch.rows]
      yield (
        batch.n,
        runner.continue_prompts(
          config, embeddings, mask, row_keys, eos_id=EOS_ID, suppress=suppress, extra=extra
        ),
      )

  fetched = batching.fetch_batches(generate(), len(images), 'texts')
  outputs = []
  for ids, score in sequences_of(fetched, config):
    outputs.append(TextOutput(tokenizer.decode(ids.tolist()), ids, score))
  own_faults = score_faults([output.score for output in outputs])
  earlier_faults = np.repeat(image_faults, config.num_return_sequences)
  faults.check(np.where(earlier_faults, earlier_faults, own_faults), outputs)
  return outputs


class _EncodedBatch(NamedTuple):
  """Images as the language model reads them.

  Attributes:
    n: number of images; those after them are padding.
    rows: i32[B], the indices of the images.
    features: [B, N, H], a prefix of each image's; of a `LayeredInterface` [B, n, W].
    counts: i32[B], the lengths of the prefixes, or negative faults.
  """

  n: int
  rows: np.ndarray
  features: Array
  counts: Array


def _encode_batches(
  runner: ModelRunner, images: np.ndarray, keys: Array | None, config: GenerationConfig
) -> Iterator[_EncodedBatch]:
  patch_keys = None if keys is None else purpose_keys(Purpose.PATCHES, keys)
  runner.require_image_alone()
  program, module_names = image_reader(runner.modules)
  max_batch = batching.MAX_BATCH
  if config.do_sample:
    max_batch = max(1, max_batch // config.num_return_sequences)
  for n, rows in batching.batch_ranges(len(images), max_batch):
    batch_keys = None if patch_keys is None else take_keys(patch_keys, rows)
    features, counts = runner.run(program, module_names, images[rows], batch_keys)
    yield _EncodedBatch(n, rows, features, counts)


def _prompt_pieces(
  prompts: Sequence[Sequence[int]],
  counts: np.ndarray,
  vocabulary: Vocabulary,
  num_features: int,
  before: Sequence[int],
) -> list[list[Sequence[int]]]:
  """The pieces of before [IMG] features [/IMG] prompt.

  Features are ranges into the flattened batch, which has `num_features` rows for each image.
  """
  pieces = []
  for i, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
    start = i * num_features
    features = range(start, start + int(count))
    start_ids = [*before, vocabulary.image_start]
    pieces.append([start_ids, features, [vocabulary.image_end], prompt])
  return pieces
