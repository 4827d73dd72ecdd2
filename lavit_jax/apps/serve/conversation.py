"""Messages of a chat -> the parts of a prompt.

LaVIT is no chat model. A message of the user is written as its training questions are: its images,
then `Question: TEXT Answer:`; images without a text are captioned. Earlier turns stand before, each
answer with an end token. A system message is plain text.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np

from lavit_jax.data import prompts
from lavit_jax.data.images import open_image, read_image, resize
from lavit_jax.data.text import TextTokenizer
from lavit_jax.errors import InputError
from lavit_jax.models.vocabulary import BOS_ID, EOS_ID

ROLES = ('system', 'developer', 'user', 'assistant')
DATA_URL = 'data:image/'


def prompt_parts(
  messages: Sequence[Any], tokenizer: TextTokenizer, image_size: int, max_pixels: int
) -> list[np.ndarray | Sequence[int]]:
  """The parts of a prompt (`TextSequence.parts`).

  Args:
    messages: {'role': ..., 'content': a text or a list of parts} of each, as OpenAI's client sends
      them. The parts have the type 'text' or 'image_url', whose URL holds the image itself.
    tokenizer: of the model.
    image_size: side of the image encoder's input in pixels.
    max_pixels: of an image.

  Raises:
    InputError: a message is malformed, or the last one is not the user's.
  """
  if not messages or _role(messages[-1]) != 'user':
    raise InputError("messages: the last one must have the role 'user'")
  parts: list[np.ndarray | Sequence[int]] = []
  for number, message in enumerate(messages):
    name = f'messages[{number}]'
    texts, images = _content(message.get('content'), name, max_pixels)
    text = '\n'.join(texts).strip()
    parts += [resize(image, image_size) for image in images]
    match _role(message, name):
      case 'user' if text:
        parts.append(tokenizer.encode(prompts.question_prompt(text)))
      case 'user' if not images:
        raise InputError(f'{name} is empty; write a text or add an image')
      case 'assistant':
        parts.append((*tokenizer.encode(text), EOS_ID))
      case 'system' | 'developer' if text:
        parts.append(tokenizer.encode(text))
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
  return role


def _content(content: Any, name: str, max_pixels: int) -> tuple[list[str], list[np.ndarray]]:
  """The texts and the images of a message."""
  if isinstance(content, str):
    return [content], []
  if not isinstance(content, list):
    raise InputError(f'{name}.content must be a text or a list of parts')
  texts = []
  images = []
  for number, part in enumerate(content):
    part_name = f'{name}.content[{number}]'
    kind = part.get('type') if isinstance(part, dict) else None
    if kind == 'text' and isinstance(part.get('text'), str):
      texts.append(part['text'])
    elif kind == 'image_url':
      images.append(_open_data_url(part.get('image_url'), part_name, max_pixels))
    else:
      raise InputError(f"{part_name}: give {{'type': 'text', ...}} or {{'type': 'image_url', ...}}")
  return texts, images


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
