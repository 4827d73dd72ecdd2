r"""Conversations -> what the language model reads and learns: the templates of chats.

A template is one for training (`text_fields.py`), `Lavit.answer` and `lavit serve`. A checkpoint
records which one it was trained with (models/settings.py).

| template | a turn with an image                                                    |
|----------|-------------------------------------------------------------------------|
| lavit    | [IMG] v [/IMG] Question: TEXT Answer: ANSWER </s>                       |
| vicuna   | USER: [IMG] v [/IMG] \n TEXT ASSISTANT: ANSWER </s>; before the first   |
|          | turn the system message of LLaVA 1.5 (its conversation 'vicuna_v1')     |
| llava_v1 | the same, with the system message of LLaVA v1                           |
| plain    | [IMG] v [/IMG] TEXT ANSWER </s>                                         |

Images at the begin or the end of a message stand before its text, images between texts stay there.
Each text between images is encoded by itself, as in LLaVA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lavit_jax.data.prompts import question_prompt

SYSTEM = 'system'
USER = 'user'
ASSISTANT = 'assistant'
_SLOT = '{}'


class Message(NamedTuple):
  """What one side says.

  Attributes:
    role: SYSTEM, USER or ASSISTANT.
    content: texts, and between them images of any other type.
  """

  role: str
  content: tuple[Any, ...]


class Turn(NamedTuple):
  """A prompt, and what is to be answered.

  Attributes:
    prompt: texts and images, each to be encoded by itself.
    answer: None: it is to come.
  """

  prompt: tuple[Any, ...]
  answer: str | None


class ChatTemplate(NamedTuple):
  """How conversations are written.

  Attributes:
    user: a message of the user, '{}' stands for its text.
    system: the system message of a conversation that has none; '' for none.
    images_inside: whether images before a text stand within `user`, not before it.
    after_image: follows such an image.
  """

  user: str
  system: str = ''
  images_inside: bool = False
  after_image: str = ''


_VICUNA = ChatTemplate(
  'USER: {} ASSISTANT:',
  system='A chat between a curious user and an artificial intelligence assistant. The assistant '
  "gives helpful, detailed, and polite answers to the user's questions.",
  images_inside=True,
  after_image='\n',
)
TEMPLATES = {  # as models/settings.py: CHAT_TEMPLATES
  'lavit': ChatTemplate(question_prompt(_SLOT)),
  'vicuna': _VICUNA,
  'llava_v1': _VICUNA._replace(system=_VICUNA.system.replace('user', 'human')),
  'plain': ChatTemplate(_SLOT),
}


def render(messages: Sequence[Message], template: ChatTemplate) -> list[Turn]:
  """The turns of a conversation; the last one has no answer if the user speaks last."""
  turns = []
  prompt: list[Any] = []
  if template.system and not (messages and messages[0].role == SYSTEM):
    prompt.append(template.system)
  for message in messages:
    if message.role == USER:
      prompt += _user_pieces(message.content, template)
    elif message.role == ASSISTANT:
      turns.append(Turn(tuple(prompt), _text_of(message)))
      prompt = []
    elif text := _text_of(message):
      prompt.append(text)
  if prompt:
    turns.append(Turn(tuple(prompt), None))
  return turns


def question_turn(image: Any, question: str, template: ChatTemplate) -> Turn:
  """The turn of a question about an image."""
  return render([Message(USER, (image, question))], template)[0]


def without_first_image(turns: Sequence[Turn]) -> list[Turn] | None:
  """The turns without their image, if they have one alone, and begin with it; else None."""
  images = [piece for turn in turns for piece in turn.prompt if not isinstance(piece, str)]
  if len(images) != 1 or isinstance(turns[0].prompt[0], str):
    return None
  return [turns[0]._replace(prompt=turns[0].prompt[1:]), *turns[1:]]


def _text_of(message: Message) -> str:
  return '\n'.join(part for part in message.content if isinstance(part, str)).strip()


def _user_pieces(content: Sequence[Any], template: ChatTemplate) -> list[Any]:
  """The texts and images of a user's message."""
  leading, rest = _divide(_join_texts(content))
  if not rest and not template.images_inside:
    return leading  # images without a text are to be captioned
  prefix, _, suffix = template.user.partition(_SLOT)
  pieces = [] if template.images_inside else leading
  text = prefix
  for image in leading if template.images_inside else ():
    pieces += [text, image]
    text = template.after_image
  for part in rest:
    if isinstance(part, str):
      text += part
    else:
      pieces += [text, part]
      text = ''
  # A text that follows an image gets a space from the tokenizer.
  pieces.append((text + suffix).removeprefix(' '))
  return [piece for piece in pieces if not isinstance(piece, str) or piece]


def _join_texts(content: Sequence[Any]) -> list[Any]:
  """The parts of a message, where texts that follow each other are one, without blank ones."""
  parts: list[Any] = []
  for part in content:
    if not isinstance(part, str):
      parts.append(part)
    elif part := part.strip():
      if parts and isinstance(parts[-1], str):
        parts[-1] += f'\n{part}'
      else:
        parts.append(part)
  return parts


def _divide(parts: list[Any]) -> tuple[list[Any], list[Any]]:
  """The images that stand before the text, and what follows them."""
  texts = [number for number, part in enumerate(parts) if isinstance(part, str)]
  if len(texts) <= 1:  # no image is between texts
    images = [part for part in parts if not isinstance(part, str)]
    return images, [parts[number] for number in texts]
  return parts[: texts[0]], parts[texts[0] :]
