"""What is never trained on: whole concepts, style x concept pairs, and (group, background colour) combinations.

Each rule is a pure function of names, so that no list has to be kept, and any machine and any subset agree.
"""

import functools
from hashlib import blake2b

# Of the salts below 200,000 that hold out exactly 80 of the 1,898 concepts, the one for which no held-out name is a part of
# another concept's name, as 'drum' is of 'oil drum': it would be read in training after all.
_CONCEPT_SALT = 173414
_CONCEPT_SHARE = 0.042
_PAIR_SHARE = 0.05
_COMBINATION_SHARE = 0.06
_REASONS = ('concept', 'pair', 'combination')


def heldout_concept(codepoint: str) -> bool:
  """Whether a concept ('1F44D-1F3FB') is held out in every style; its skin tones share its fate."""
  codes = [
    code for code in codepoint.split('-') if code != 'FE0F' and not '1F3FB' <= code <= '1F3FF'
  ]
  return _fraction(f'{_CONCEPT_SALT} concept {"-".join(codes)}') < _CONCEPT_SHARE


def heldout_pair(style: str, codepoint: str) -> bool:
  """Whether a concept is held out in this style, though it may be trained on in others."""
  return _fraction(f'pair {style} {codepoint}') < _PAIR_SHARE


@functools.cache
def heldout_combination(group: str, background: str) -> bool:
  """Whether members of a group never stand on this background in training."""
  return _fraction(f'combination {group} {background}') < _COMBINATION_SHARE


def parse(split: str) -> tuple[str, ...]:
  """Reasons for which examples of a split are held out: 'train' -> (), 'heldout' -> all three, 'heldout/pair' -> one."""
  known = {
    'train': (),
    'heldout': _REASONS,
    **{f'heldout/{reason}': (reason,) for reason in _REASONS},
  }
  if split not in known:
    raise ValueError(f'unknown split {split!r}; choose one of {", ".join(known)}')
  return known[split]


def _fraction(text: str) -> float:
  """A uniform number in [0, 1) that depends on the text alone."""
  return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), 'big') / 2**32
