"""Accuracy of answers by type of question, and of baselines that do not see the image."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lavit_jax.data import prompts
from lavit_jax.data.emoji.scenes import Example

_ARTICLE = re.compile(r'^(a|an|the) ')


class VQAExample(NamedTuple):
  """One question about one image.

  Attributes:
    index: of the example with the image.
    type: of the question.
    question: without the prompt template.
    answer: the true one.
  """

  index: int
  type: str
  question: str
  answer: str


def collect_questions(examples: Sequence[Example]) -> list[VQAExample]:
  """Returns every question about every example."""
  questions = []
  for index, example in enumerate(examples):
    questions += [VQAExample(index, *question) for question in example.questions]
  return questions


def normalize_answer(answer: str) -> str:
  """Returns the parsed answer without its article; equal answers have the same form."""
  return _ARTICLE.sub('', prompts.parse_answer(answer))


class MajorityBaseline(NamedTuple):
  """The most frequent training answers.

  Attributes:
    by_type: type of a question -> answer.
    by_question: exact wording of a question -> answer.
  """

  by_type: dict[str, str]
  by_question: dict[str, str]

  def blind_answer(self, example: VQAExample) -> str | None:
    """Returns the best guess of a reader who sees the question but not the image."""
    return self.by_question.get(example.question, self.by_type.get(example.type))


def fit_majority(examples: Sequence[VQAExample]) -> MajorityBaseline:
  """Finds the most frequent answer for each type of question and for each question."""
  return MajorityBaseline(
    _most_common_answers((example.type, example.answer) for example in examples),
    _most_common_answers((example.question, example.answer) for example in examples),
  )


def _most_common_answers(answers_by_key: Iterable[tuple[str, str]]) -> dict[str, str]:
  counters: dict[str, Counter[str]] = defaultdict(Counter)
  for key, answer in answers_by_key:
    counters[key][normalize_answer(answer)] += 1
  return {key: counter.most_common(1)[0][0] for key, counter in counters.items()}


def score_answers(
  answers: Sequence[str], examples: Sequence[VQAExample], baseline: MajorityBaseline
) -> dict[str, dict[str, float]]:
  """Scores answers by type of question.

  Args:
    answers: one for each example.
    examples: the questions.
    baseline: fitted on training questions.

  Returns:
    type, or 'all' -> {accuracy, majority, blind, count}: the accuracy of the answers, of the usual
    answer to the type, and of the usual answer to the question; the number of questions.

  Raises:
    ValueError: there are more or fewer answers than examples.
  """
  outcomes = defaultdict(list)
  for answer, example in zip(answers, examples, strict=True):
    truth = normalize_answer(example.answer)
    outcome = {
      'accuracy': normalize_answer(answer) == truth,
      'majority': baseline.by_type.get(example.type) == truth,
      'blind': baseline.blind_answer(example) == truth,
    }
    outcomes[example.type].append(outcome)
    outcomes['all'].append(outcome)
  scores = {}
  for question_type, rows in sorted(outcomes.items()):
    count = len(rows)
    totals = Counter()
    for row in rows:
      totals.update(row)
    scores[question_type] = {key: total / count for key, total in totals.items()}
    scores[question_type]['count'] = count
  return scores
