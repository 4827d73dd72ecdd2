"""Prompts of images and texts to the codes of new images.

The language model continues a prompt that ends with [IMG]. Images of the prompt stand in it as
their codes, which are what the model itself generates (specification, Inference).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax import Array

from lavit_jax.data.images import read_images
from lavit_jax.errors import InputError, UserError
from lavit_jax.inference import batching, faults
from lavit_jax.inference.decode import GenerateOutput
from lavit_jax.inference.generation_config import GenerationConfig
from lavit_jax.inference.outputs import CodesOutput
from lavit_jax.inference.prompt_checks import shared_argument
from lavit_jax.inference.rng import Purpose, purpose_keys
from lavit_jax.inference.runner import ModelRunner, score_faults, sequences_of
from lavit_jax.models.vocabulary import EOS_ID

Ids = Sequence[int] | np.ndarray
Pieces = list[Ids]


def resolve_negative_prompt(
  runner: ModelRunner, negative_prompt: str | None, config: GenerationConfig
) -> Pieces:
  """Returns the pieces of the prompt that guidance leads away from.

  Raises:
    UserError: the negative prompt is no text, blank or too long, or there is no guidance.
  """
  image_start = [runner.modules.vocabulary.image_start]
  if negative_prompt is None or negative_prompt == '':
    return [image_start]
  if config.guidance_scale is None:
    raise UserError(
      'negative_prompt has no effect without guidance; leave it out, '
      'or choose guidance_scale above 1'
    )
  with shared_argument('negative_prompt'):
    pieces = [runner.encode_text(negative_prompt), image_start]
    runner.check_prompt_lengths([sum(map(len, pieces))], config)
  return pieces


def sample_codes(
  runner: ModelRunner,
  prompts: Sequence[Sequence[Any]],
  config: GenerationConfig,
  keys: Array,
  negative_pieces: Pieces,
) -> list[CodesOutput]:
  """Samples the codes of an image for each prompt; see `Lavit.sample_code_outputs`.

  Args:
    runner: the model.
    prompts: B sequences of images and texts.
    config: how the language model samples.
    keys: keys[B] of the prompts.
    negative_pieces: as `resolve_negative_prompt` returns them.

  Returns:
    B * num_return_sequences codes, those of the first prompt first.

  Raises:
    InputError: a prompt is empty or too long.
    NotFinite: NaN or infinity came out of a module.
  """
  pieces = _prompt_pieces(runner, prompts, config, keys)
  vocabulary = runner.modules.vocabulary
  ids = np.arange(vocabulary.size)
  suppress = (ids > EOS_ID) & (ids < vocabulary.text_size)

  def sample(rows: np.ndarray) -> GenerateOutput:
    batch = [pieces[row] for row in rows]
    size = len(batch)
    guidance = {}
    if config.guidance_scale is not None:
      batch += [negative_pieces] * size
    embeddings, mask = runner.embed_prompts(batch)
    if config.guidance_scale is not None:
      guidance = dict(
        guidance_scale=config.guidance_scale,
        uncond_embeddings=embeddings[size:],
        uncond_mask=mask[size:],
      )
    return runner.continue_prompts(
      config,
      embeddings[:size],
      mask[:size],
      keys[rows],
      eos_id=vocabulary.image_end,
      suppress=suppress,
      **guidance,
    )

  max_batch = max(1, batching.MAX_BATCH // config.num_return_sequences)
  ranges = batching.batch_ranges(len(prompts), max_batch)
  fetched = batching.fetch_batches(((n, sample(rows)) for n, rows in ranges), len(prompts), 'codes')
  outputs = []
  for new_ids, score in sequences_of(fetched, config):
    codes = new_ids[new_ids >= vocabulary.code_offset] - vocabulary.code_offset
    outputs.append(CodesOutput(codes, new_ids, score))
  faults.check(score_faults([output.score for output in outputs]), outputs)
  return outputs


def _prompt_pieces(
  runner: ModelRunner, prompts: Sequence[Sequence[Any]], config: GenerationConfig, keys: Array
) -> list[Pieces]:
  """Encodes the parts of prompts, and tokenizes their images; checks all lengths."""
  if not all(len(prompt) for prompt in prompts):
    raise InputError('the prompt is empty; give it texts or images')
  encoded = [[_encode_part(runner, part) for part in prompt] for prompt in prompts]
  bracketed = runner.defaults.bracketed
  min_image_tokens = 3 if bracketed else 1
  lengths = []
  for parts in encoded:
    lengths.append(1 + sum(min_image_tokens if ids is None else len(ids) for ids in parts))
  runner.check_prompt_lengths(lengths, config, lower_bound=True)

  vocabulary = runner.modules.vocabulary
  image_codes = _tokenize_parts(runner, prompts, keys)
  all_pieces = []
  for parts in encoded:
    pieces: Pieces = []
    for ids in parts:
      if ids is not None:
        pieces.append(ids)
        continue
      code_ids = next(image_codes) + vocabulary.code_offset
      if bracketed:
        pieces += [[vocabulary.image_start], code_ids, [vocabulary.image_end]]
      else:
        pieces.append(code_ids)
    pieces.append([vocabulary.image_start])
    all_pieces.append(pieces)
  runner.check_prompt_lengths([sum(map(len, pieces)) for pieces in all_pieces], config)
  return all_pieces


def _encode_part(runner: ModelRunner, part: Any) -> Ids | None:
  """The ids of a text; None for an image."""
  return runner.encode_text(part) if isinstance(part, str) else None


def _tokenize_parts(
  runner: ModelRunner, prompts: Sequence[Sequence[Any]], keys: Array
) -> Iterator[np.ndarray]:
  """The codes of the images of all prompts.

  The j-th image of a prompt gets the j-th key of its prompt, whatever the other prompts are.
  """
  images = []
  rows = []
  numbers = []
  for row, prompt in enumerate(prompts):
    prompt_images = [part for part in prompt if not isinstance(part, str)]
    images += prompt_images
    rows += [row] * len(prompt_images)
    numbers += range(len(prompt_images))
  if not images:
    return iter(())
  pixels = read_images(images, runner.modules.image_size)
  patch_keys = purpose_keys(Purpose.PATCHES, keys[np.array(rows)], np.array(numbers))
  return iter(runner.tokenize_images(pixels, patch_keys, np.array(rows)).ids)
