"""The accuracy of VQA against its definition, and its normalizer on hard cases."""

import itertools

import numpy as np
import pytest

from lavit_jax.evaluation import lemmas, vqa_accuracy

# Read off the official rule: marks, then lower case, number words, articles, contractions.
NORMALIZED = {
  'Yes': 'yes',
  '  the Red   ball\n': 'red ball',
  'a an the': '',
  'Two': '2',
  'none': '0',
  'zero': '0',
  'ten': '10',
  'eleven': 'eleven',
  'twenty-two': 'twenty 2',
  '1,000': '1000',
  '1,000,000 people': '1000000 people',
  '1,000-2': '10002',  # a comma in a number: no mark becomes a space
  'red, white': 'red white',
  'red,white': 'red white',
  'red/blue': 'red blue',
  'red / blue': 'red blue',
  'on -sale- now': 'on sale now',
  'x-ray': 'x ray',
  'x-ray on- off': 'xray on off',  # '-' beside a space: it is removed everywhere
  '3.5': '3.5',
  '.5': '.5',
  '3.': '3',
  'U.S.': 'us',
  'p.m.': 'pm',
  '3:45': '3:45',
  "dog's": "dog's",
  'dogs!': 'dogs',
  'what?': 'what',
  '(left)': 'left',
  'dont': "don't",
  "don't": "don't",
  'Isnt it': "isn't it",
  'whered': "where'd",
  "couldnt've": "couldn't've",
  "couldn'tve": "couldn't've",
  "y'alldve": "y'alldve",
  "y'all'dve": "y'all'd've",
  "'ow'sat": "'ow's'at",
  "somebody'd": 'somebodyd',  # as in the official table
  'shed': 'shed',
  'well': 'well',
  'im': 'im',  # the official table has it with a capital, which no word has by then
  'tab\there': 'tab here',
  '100%': '100%',
  '$5': '$5',
}


@pytest.mark.parametrize(('answer', 'normalized'), NORMALIZED.items())
def test_hard_cases(answer, normalized):
  assert vqa_accuracy.normalize_answer(answer) == normalized


def by_definition(num_matches, num_annotators):
  """The mean over all sets of all annotators but one of min(1, matches / 3)."""
  says = [True] * num_matches + [False] * (num_annotators - num_matches)
  sets = list(itertools.combinations(says, num_annotators - 1))
  return np.mean([min(1.0, sum(members) / 3) for members in sets])


@pytest.mark.parametrize('num_annotators', [10, 5, 2, 1])
def test_accuracy_is_its_definition(num_annotators):
  for num_matches in range(num_annotators + 1):
    references = ['cat'] * num_matches + ['dog'] * (num_annotators - num_matches)
    expected = by_definition(num_matches, num_annotators)
    measured = vqa_accuracy.vqa_accuracy('The cat.', references)
    assert measured == pytest.approx(expected, abs=1e-12)


def test_which_references_are_normalized():
  """Only where annotators disagree, and then only their punctuation."""
  assert vqa_accuracy.vqa_accuracy('x ray', ['x-ray'] * 10) == 0
  assert vqa_accuracy.vqa_accuracy('x ray', ['x-ray'] * 9 + ['scan']) == 1
  assert vqa_accuracy.vqa_accuracy('2', ['two'] * 9 + ['scan']) == 0
  assert vqa_accuracy.vqa_accuracy('ball', ['the ball'] * 9 + ['scan']) == 0


def test_answers_are_lemmatized():
  pytest.importorskip(
    'simplemma', reason="no simplemma; it comes with pip install -e '.[evaluate]'"
  )
  for answer, lemma in {
    'two Dogs': 'two dog',
    'women': 'woman',
    'skateboarding': 'skateboard',
    'bus': 'bus',
    'grass': 'grass',
    'tennis': 'tennis',
    '3.5': '3.5',
    '': '',
  }.items():
    assert lemmas.lemmatize(answer) == lemma


@pytest.mark.parametrize(
  ('answer', 'shortened'),
  {
    "It's a very red ball": 'red ball',
    'this is in the kitchen': 'kitchen',
    'to go': 'go',
    'inside': 'inside',
    'another': 'another',
    'it is': 'unanswerable',
    '': 'unanswerable',
    "I don't know": 'unanswerable',
    'at  the beach': 'beach',
    'red': 'red',
  }.items(),
)
def test_answers_are_shortened(answer, shortened):
  assert lemmas.shorten_answer(answer) == shortened
