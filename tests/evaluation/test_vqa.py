"""Answers are scored by type, beside the most frequent answers of training."""

import pytest

from lavit_jax.data.emoji import corpus
from lavit_jax.evaluation import vqa
from lavit_jax.evaluation.vqa import VQAExample


@pytest.mark.parametrize(
  'answer, expected',
  [
    ('Yes', 'yes'),
    ('an owl.', 'owl'),
    ('  The owl\nQuestion: what', 'owl'),
    ('red, I think', 'red'),
    ('', ''),
    ('theatre', 'theatre'),
  ],
)
def test_normalize_answer(answer, expected):
  assert vqa.normalize_answer(answer) == expected


def test_majority_and_score_by_type():
  train = [
    VQAExample(0, 'colour', 'q', 'red'),
    VQAExample(0, 'colour', 'q', 'Red'),
    VQAExample(1, 'colour', 'q', 'blue'),
    VQAExample(1, 'colour', 'the sky?', 'blue'),
    VQAExample(2, 'colour', 'q', 'red'),
    VQAExample(1, 'yes/no', 'q?', 'no'),
  ]
  baseline = vqa.fit_majority(train)
  assert baseline.by_type == {'colour': 'red', 'yes/no': 'no'}
  assert baseline.by_question == {'q': 'red', 'the sky?': 'blue', 'q?': 'no'}
  questions = [
    VQAExample(0, 'colour', 'q', 'red'),
    VQAExample(0, 'colour', 'the sky?', 'blue'),
    VQAExample(0, 'yes/no', 'new', 'yes'),
    VQAExample(0, 'what', 'what?', 'owl'),
  ]
  scores = vqa.score_answers(['blue', 'Blue.', 'yes', 'an owl'], questions, baseline)
  assert scores['colour'] == dict(accuracy=0.5, majority=0.5, blind=1.0, count=2)
  assert scores['yes/no'] == dict(accuracy=1.0, majority=0.0, blind=0.0, count=1)
  assert scores['what'] == dict(accuracy=1.0, majority=0.0, blind=0.0, count=1)
  assert scores['all'] == dict(accuracy=0.75, majority=0.25, blind=0.5, count=4)
  with pytest.raises(ValueError):
    vqa.score_answers(['one'], questions, baseline)


def test_true_answers_score_one():
  scenes = corpus.examples('embedded', 'heldout', 1, 10, 'scene')
  questions = vqa.collect_questions(scenes + corpus.examples('embedded', 'heldout', 1, 10))
  answers = [question.answer for question in questions]
  scores = vqa.score_answers(answers, questions, vqa.fit_majority(questions))
  accuracies = {question_type: values['accuracy'] for question_type, values in scores.items()}
  assert accuracies == dict.fromkeys(scores, 1.0)
  assert scores['all']['count'] == len(questions)
  assert 0 < scores['all']['majority'] < 1
