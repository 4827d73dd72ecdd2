"""The accuracy of VQA and its normalizer, as the official evaluation code of VQA v2 has them.

An answer scores min(1, n / 3), where n annotators gave it, averaged over the sets that leave out
one annotator each (Antol et al., ICCV 2015, section 3, and the code of GT-Vision-Lab/VQA). What
that code does differs from what its page says: a prediction is normalized wholly, a reference only
loses its punctuation, and only where the annotators disagree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r'\.(?!\d)')
_NUMBER_COMMA = re.compile(r'\d,\d')
_ARTICLES = frozenset(('a', 'an', 'the'))
_DIGITS = {'none': '0'} | {
  word: str(number)
  for number, word in enumerate(
    ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten')
  )
}
_SPELLINGS = """
  'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
  hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
  might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
  should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
  someone'll someone's something'd something'd've something'll that's there'd there'd've there're
  there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
  what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
  why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
  you've
"""


def _contractions() -> dict[str, str]:
  """What replaces a word that lacks one apostrophe; other words, such as 'shed', stay."""
  corrected = {"somebody'd": 'somebodyd'}  # so in the official table
  for spelling in _SPELLINGS.split():
    for match in re.finditer("'", spelling):
      corrected[spelling[: match.start()] + spelling[match.end() :]] = spelling
  return corrected


_CONTRACTIONS = _contractions()


def strip_punctuation(answer: str) -> str:
  """Removes the punctuation of an answer, or replaces it by spaces.

  A mark beside a space is removed, everywhere in the answer; another one becomes a space. Where a
  comma stands between digits, all marks are removed. A full stop is removed unless a digit follows.
  """
  has_number = _NUMBER_COMMA.search(answer) is not None
  stripped = answer
  for mark in _PUNCTUATION:
    removed = has_number or f'{mark} ' in answer or f' {mark}' in answer
    stripped = stripped.replace(mark, '' if removed else ' ')
  return _PERIOD.sub('', stripped)


def normalize_answer(answer: str) -> str:
  """Returns a predicted answer as it is compared.

  In lower case, without punctuation (`strip_punctuation`) and articles; number words up to ten are
  digits, and contractions have their apostrophe.
  """
  words = []
  for word in strip_punctuation(_one_line(answer)).lower().split():
    word = _DIGITS.get(word, word)
    if word not in _ARTICLES:
      words.append(_CONTRACTIONS.get(word, word))
  return ' '.join(words)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
  """Returns the accuracy of one answer, 0 to 1.

  Args:
    answer: the prediction.
    references: the answers of the annotators, ten in the official files.
  """
  normalized = normalize_answer(answer)
  compared = list(references)
  if len(set(compared)) > 1:
    compared = [strip_punctuation(reference) for reference in compared]
  matches = [reference == normalized for reference in compared]
  total = 0.0
  for match in matches:
    total += min(1.0, (sum(matches) - match) / 3)
  return total / len(matches)


def _one_line(answer: str) -> str:
  return answer.replace('\n', ' ').replace('\t', ' ').strip()
