"""Texts -> the text fields of a row: padded ids, and the weight of each token in the loss."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lavit_jax.data import chat, conversations, long_text, transforms
from lavit_jax.data.chat import ChatTemplate, Message, Turn
from lavit_jax.data.cleaning import clean_caption, clean_text
from lavit_jax.data.record import EMPTY_CAPTION, Skip
from lavit_jax.data.tasks import DIALOGS, KIND_OF_USE, UseSampler, pair_shares
from lavit_jax.data.text import END, TextTokenizer
from lavit_jax.models.packing import CHAT, IMAGE_ID, IMAGE_TO_TEXT

_CHARACTERS = 16  # encoded for each token of a row: more than any language needs

NOTES = 'notes'  # key in a row: what was left out of it, for the counts

Fields = dict[str, Any]


class TextEncoder:
  """Encodes texts for rows of `length` tokens.

  The fields are text int32[length], padded with 0; text_length int32; text_weight
  float32[length + 1], the weight in the loss of each token and of the one after the text. Begin
  and end tokens are added when rows are packed.

  Args:
    tokenizer_folder: of the tokenizer.
    length: tokens of a row.

  Attributes:
    length: as the argument.

  Raises:
    ValueError: no folder.
    UserError: as TextTokenizer.load.
  """

  def __init__(self, tokenizer_folder: str | None, length: int):
    if tokenizer_folder is None:
      raise ValueError('this task has text: give tokenizer_folder')
    self._tokenizer = TextTokenizer.load(tokenizer_folder)
    self.length = length

  def encode(self, text: str, weight: float = 1.0) -> Fields:
    """The fields of a whole text.

    Raises:
      ValueError: the text has more tokens than a row.
    """
    ids = self._tokenizer.encode(text)
    self._check_length(len(ids), text)
    return self._fields(ids, weight)

  def encode_turns(self, turns: Sequence[Turn], first_turns: bool = False) -> Fields | None:
    """The fields of prompts with answers, of as many as there is room for.

    Each answer ends with an end token. Answers and end tokens have weight 1, prompts 0. An image is
    `IMAGE_ID`.

    Args:
      turns: at least one; each has an answer.
      first_turns: whether they depend on those before them, so that none may follow one for which
        there is no room. Then `NOTES` say if some are left out.

    Returns:
      The fields, and `NOTES` with `first_turns`; None with that if the first finds no room.

    Raises:
      ValueError: the first has more tokens than a row, without `first_turns`.
    """
    ids: list[int] = []
    learned: list[int] = []  # the indices with weight 1
    notes: tuple[str, ...] = ()
    for number, turn in enumerate(turns):
      prompt_ids = self._prompt_ids(turn)
      # the tokenizer begins every text with a space; LLaMA's would begin an answer with two
      answer_ids = self._tokenizer.encode((turn.answer or '').removeprefix(' '))
      separator = (END,) if number else ()
      num_ids = len(ids) + len(separator) + len(prompt_ids) + len(answer_ids)
      if num_ids > self.length:
        if first_turns:
          notes = ('cut conversation',)
          break
        if number:
          continue
        self._check_length(num_ids, f'{"".join(filter(_is_text, turn.prompt))}{turn.answer}')
      learned.extend(range(len(ids), len(ids) + len(separator)))
      learned.extend(range(num_ids - len(answer_ids), num_ids))
      ids.extend((*separator, *prompt_ids, *answer_ids))
    if not ids:
      return None
    fields = self._fields(ids, 0.0)
    fields['text_weight'][learned] = 1.0
    return {**fields, NOTES: notes} if first_turns else fields

  def _prompt_ids(self, turn: Turn) -> list[int]:
    ids: list[int] = []
    for piece in turn.prompt:
      ids.extend(self._tokenizer.encode(piece) if _is_text(piece) else (IMAGE_ID,))
    return ids

  def _check_length(self, num_ids: int, text: str) -> None:
    if num_ids > self.length:
      raise ValueError(
        f'text_length is {self.length}, but this text has {num_ids} tokens: {text!r}'
      )

  def encode_beginning(self, text: str, weight: float) -> Fields:
    """The fields of as much of a text as a row has room for."""
    most = _CHARACTERS * self.length
    ids = self._tokenizer.encode_uncached(text[:most])
    is_whole = len(ids) <= self.length and len(text) <= most
    return self._fields(ids[: self.length], weight, is_whole=is_whole)

  def encode_piece(self, text: str, weight: float, epoch: int, seed: int) -> Fields:
    """The fields of the piece of a plain text that is read in this epoch (long_text.py)."""
    ids, is_end = long_text.select_piece(
      text, self._tokenizer.encode_uncached, self.length, epoch, seed
    )
    return self._fields(ids, weight, is_whole=is_end)

  def _fields(self, ids: Sequence[int], weight: float, is_whole: bool = True) -> Fields:
    """The fields of ids of one weight.

    The token after the text is learned only if the text ends with these ids (`is_whole`).
    """
    padded = np.zeros(self.length, np.int32)
    padded[: len(ids)] = ids
    weights = np.zeros(self.length + 1, np.float32)
    weights[: len(ids)] = weight
    weights[len(ids)] = float(is_whole)
    return {'text': padded, 'text_length': np.int32(len(ids)), 'text_weight': weights}


def _is_text(piece: Any) -> bool:
  return isinstance(piece, str)


def encode_answers(
  encoder: TextEncoder, messages: Sequence[Message], template: ChatTemplate
) -> Fields:
  """The fields of questions about one image, as many as there is room for, with 'kind'.

  They are a row of an image to text if the template has the image before all else.

  Raises:
    ValueError: the first question has more tokens than a row.
  """
  turns, kind = chat.render(messages, template), CHAT
  if (rest := chat.without_first_image(turns)) is not None:
    turns, kind = rest, IMAGE_TO_TEXT
  fields = encoder.encode_turns(turns)
  assert fields is not None
  return {**fields, 'kind': np.int32(kind)}


def _encode_dialog(
  encoder: TextEncoder, messages: Sequence[Message], template: ChatTemplate
) -> Fields | Skip:
  """The fields of the first turns of a conversation, up to one without an answer.

  Or why there are none.
  """
  turns = list(itertools.takewhile(lambda turn: turn.answer, chat.render(messages, template)))
  if not turns:
    return Skip('no answer', '')
  fields = encoder.encode_turns(turns, first_turns=True)
  if fields is None:
    detail = f' (its first turn has more than data.text_length={encoder.length} tokens)'
    return Skip('long conversation', detail)
  return {**fields, 'kind': np.int32(CHAT)}


def pair_encoder(
  encoder: TextEncoder,
  shares: Mapping[str, float],
  draw_text_weight: float,
  drop_text: float,
  seed: int,
  template: ChatTemplate,
) -> transforms.EncodeTexts:
  """The function that encodes the texts of records.

  Args:
    encoder: encodes texts.
    shares: {use: how often}, where the source does not name its use.
    draw_text_weight: the weight of captions in rows of use 'draw'.
    drop_text: the share of these rows that have no text.
    seed: of the run.
    template: of conversations and questions.

  Returns:
    (texts of a record, use of its source, rng, epoch) -> text fields and 'kind' of its row, or why
    there are none.
  """
  sample_use = UseSampler(pair_shares(shares))

  def encode_pair(
    texts: Sequence[str], use: str, rng: np.random.Generator, epoch: int
  ) -> Fields | Skip:
    if use in DIALOGS:
      if use == 'chat':
        messages = conversations.parse_messages(texts[0])
      else:
        messages = conversations.question_messages(texts, rng.integers)
      return _encode_dialog(encoder, messages, template)
    clean = clean_text if use == 'text' else clean_caption
    text = transforms.choose_caption(texts, rng, clean)
    if not text:
      return Skip(EMPTY_CAPTION, '')
    if use == 'text':
      fields = encoder.encode_piece(text, 1.0, epoch, seed)
    else:
      use = use or sample_use(rng)
      if use == 'draw' and rng.random() < drop_text:
        text = ''
      fields = encoder.encode_beginning(text, draw_text_weight if use == 'draw' else 1.0)
    fields['kind'] = np.int32(KIND_OF_USE[use])
    return fields

  return encode_pair
