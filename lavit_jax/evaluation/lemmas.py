"""Answers as the published evaluation compares them: shortened and lemmatized.

The authors lemmatize by spaCy's `en_core_web_sm`, whose tagger says which words are nouns and
verbs; other words stay. Here simplemma does, whose dictionary comes with it and has no tagger: it
lemmatizes every word that it knows, also adjectives ('better' becomes 'good'), and 'left' stays
whether it is a noun or a verb. Both sides of a comparison are lemmatized the same way.
"""

from __future__ import annotations

import re

from lavit_jax.data.prompts import UNANSWERABLE
from lavit_jax.errors import UserError

_OPENING = re.compile(r"(?:it's|it is|this is|very|in|on|at|for|to|an?|the)(?:\s+|$)")
_NO_ANSWERS = frozenset(('', "i don't know", 'i dont know'))


def require_lemmatizer() -> None:
  """Raises UserError if simplemma is not installed."""
  try:
    import simplemma  # noqa: F401
  except ImportError:
    raise UserError(
      "--protocol lavit needs simplemma; pip install -e '.[evaluate]' -c launch/constraints.txt"
    ) from None


def lemmatize(answer: str) -> str:
  """Returns an answer in lower case, each word of letters replaced by its lemma."""
  import simplemma

  words = []
  for word in answer.lower().split():
    words.append(simplemma.lemmatize(word, lang='en').lower() if word.isalpha() else word)
  return ' '.join(words)


def shorten_answer(answer: str) -> str:
  """Returns a predicted answer as the published evaluation compares it, before it is lemmatized.

  All leading "it's", 'it is', 'this is', 'very', 'in', 'on', 'at', 'for', 'to' and articles are
  removed. What is then empty, and "i don't know", becomes 'unanswerable'.
  """
  rest = answer.strip().lower()
  while match := _OPENING.match(rest):
    rest = rest[match.end() :]
  return UNANSWERABLE if rest in _NO_ANSWERS else rest
