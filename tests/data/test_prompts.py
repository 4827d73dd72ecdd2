"""Prompts and how outputs are read, as published."""

import pytest

from lavit_jax.data import prompts


def test_templates():
  question = prompts.question_prompt('Who is it?')
  assert question == 'Question: Who is it? Answer:'
  first = prompts.question_prompt(prompts.answerable_question('Who is it?'))
  assert first == 'Question: Is the question: "Who is it?" answerable? Answer:'


@pytest.mark.parametrize(
  'text, caption', [(' an owl. It flies. ', 'an owl'), ('an owl', 'an owl'), ('', ''), ('.x', '')]
)
def test_a_caption_ends_at_its_first_full_stop(text, caption):
  assert prompts.parse_caption(text) == caption


@pytest.mark.parametrize(
  'text, answer',
  [(' Red, I think', 'red'), ('\nAn Owl\nQuestion:', 'an owl'), ('two.', 'two'), ('', '')],
)
def test_an_answer_ends_at_a_newline_comma_or_full_stop(text, answer):
  assert prompts.parse_answer(text) == answer


@pytest.mark.parametrize('answer, is_no', [('no', True), ('no it is not', True), ('not', False)])
def test_unanswerable(answer, is_no):
  assert prompts.is_unanswerable(answer) == is_no
