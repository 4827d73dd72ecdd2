"""Accuracy of answers by type of question, beside what the most frequent training answer would score."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lavit_jax.data.scenes import Example


class Asked(NamedTuple):
  """One question about one picture."""

  index: int  # of the example
  type: str
  question: str
  answer: str


def ask(examples: Sequence[Example]) -> list[Asked]:
  """Every question of every example."""
  return [Asked(i, *question) for i, example in enumerate(examples) for question in example.questions]


def normalise(answer: str) -> str:
  """What two equal answers share: lower case, cut at the first newline, comma or full stop (REFERENCE section 4), no article."""
  return re.sub(r'^(a|an|the) ', '', re.split(r'[\n,.]', answer.strip())[0].strip().lower())


def majority(asked: Iterable[Asked]) -> dict[str, str]:
  """The most frequent answer to each type of question."""
  answers = defaultdict(Counter)
  for each in asked:
    answers[each.type][normalise(each.answer)] += 1
  return {kind: counter.most_common(1)[0][0] for kind, counter in answers.items()}


def score(answers: Sequence[str], asked: Sequence[Asked], usual: dict[str, str]) -> dict[str, dict[str, float]]:
  """By type, and over all ('all'): accuracy, majority (the accuracy of the answers `usual`), and count."""
  rows = defaultdict(list)
  for answer, each in zip(answers, asked, strict=True):
    truth = normalise(each.answer)
    row = normalise(answer) == truth, usual.get(each.type) == truth
    rows[each.type].append(row)
    rows['all'].append(row)
  return {kind: dict(accuracy=sum(a for a, _ in row) / len(row), majority=sum(b for _, b in row) / len(row), count=len(row))
          for kind, row in sorted(rows.items())}
