"""Accuracy of answers by type of question, beside what answers without a look at the picture would score."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from lavit_jax.data.emoji.scenes import Example


class VQAExample(NamedTuple):
  """One question about one picture."""

  index: int  # of the example
  type: str
  question: str
  answer: str


def ask(examples: Sequence[Example]) -> list[VQAExample]:
  """Every question of every example."""
  return [
    VQAExample(i, *question) for i, example in enumerate(examples) for question in example.questions
  ]


def normalise(answer: str) -> str:
  """What two equal answers share: lower case, cut at the first newline, comma or full stop (specification, Inference), no article."""
  return re.sub(r'^(a|an|the) ', '', re.split(r'[\n,.]', answer.strip())[0].strip().lower())


class MajorityBaseline(NamedTuple):
  """The most frequent training answers, by the type of a question and by its very words."""

  by_type: dict[str, str]
  by_question: dict[str, str]

  def blind(self, asked: VQAExample) -> str | None:
    """The best answer for who reads the question and does not see the picture."""
    return self.by_question.get(asked.question, self.by_type.get(asked.type))


def fit_majority(asked: Sequence[VQAExample]) -> MajorityBaseline:
  """The most frequent answer to each type of question and to each question."""

  def most_common(keys):
    answers = defaultdict(Counter)
    for key, each in zip(keys, asked):
      answers[key][normalise(each.answer)] += 1
    return {key: counter.most_common(1)[0][0] for key, counter in answers.items()}

  return MajorityBaseline(
    most_common(each.type for each in asked), most_common(each.question for each in asked)
  )


def score(
  answers: Sequence[str], asked: Sequence[VQAExample], usual: MajorityBaseline
) -> dict[str, dict[str, float]]:
  """By type, and over all ('all'): accuracy; count; majority and blind, which the usual answers to the type and to the question score."""
  rows = defaultdict(list)
  for answer, each in zip(answers, asked, strict=True):
    truth = normalise(each.answer)
    row = (
      normalise(answer) == truth,
      usual.by_type.get(each.type) == truth,
      usual.blind(each) == truth,
    )
    rows[each.type].append(row)
    rows['all'].append(row)
  return {
    kind: dict(
      zip(('accuracy', 'majority', 'blind'), (sum(column) / len(row) for column in zip(*row))),
      count=len(row),
    )
    for kind, row in sorted(rows.items())
  }
