"""The prompts of the published model, and how its outputs are read (specification, Inference).

An image is written as `[IMG] features or codes [/IMG]` (models/packing.py); this module has the
text beside it. A caption has no prompt. An image prompt is the caption itself.
"""

import re

UNANSWERABLE = 'unanswerable'
_ANSWER_END = re.compile(r'[\n,.]')
_NO = re.compile(r'\bno\b')


def question_prompt(question: str) -> str:
  """Returns the prompt of a question about an image; the answer follows after a space."""
  return f'Question: {question} Answer:'


def answerable_question(question: str) -> str:
  """Returns the question that is asked first for VizWiz: whether the image answers `question`."""
  return f'Is the question: "{question}" answerable?'


def parse_caption(text: str) -> str:
  """Returns the generated caption up to its first full stop."""
  return text.split('.')[0].strip()


def parse_answer(text: str) -> str:
  """Returns the generated answer in lower case, up to its first newline, comma or full stop.

  The published evaluation lemmatizes it too.
  """
  return _ANSWER_END.split(text.strip())[0].strip().lower()


def is_unanswerable(answer: str) -> bool:
  """Whether a parsed answer to `answerable_question` says no."""
  return bool(_NO.search(answer))
