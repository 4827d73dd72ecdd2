"""The tokens of a request's sequences -> the text of its reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lavit_jax.data.text import TextTokenizer
from lavit_jax.models.vocabulary import EOS_ID

FinishReason = Literal['stop', 'length']
_UNFINISHED = '\ufffd'  # what bytes of a character give until the last has come


class Reply:
  """The text of one sequence, as its tokens come.

  Args:
    tokenizer: of the model.
    stop: texts before which the reply ends.

  Attributes:
    text: what is certain of it by now.
    num_tokens: generated, with the end token.
    finish_reason: why it has ended; None before that.
  """

  def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str]):
    self._tokenizer = tokenizer
    self._stop = [text for text in stop if text]
    self._ids: list[int] = []
    self.text = ''
    self.num_tokens = 0
    self.finish_reason: FinishReason | None = None

  def add(self, token: int, is_last: bool) -> str:
    """Adds a token, and returns the text that is new."""
    self.num_tokens += 1
    if token != EOS_ID:
      self._ids.append(token)
    text = self._tokenizer.decode(self._ids).lstrip()
    stops = [position for stop in self._stop if (position := text.find(stop)) >= 0]
    if stops:
      text = text[: min(stops)]
      self.finish_reason = 'stop'
    elif is_last:
      self.finish_reason = 'stop' if token == EOS_ID else 'length'
    else:
      text = text[: len(text) - self._uncertain(text)]
    if not text.startswith(self.text):  # a tokenizer that rewrites what it has said
      text = self.text
    new = text[len(self.text) :]
    self.text = text
    return new

  def _uncertain(self, text: str) -> int:
    """How many characters at the end may still change, or begin a stop text."""
    uncertain = len(text) - len(text.rstrip(_UNFINISHED))
    for stop in self._stop:
      for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
          uncertain = max(uncertain, length)
          break
    return uncertain
