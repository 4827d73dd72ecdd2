r"""Files of conversations and of questions -> the entries of a folder (folders.py).

A conversation has the form of LLaVA, and may have that of OpenAI (`role`, `content`):

    {"id": ..., "image": "a.jpg" or ["a.jpg", "b.jpg"] or absent, "conversations": [
      {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

A question has one answer or several: {"image": "a.jpg", "question": ..., "answer": ...}, or it is
in the two official files of VQA.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lavit_jax.data.captions_fields import Row, choose_fields
from lavit_jax.data.chat import ASSISTANT, SYSTEM, USER, Message
from lavit_jax.errors import UserError

IMAGE_MARK = '<image>'
FIELDS = {  # by use: names of the field of the image, and the fields of texts
  'chat': (('image',), ('conversations',)),
  'answer': (('image', 'file_name'), ('question', 'answer')),
}
_ROLES = {
  'human': USER,
  'user': USER,
  'gpt': ASSISTANT,
  'assistant': ASSISTANT,
  'system': SYSTEM,
}
_EXAMPLE = '{"from": "human", "value": ...}'


class Dialog(NamedTuple):
  """An entry of a file of conversations or questions.

  Attributes:
    images: their names in the folder.
    texts: of a conversation its messages as JSON, for `parse_messages`; of a question itself and
      its answers.
  """

  images: tuple[str, ...]
  texts: tuple[str, ...]


def read_dialogs(
  file: str,
  rows: Sequence[Row],
  use: str,
  image: str | None,
  texts: Sequence[str],
  find_texts: Callable[[Mapping[str, Any], Sequence[str]], tuple[str, ...]],
) -> list[Dialog]:
  """The conversations or questions in the rows of a file.

  Args:
    file: path for error messages.
    rows: of the file.
    use: 'chat' or 'answer'.
    image: the field with the name of the image, or a list of them; None for the usual ones.
    texts: the field of conversations, or those of question and answer; () for the usual ones.
    find_texts: (fields, dotted names) -> all texts under these names.

  Raises:
    UserError: a field that is needed is in no row, or a row is malformed; the message names it.
  """
  image_names, text_names = FIELDS[use]
  if image is None:
    present = [name for name in image_names if any(name in row.fields for row in rows)]
    image = present[0] if present else None
  names = tuple(texts) or text_names
  if len(names) != len(text_names):
    raise UserError(
      f'{file}: use {use!r} needs {len(text_names)} fields of texts, such as text={text_names!r}; '
      f'got {names!r}'
    )
  fields = choose_fields(file, rows, image, names, needs_name=False)
  dialogs = []
  for number, row in enumerate(rows):
    position = f'{file}:{row.line}' if row.line else f'{file}: entry {number}'
    images = _image_names(row.fields.get(fields.name), position)
    if use == 'chat':
      messages = _messages(row.fields.get(fields.texts[0]), len(images), position)
      dialogs.append(Dialog(images, (json.dumps(messages, ensure_ascii=False),)))
      continue
    question, answers = (find_texts(row.fields, (name,)) for name in fields.texts)
    if len(question) != 1:
      raise UserError(f'{position}: {fields.texts[0]} is no text; give one question')
    dialogs.append(Dialog(images, (*question, *answers)))
  return dialogs


def parse_messages(text: str) -> list[Message]:
  """The messages of a conversation in `Dialog.texts`; None stands for an image."""
  return [Message(role, tuple(content)) for role, content in json.loads(text)]


def question_messages(texts: Sequence[str], choose: Callable[[int], Any]) -> list[Message]:
  """The messages of a question in `Dialog.texts`, about an image, with the answer that is chosen.

  Args:
    texts: the question and its answers.
    choose: number of answers -> the number of one.
  """
  question, *answers = texts
  answers = [answer for answer in answers if answer.strip()]
  if not answers:
    return []
  answer = answers[choose(len(answers))] if len(answers) > 1 else answers[0]
  return [Message(USER, (None, question)), Message(ASSISTANT, (answer,))]


def count_marks(texts: Sequence[str], use: str, num_images: int) -> int:
  """The images that the `texts` of a dialog with `num_images` have places for."""
  if use == 'answer':
    return min(num_images, 1)
  messages = parse_messages(texts[0])
  return sum(part is None for message in messages for part in message.content)


def join_vqa(
  file: str, questions: Mapping[str, Any], annotations: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
  """The rows of the official files of VQA: {'image', 'question', 'answer': a list}.

  An image of the subset 'train2014' has the name COCO_train2014_000000000009.jpg.

  Args:
    file: of the questions, for messages.
    questions: its content.
    annotations: the content of the other file.

  Raises:
    UserError: there are no annotations, or they do not have a question.
  """
  if annotations is None:
    raise UserError(f'{file} has questions without answers; name the file of answers, annotations=')
  answers = {item.get('question_id'): item for item in annotations.get('annotations') or ()}
  subset = questions.get('data_subtype') or 'train2014'
  rows = []
  for number, item in enumerate(questions['questions']):
    annotation = answers.get(item.get('question_id'))
    image = item.get('image_id')
    if annotation is None or not isinstance(image, int):
      raise UserError(
        f'{file}: question {number} (question_id {item.get("question_id")!r}, image_id {image!r}) '
        'has no image or no annotation; give the annotations of the same subset'
      )
    own_answers = [answer.get('answer') for answer in annotation.get('answers') or ()]
    rows.append(
      dict(
        image=f'COCO_{subset}_{image:012d}.jpg',
        question=item.get('question'),
        answer=own_answers or annotation.get('multiple_choice_answer'),
      )
    )
  return rows


def _image_names(value: Any, position: str) -> tuple[str, ...]:
  names = [value] if isinstance(value, str) else value
  if not value:
    return ()
  if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
    raise UserError(f'{position}: the image is {value!r}; give a name or a list of names')
  return tuple(name.strip() for name in names)


def _messages(turns: Any, num_images: int, position: str) -> list[tuple[str, list[str | None]]]:
  """(role, content) of each message; None in the content is an image.

  Images without a mark stand at the begin of the first message of the user.
  """
  if not isinstance(turns, list):
    raise UserError(f'{position}: the conversation is {type(turns).__name__}; give a list of turns')
  messages = []
  for turn in turns:
    fields = turn if isinstance(turn, Mapping) else {}
    role = _ROLES.get(str(fields.get('from', fields.get('role'))))
    value = fields.get('value', fields.get('content'))
    if role is None or not isinstance(value, str):
      raise UserError(
        f'{position}: a turn is {_shorten(turn)}; give {_EXAMPLE}, from human, gpt or system'
      )
    content: list[str | None] = [value]
    if role == USER:
      content = [None] * (2 * value.count(IMAGE_MARK) + 1)
      content[::2] = value.split(IMAGE_MARK)
    messages.append((role, content))
  contents = [content for role, content in messages if role == USER]
  if contents and not any(None in content for content in contents):
    contents[0][:0] = [None] * num_images
  return messages


def _shorten(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'
