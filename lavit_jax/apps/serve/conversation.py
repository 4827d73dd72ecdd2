"""Messages of a chat -> the parts of a prompt.

They are written by the template that the model was trained with (data/chat.py). LaVIT is no chat
model: its template is that of its questions, and images without a text are captioned. Earlier turns
stand before, each answer with an end token.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np

from lavit_jax.data import chat
from lavit_jax.data.chat import ChatTemplate, Message
from lavit_jax.data.images import open_image, read_image, resize
from lavit_jax.data.text import TextTokenizer
from lavit_jax.errors import InputError
from lavit_jax.models.vocabulary import BOS_ID, EOS_ID

ROLES = {
  'system': chat.SYSTEM,
  'developer': chat.SYSTEM,
  'user': chat.USER,
  'assistant': chat.ASSISTANT,
}
DATA_URL = 'data:image/'


def prompt_parts(
  messages: Sequence[Any],
  tokenizer: TextTokenizer,
  template: ChatTemplate,
  image_size: int,
  max_pixels: int,
) -> list[np.ndarray | Sequence[int]]:
  """The parts of a prompt (`TextSequence.parts`).

  Args:
    messages: {'role': ..., 'content': a text or a list of parts} of each, as OpenAI's client sends
      them. The parts have the type 'text' or 'image_url', whose URL holds the image itself.
    tokenizer: of the model.
    template: of the model.
    image_size: side of the image encoder's input in pixels.
    max_pixels: of an image.

  Raises:
    InputError: a message is malformed, or the last one is not the user's.
  """
  if not messages or _role(messages[-1]) != chat.USER:
    raise InputError("messages: the last one must have the role 'user'")
  conversation = []
  for number, message in enumerate(messages):
    name = f'messages[{number}]'
    role = _role(message, name)
    content = _content(message.get('content'), name, image_size, max_pixels)
    if role == chat.USER and not any(not isinstance(part, str) or part.strip() for part in content):
      raise InputError(f'{name} is empty; write a text or add an image')
    if role != chat.USER and not all(isinstance(part, str) for part in content):
      raise InputError(f'{name} has an image; send images in messages of the user')
    conversation.append(Message(role, tuple(content)))
  parts: list[np.ndarray | Sequence[int]] = []
  for turn in chat.render(conversation, template):
    parts += [tokenizer.encode(part) if isinstance(part, str) else part for part in turn.prompt]
    if turn.answer is not None:
      parts.append((*tokenizer.encode(turn.answer), EOS_ID))
  if not isinstance(parts[0], np.ndarray):  # rows that begin with an image have no <s>
    parts.insert(0, (BOS_ID,))
  return parts


def decode_image(data: bytes, name: str, max_pixels: int) -> np.ndarray:
  """Reads the bytes of an image file as uint8[H, W, 3].

  Raises:
    InputError: it is none, or has too many pixels.
  """
  try:
    width, height = open_image(data, name).size
    if width * height > max_pixels:
      raise InputError(
        f'{name}: {width} x {height} is too large; scale it below {max_pixels / 1e6:g} million '
        'pixels'
      )
    return read_image(data, name)
  except InputError:
    raise
  except Exception as error:
    raise InputError(str(error)) from None


def _role(message: Any, name: str = 'messages[-1]') -> str:
  role = message.get('role') if isinstance(message, dict) else None
  if role not in ROLES:
    raise InputError(f'{name}: the role {role!r} is unknown; choose one of {", ".join(ROLES)}')
  return ROLES[role]


def _content(content: Any, name: str, image_size: int, max_pixels: int) -> list[str | np.ndarray]:
  """The texts and the images of a message, in order."""
  if isinstance(content, str):
    return [content]
  if not isinstance(content, list):
    raise InputError(f'{name}.content must be a text or a list of parts')
  parts: list[str | np.ndarray] = []
  for number, part in enumerate(content):
    part_name = f'{name}.content[{number}]'
    kind = part.get('type') if isinstance(part, dict) else None
    if kind == 'text' and isinstance(part.get('text'), str):
      parts.append(part['text'])
    elif kind == 'image_url':
      image = _open_data_url(part.get('image_url'), part_name, max_pixels)
      parts.append(resize(image, image_size))
    else:
      raise InputError(f"{part_name}: give {{'type': 'text', ...}} or {{'type': 'image_url', ...}}")
  return parts


def _open_data_url(value: Any, name: str, max_pixels: int) -> np.ndarray:
  url = value.get('url') if isinstance(value, dict) else value
  if not isinstance(url, str) or not url.startswith(DATA_URL):
    raise InputError(
      f'{name}: the server fetches nothing; send the image itself, as data:image/png;base64,...'
    )
  header, comma, encoded = url.partition(',')
  if not comma or not header.endswith(';base64'):
    raise InputError(f'{name}: an image URL must be data:image/png;base64,...')
  try:
    data = base64.b64decode(encoded, validate=True)
  except (binascii.Error, ValueError):
    raise InputError(f'{name}: the image is not valid base64; encode it again') from None
  return decode_image(data, name, max_pixels)
