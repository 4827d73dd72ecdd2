"""Continuous batching of prompts of images and texts; the device's side is in slots.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax import Array

from lavit_jax.errors import InputError, UserError
from lavit_jax.inference import faults, slots, text_generation
from lavit_jax.inference.prompt_checks import check_prompt_lengths
from lavit_jax.inference.rng import Purpose, example_keys, purpose_keys
from lavit_jax.inference.runner import ModelRunner
from lavit_jax.models.llama import unroll_layers
from lavit_jax.models.vocabulary import EOS_ID

MAX_JOINING = 8  # sequences whose prompts are read at once, a power of two


@dataclasses.dataclass(eq=False)
class TextSequence:
  """A prompt that should be continued with text, and how.

  Attributes:
    parts: of the prompt: images uint8[H, W, 3] of the size of the image encoder, and ids.
    seed: of the patches that become tokens, and of sampling.
    number: which sample of the prompt it is.
    temperature: divides the logits; 0 takes the most probable token.
    top_p: sample among the most probable ids that together reach this probability.
    min_new_tokens: tokens before which it does not end.
    max_new_tokens: most of them.
    prompt_tokens: length of the prompt; set when the prompt is read.
  """

  parts: Sequence[np.ndarray | Sequence[int]]
  seed: int = 0
  number: int = 0
  temperature: float = 1.0
  top_p: float = 1.0
  min_new_tokens: int = 0
  max_new_tokens: int = 16
  prompt_tokens: int = 0

  @property
  def images(self) -> list[np.ndarray]:
    """The images of the prompt."""
    return [part for part in self.parts if isinstance(part, np.ndarray)]


@dataclasses.dataclass(frozen=True)
class NewToken:
  """The next token of a sequence, or the error that ended it.

  Attributes:
    sequence: whose it is.
    id: of the token.
    is_last: whether the sequence has ended.
    error: why there is no token.
  """

  sequence: TextSequence
  id: int
  is_last: bool
  error: UserError | None = None


class SlotDecoder:
  """Continues sequences that join and leave at any time.

  Not for several threads at once.

  Args:
    model: continues the prompts.
    num_slots: the sequences that are continued at the same time.
    prompt_tokens: the most tokens of a prompt; rounded up to a multiple of the patches of an image.
    new_tokens: the most new tokens of a sequence.

  Raises:
    UserError: the model reads images by layers (Flamingo) or with a text (InstructBLIP), or fewer
      tokens than that.
  """

  def __init__(self, model: ModelRunner, num_slots: int, prompt_tokens: int, new_tokens: int):
    model.require_image_alone()
    modules = model.modules
    if modules.layered_interface is not None:
      raise UserError(
        f'interface {modules.interface_name!r} reads images by layers, which continuous batching '
        'does not have; use `lavit caption` or `lavit answer`'
      )
    self.prompt_tokens = -(-prompt_tokens // modules.num_patches) * modules.num_patches
    self.new_tokens = new_tokens
    if self.prompt_tokens + new_tokens > model.params.max_length:
      raise UserError(
        f'prompts of {self.prompt_tokens} tokens and {new_tokens} new ones are more than the '
        f'{model.params.max_length} that the language model reads; lower one of the two'
      )
    self._model = model
    self._llama, self._params = unroll_layers(modules.llama, model.params['llama'])
    self._program_options = dict(
      prompt_length=self.prompt_tokens,
      eos_id=EOS_ID,
      suppress=jax.device_put(np.arange(modules.vocabulary.size) >= modules.vocabulary.text_size),
    )
    self._num_slots = num_slots
    self.reset()

  def reset(self) -> None:
    """Empties all slots; after a failure, which may have left nothing of the cache."""
    self._state = slots.init_state(
      self._llama, self._num_slots, self.prompt_tokens, self.new_tokens, self._model.cache_dtype
    )
    self._rows = slots.Rows.empty(self._num_slots)
    self._sequences: list[TextSequence | None] = [None] * self._num_slots
    self._column = 0

  @property
  def num_free(self) -> int:
    """The slots without a sequence."""
    return self._sequences.count(None)

  @property
  def num_active(self) -> int:
    """The slots with a sequence."""
    return len(self._sequences) - self.num_free

  def check(self, sequence: TextSequence) -> None:
    """Checks what can be checked before anything is computed.

    Raises:
      InputError: the prompt is empty or too long, or too many new tokens are asked for.
    """
    if sequence.max_new_tokens > self.new_tokens:
      raise InputError(
        f'{sequence.max_new_tokens} new tokens are too many; ask for at most {self.new_tokens}'
      )
    ids = sum(len(part) for part in sequence.parts if not isinstance(part, np.ndarray))
    images = len(sequence.images) * text_generation.min_image_tokens(self._model.modules)
    if not ids + images:
      raise InputError('the prompt is empty; give it a text or an image')
    check_prompt_lengths([ids + images], self.prompt_tokens, lower_bound=True)

  def join(self, sequences: Sequence[TextSequence]) -> list[NewToken]:
    """Reads the prompts of sequences, at most `MAX_JOINING` and `num_free`.

    Returns:
      The first token of each, or why it cannot join.
    """
    prompts, features, errors = self._read_prompts(sequences)
    refused = [NewToken(sequence, EOS_ID, True, error) for sequence, error in errors.items()]
    joining = [sequence for sequence in sequences if sequence not in errors]
    if not joining:
      return refused
    taken = np.flatnonzero([sequence is None for sequence in self._sequences])[: len(joining)]
    for slot, sequence in zip(taken, joining, strict=True):
      self._sequences[slot] = sequence
    self._set_rows(taken, joining)

    padded = 1 << (len(joining) - 1).bit_length()
    padding = padded - len(joining)
    embeddings, mask = self._model.embed_prompts(prompts + prompts[-1:] * padding, features)
    with self._model.on_mesh():
      self._state, tokens = slots.join(
        self._llama,
        self._params,
        self._state,
        np.pad(taken, (0, padding), constant_values=len(self._sequences)).astype(np.int32),
        embeddings,
        mask,
        self._rows.take(np.pad(taken, (0, padding), mode='edge')),
        **self._program_options,
      )
    return refused + self._record(taken, tokens, np.arange(len(joining)))

  def advance(self) -> list[NewToken]:
    """Returns the next token of each sequence."""
    active = np.array([sequence is not None for sequence in self._sequences])
    with self._model.on_mesh():
      self._state, tokens = slots.advance(
        self._llama,
        self._params,
        self._state,
        np.int32(self._column),
        active,
        self._rows,
        **self._program_options,
      )
    self._column = (self._column + 1) % self.new_tokens
    taken = np.flatnonzero(active)
    return self._record(taken, tokens, taken)

  def leave(self, sequence: TextSequence) -> None:
    """Frees the slot of a sequence, if it has one."""
    if sequence in self._sequences:
      self._sequences[self._sequences.index(sequence)] = None

  def _set_rows(self, taken: np.ndarray, joining: Sequence[TextSequence]) -> None:
    keys = example_keys([sequence.seed for sequence in joining], len(joining))
    numbers = np.array([sequence.number for sequence in joining])
    keys = purpose_keys(Purpose.TOKENS, keys, numbers)
    self._rows.key_data[taken] = np.asarray(jax.random.key_data(keys))
    for slot, sequence in zip(taken, joining, strict=True):
      self._rows.temperature[slot] = sequence.temperature
      self._rows.top_p[slot] = sequence.top_p
      self._rows.min_new_tokens[slot] = sequence.min_new_tokens
      self._rows.step[slot] = 0
      self._rows.position[slot] = sequence.prompt_tokens - 1

  def _record(
    self, taken: np.ndarray, tokens: slots.NextTokens, places: np.ndarray
  ) -> list[NewToken]:
    """Notes the new tokens of slots, which are at some places among `tokens`."""
    ids, finite = jax.device_get(tokens)
    self._rows.token[taken] = ids[places]
    self._rows.step[taken] += 1
    self._rows.position[taken] += 1
    results = []
    for slot, place in zip(taken, places, strict=True):
      sequence = self._sequences[slot]
      assert sequence is not None
      error = None if finite[place] else _not_finite('llama')
      is_full = self._rows.step[slot] >= sequence.max_new_tokens
      is_last = bool(ids[place] == EOS_ID or is_full or error is not None)
      if is_last:
        self._sequences[slot] = None
      results.append(NewToken(sequence, int(ids[place]), is_last, error))
    return results

  def _read_prompts(
    self, sequences: Sequence[TextSequence]
  ) -> tuple[list[list[Sequence[int]]], Array | None, dict[TextSequence, UserError]]:
    """Encodes the images of prompts.

    Returns:
      The pieces of each prompt that can join (`sequence.layout_prompts`), the features of all
      images, and the errors of the others.
    """
    features, counts = self._read_images(sequences)
    vocabulary = self._model.modules.vocabulary
    prompts = []
    errors: dict[TextSequence, UserError] = {}
    first_image = 0
    for sequence in sequences:
      last_image = first_image + len(sequence.images)
      own_counts = counts[first_image:last_image]
      pieces: list[Sequence[int]] = []
      number = first_image
      for part in sequence.parts:
        if not isinstance(part, np.ndarray):
          pieces.append(part)
          continue
        assert features is not None
        start = number * features.shape[1]
        features_of_part = range(start, start + max(1, int(counts[number])))
        pieces += [[vocabulary.image_start], features_of_part, [vocabulary.image_end]]
        number += 1
      first_image = last_image
      sequence.prompt_tokens = sum(map(len, pieces))
      try:
        faults.check(np.maximum(-own_counts, 0), rows=[0] * len(own_counts))
        check_prompt_lengths([sequence.prompt_tokens], self.prompt_tokens)
        prompts.append(pieces)
      except InputError as error:
        errors[sequence] = error
    return prompts, features, errors

  def _read_images(self, sequences: Sequence[TextSequence]) -> tuple[Array | None, np.ndarray]:
    """The features [I, N, H] of all images, None without any, and their numbers i32[I]."""
    images = []
    seeds = []
    numbers = []
    for sequence in sequences:
      images += sequence.images
      seeds += [sequence.seed] * len(sequence.images)
      numbers += range(len(sequence.images))
    if not images:
      return None, np.zeros(0, np.int32)
    keys = purpose_keys(Purpose.PATCHES, example_keys(seeds, len(seeds)), np.array(numbers))
    program, names = text_generation.image_reader(self._model.modules)
    features, counts = self._model.run_batches(program, names, np.stack(images), keys)
    padding = (1 << (len(images) - 1).bit_length()) - len(images)  # so that few shapes compile
    return jax.device_put(np.pad(features, ((0, padding), (0, 0), (0, 0)))), counts


def _not_finite(module: str) -> UserError:
  """The error of a module whose result is not finite."""
  try:
    faults.check(np.array([faults.number(module)]))
  except faults.NotFinite as error:
    return error
  raise AssertionError(module)
