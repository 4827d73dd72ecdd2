"""The data sets of questions: VQAv2, OK-VQA, GQA and VizWiz, and one's own."""

from __future__ import annotations

import pathlib
from typing import Any

from lavit_jax.apps.benchmarks.files import DataSet, Official, Record
from lavit_jax.data import captions_file
from lavit_jax.data.captions_fields import Fields
from lavit_jax.data.conversations import read_dialogs
from lavit_jax.data.record import find_texts
from lavit_jax.errors import UserError

OWN_FILE = 'questions.jsonl'
VQA_PAGE = 'the download page of VQA v2, visualqa.org'
OKVQA_PAGE = 'the download page of OK-VQA, okvqa.allenai.org'
GQA_PAGE = 'the download page of GQA, cs.stanford.edu/people/dorarad/gqa'
VIZWIZ_PAGE = 'the page of VizWiz VQA, vizwiz.org'


def read_vqav2(folder: pathlib.Path) -> DataSet:
  """Reads the questions and answers of VQAv2 val2014."""
  return _read_vqa(
    folder,
    Official('v2_OpenEnded_mscoco_val2014_questions.json', VQA_PAGE, 'questions'),
    Official('v2_mscoco_val2014_annotations.json', VQA_PAGE, 'annotations'),
  )


def read_okvqa(folder: pathlib.Path) -> DataSet:
  """Reads the questions and answers of OK-VQA."""
  return _read_vqa(
    folder,
    Official('OpenEnded_mscoco_val2014_questions.json', OKVQA_PAGE, 'questions'),
    Official('mscoco_val2014_annotations.json', OKVQA_PAGE, 'annotations'),
  )


def _read_vqa(folder: pathlib.Path, questions: Official, annotations: Official) -> DataSet:
  """Reads files in the format of VQA; OK-VQA has it too."""
  by_question: dict[Any, Any] = {}
  for item in annotations.read(folder):
    if not isinstance(item, dict) or 'question_id' not in item:
      raise annotations.wrong(folder, "has an annotation without 'question_id'")
    by_question[item['question_id']] = item
  items = questions.read(folder)
  unanswered = [item for item in items if item.get('question_id') not in by_question]
  if unanswered:
    raise annotations.wrong(
      folder,
      f'lacks {len(unanswered)} of the {len(items)} questions of {questions.name}, '
      f'the first: {unanswered[0].get("question_id")}',
    )

  def parse(item: dict[str, Any]) -> Record:
    annotation = by_question[item['question_id']]
    return Record(
      id=item['question_id'],
      image=f'COCO_val2014_{int(item["image_id"]):012d}.jpg',
      references=[answer['answer'] for answer in annotation['answers']],
      question=item['question'],
      groups={key: annotation[key] for key in ('answer_type', 'question_type')},
    )

  records = questions.parse(folder, items, parse)
  return DataSet(records, [folder / questions.name, folder / annotations.name])


def read_gqa(folder: pathlib.Path) -> DataSet:
  """Reads the questions of GQA testdev, which have one answer each."""
  official = Official('testdev_balanced_questions.json', GQA_PAGE)
  content = official.read(folder)
  if not isinstance(content, dict):
    raise official.wrong(folder, 'is not an object of questions by id')

  def parse(item: tuple[str, dict[str, Any]]) -> Record:
    name, question = item
    return Record(
      id=name,
      image=f'{question["imageId"]}.jpg',
      references=[question['answer']],
      question=question['question'],
      groups={'structural': question['types']['structural']},
    )

  return DataSet(official.parse(folder, content.items(), parse), [folder / official.name])


def read_vizwiz(folder: pathlib.Path) -> DataSet:
  """Reads the questions of VizWiz val; an image has one."""
  official = Official('val.json', VIZWIZ_PAGE)
  content = official.read(folder)
  if not isinstance(content, list):
    raise official.wrong(folder, 'is not a list of questions')

  def parse(item: dict[str, Any]) -> Record:
    return Record(
      id=item['image'],
      image=item['image'],
      references=[answer['answer'] for answer in item['answers']],
      question=item['question'],
      groups={
        'answer_type': item['answer_type'],
        'answerable': 'yes' if item['answerable'] else 'no',
      },
    )

  return DataSet(official.parse(folder, content, parse), [folder / official.name])


def read_own(folder: pathlib.Path) -> DataSet:
  """Reads one's own questions, in the form in which they are trained on (data/conversations.py)."""
  path = folder / OWN_FILE
  try:
    rows = captions_file.read_rows(str(path), path.read_bytes(), Fields('', ()))
  except OSError as error:
    raise UserError(
      f'{path} cannot be read ({error.strerror}); write it with a line '
      '{"image": ..., "question": ..., "answer": ...} for each question'
    ) from None
  records = []
  for number, dialog in enumerate(read_dialogs(str(path), rows, 'answer', None, (), find_texts)):
    if len(dialog.images) != 1 or len(dialog.texts) < 2:
      raise UserError(f'{path}: question {number} has no image or no answer; give it one of each')
    question, *answers = dialog.texts
    records.append(Record(number, dialog.images[0], answers, question))
  return DataSet(records, [path])


def vqa_submission(records: list[Record], answers: list[str]) -> list[dict[str, Any]]:
  """The form that the server of VQA takes, also for OK-VQA."""
  return [
    {'question_id': record.id, 'answer': answer}
    for record, answer in zip(records, answers, strict=True)
  ]


def gqa_submission(records: list[Record], answers: list[str]) -> list[dict[str, Any]]:
  """The form that GQA's evaluation script takes."""
  return [
    {'questionId': record.id, 'prediction': answer}
    for record, answer in zip(records, answers, strict=True)
  ]


def vizwiz_submission(records: list[Record], answers: list[str]) -> list[dict[str, Any]]:
  """The form that the server of VizWiz takes."""
  return [
    {'image': record.id, 'answer': answer} for record, answer in zip(records, answers, strict=True)
  ]
