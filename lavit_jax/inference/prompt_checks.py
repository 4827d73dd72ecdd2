"""Checks of a user's texts and prompts, before anything is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lavit_jax.data.images import is_single_image
from lavit_jax.errors import InputError, UserError


def as_texts(value: Any, name: str) -> list[Any]:
  """Returns one text, or several in a sequence, as a list.

  Args:
    value: the user's argument; its items are checked by `is_blank`.
    name: of the argument, for the message.

  Raises:
    UserError: it is neither.
  """
  if isinstance(value, str):
    return [value]
  try:
    return list(value)
  except TypeError:
    raise UserError(f'{name}={value!r} is not allowed; give a text, or a list of them') from None


def as_prompts(value: Any) -> list[Sequence[Any]]:
  """Returns prompts of images and texts.

  Args:
    value: a sequence of prompts, each a sequence of parts; or one prompt with both images and
      texts.

  Raises:
    UserError: it is neither.
  """
  items: list[Any] = [value]
  if isinstance(value, Iterable) and not isinstance(value, str):
    items = list(value)
  is_text = [isinstance(item, str) for item in items]
  if any(is_text) and not all(is_text) and all(map(is_single_image, items)):
    return [items]
  for item in items:
    if not isinstance(item, Sequence) or is_single_image(item):
      raise UserError(
        'prompts are lists of parts, [[image, text], [text], ...]; put each prompt in brackets'
      )
  return items


def require_text(text: Any) -> None:
  """Raises InputError if a text is blank, or not a text."""
  if is_blank(text):
    raise InputError('the text is empty; write a prompt or a question')


def is_blank(text: Any) -> bool:
  """Whether a text is empty or white space.

  Raises:
    InputError: it is not a text, or cannot be encoded.
  """
  try:
    return not text.encode().strip()
  except (AttributeError, UnicodeEncodeError):
    raise InputError(f'{text!r} is not a text; write it again') from None


def check_prompt_lengths(
  lengths: Sequence[int],
  max_length: int,
  *,
  rows: Iterable[int] | None = None,
  count: int | None = None,
  lower_bound: bool = False,
) -> None:
  """Checks that prompts fit.

  Args:
    lengths: number of tokens of each prompt.
    max_length: most tokens of a prompt.
    rows: index of each prompt among all; by default, these are all.
    count: number of all prompts.
    lower_bound: whether the lengths count one token for each image, whose number is not known yet.

  Raises:
    InputError: a prompt is too long.
  """
  if count is None:
    count = len(lengths)
  if rows is None:
    rows = range(count)
  for row, length in zip(rows, lengths, strict=True):
    if length > max_length:
      number = f', {row + 1} of {count},' if count > 1 else ''
      at_least = 'at least ' if lower_bound else ''
      raise InputError(
        f'the prompt{number} is {at_least}{length} tokens long; shorten it to {max_length}'
      )


@contextlib.contextmanager
def shared_argument(name: str) -> Iterator[None]:
  """Turns an InputError into a UserError: the text is an argument that all rows share."""
  try:
    yield
  except InputError as error:
    raise UserError(f'{name}: {error}') from None
