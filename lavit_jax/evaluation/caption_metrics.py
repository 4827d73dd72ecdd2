"""The metrics of COCO captions, by pycocoevalcap: BLEU, METEOR, ROUGE-L, CIDEr and SPICE.

Its tokenizer (Stanford's PTB tokenizer), METEOR and SPICE are Java programs. Without Java, the
others are computed with a plain tokenizer; their names then say so, since the numbers differ.
SPICE moreover needs Stanford CoreNLP 3.6.0, which pycocoevalcap would download; here it is computed
only where its two jar files lie in the package.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any, NamedTuple

from lavit_jax.errors import UserError

Captions = Mapping[Any, list[str]]  # id of an image -> its captions
PLAIN = ' (plain tokenizer)'
SPICE_JARS = ('stanford-corenlp-3.6.0.jar', 'stanford-corenlp-3.6.0-models.jar')
_BLEU = ('Bleu_1', 'Bleu_2', 'Bleu_3', 'Bleu_4')
_SUFFIX = re.compile(r"(n't|(?<=\w)'(?:s|re|ve|ll|d|m))\b")
_MARKS = '.,;:!?"()[]{}`-'


class TokenizedCaptions(NamedTuple):
  """Captions as the metrics compare them: lower-case tokens with spaces, without punctuation.

  Attributes:
    references: the captions of annotators.
    candidates: one of the model for each image, in the same order.
    java: whether the official tokenizer made them, and Java can compute further metrics.
  """

  references: Captions
  candidates: Captions
  java: bool

  def of_images(self, ids: list[Any]) -> TokenizedCaptions:
    """The captions of some images."""
    return self._replace(
      references={key: self.references[key] for key in ids},
      candidates={key: self.candidates[key] for key in ids},
    )


def require_package() -> None:
  """Raises UserError if pycocoevalcap is not installed."""
  try:
    import pycocoevalcap  # noqa: F401
  except ImportError:
    raise UserError(
      "the metrics of captions need pycocoevalcap; pip install -e '.[evaluate]' "
      '-c launch/constraints.txt'
    ) from None


def java_version() -> str | None:
  """The first line of `java -version`; None if there is no Java that runs."""
  if shutil.which('java') is None:
    return None
  answer = subprocess.run(['java', '-version'], capture_output=True, text=True, check=False)
  return (answer.stderr or answer.stdout).splitlines()[0] if answer.returncode == 0 else None


def tokenize(references: Captions, candidates: Mapping[Any, str]) -> TokenizedCaptions:
  """Tokenizes captions as pycocoevalcap does if there is Java, and plainly if not.

  Args:
    references: the captions of annotators.
    candidates: a caption of the model for each image, in the same order.

  Raises:
    UserError: the tokenizer failed.
  """
  lists = {key: [caption] for key, caption in candidates.items()}
  if java_version() is None:
    return TokenizedCaptions(_plain(references), _plain(lists), False)
  return TokenizedCaptions(_ptb(references), _ptb(lists), True)


def _ptb(captions: Captions) -> Captions:
  from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

  rows = {key: [{'caption': text} for text in texts] for key, texts in captions.items()}
  tokenized = PTBTokenizer().tokenize(rows)
  if tokenized.keys() != captions.keys():
    raise UserError(
      f'the tokenizer of pycocoevalcap gave {len(tokenized)} of {len(captions)} images; see the '
      'messages of java above'
    )
  return tokenized


def _plain(captions: Captions) -> Captions:
  return {key: [plain_tokens(text) for text in texts] for key, texts in captions.items()}


def plain_tokens(text: str) -> str:
  """Returns the words of a text in lower case, joined by spaces.

  Punctuation at the ends of words is removed, and "n't", "'s" and the like are words. Unlike the
  PTB tokenizer, it does not know 'cannot', abbreviations such as 'p.m.', or brackets, which that
  turns to words.
  """
  words = _SUFFIX.sub(r' \1', text.lower()).split()
  stripped = [word.strip(_MARKS) for word in words]
  return ' '.join(word for word in stripped if word.strip("'"))


def make_scorers(java: bool) -> dict[str, Any]:
  """Makes what `measure` uses, once for several measurements: METEOR takes long to start.

  Args:
    java: whether to start the scorers that need Java.

  Returns:
    Name -> scorer of pycocoevalcap.
  """
  from pycocoevalcap.bleu.bleu import Bleu
  from pycocoevalcap.cider.cider import Cider
  from pycocoevalcap.rouge.rouge import Rouge

  scorers: dict[str, Any] = {'Bleu': Bleu(4), 'ROUGE_L': Rouge(), 'CIDEr': Cider()}
  if java:
    from pycocoevalcap.meteor.meteor import Meteor

    scorers['METEOR'] = Meteor()
    if has_spice():
      from pycocoevalcap.spice.spice import Spice

      scorers['SPICE'] = Spice()
  return scorers


def measure(
  captions: TokenizedCaptions, scorers: Mapping[str, Any]
) -> tuple[dict[str, float], dict[Any, float]]:
  """Computes all metrics.

  CIDEr takes its document frequencies from the references given.

  Returns:
    Bleu_1 to Bleu_4, METEOR, ROUGE_L, CIDEr and SPICE as pycocoevalcap returns them, not in
    percent; without Java, those that need none, with `PLAIN` in the name. And the CIDEr of each
    image.
  """
  metrics = {}
  of_images = {}
  suffix = '' if captions.java else PLAIN
  for name, scorer in scorers.items():
    with contextlib.redirect_stdout(io.StringIO()):  # BLEU prints lengths
      score, scores = scorer.compute_score(captions.references, captions.candidates)
    names = _BLEU if name == 'Bleu' else (name,)
    for key, value in zip(names, score if name == 'Bleu' else [score], strict=True):
      metrics[f'{key}{suffix}'] = float(value)
    if name == 'CIDEr':
      of_images = dict(zip(captions.candidates, map(float, scores), strict=True))
  return metrics, of_images


def has_spice() -> bool:
  """Whether the files that SPICE needs are there, so that nothing is downloaded."""
  import pycocoevalcap.spice.spice as module

  folder = pathlib.Path(module.__file__).parent / 'lib'
  return all((folder / name).exists() for name in SPICE_JARS)


def missing_metrics(captions: TokenizedCaptions) -> list[str]:
  """A line for each reason why metrics are missing or differ from the official ones."""
  if not captions.java:
    return [
      'there is no java: METEOR and SPICE are left out, and a plain tokenizer stands in for the '
      'official one, so the other numbers cannot be compared with published ones; install a Java '
      'runtime'
    ]
  if not has_spice():
    return [
      'SPICE is left out: put stanford-corenlp-3.6.0.jar and its models jar, of Stanford CoreNLP '
      '2015-12-09, into pycocoevalcap/spice/lib'
    ]
  return []
