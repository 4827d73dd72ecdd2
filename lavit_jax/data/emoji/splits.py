"""What is held out: whole concepts, (style, concept) pairs, and (group, background) combinations.

Each rule is a pure function of names. So there is no list to keep, and every machine and every
subset of the data set agree.
"""

import functools
from hashlib import blake2b

# Of the salts below 200,000 that hold out exactly 80 of the 1,898 concepts, this is the one where
# no held-out name is part of another concept's name. Otherwise training texts would contain it,
# as 'oil drum' contains 'drum'.
_CONCEPT_SALT = 173414
_CONCEPT_SHARE = 0.042
_PAIR_SHARE = 0.05
_COMBINATION_SHARE = 0.06
_REASONS = ('concept', 'pair', 'combination')


def heldout_concept(codepoint: str) -> bool:
  """Whether a concept ('1F44D-1F3FB') is held out in every style; skin tones do not matter."""
  codes = []
  for code in codepoint.split('-'):
    is_skin_tone = '1F3FB' <= code <= '1F3FF'
    if code != 'FE0F' and not is_skin_tone:
      codes.append(code)
  return _fraction(f'{_CONCEPT_SALT} concept {"-".join(codes)}') < _CONCEPT_SHARE


def heldout_pair(style: str, codepoint: str) -> bool:
  """Whether a concept is held out in this style; training may have it in others."""
  return _fraction(f'pair {style} {codepoint}') < _PAIR_SHARE


@functools.cache
def heldout_combination(group: str, background: str) -> bool:
  """Whether members of a group never have this background in training."""
  return _fraction(f'combination {group} {background}') < _COMBINATION_SHARE


def heldout_reasons(split: str) -> tuple[str, ...]:
  """Returns why the examples of a split are held out.

  Args:
    split: 'train' (no reason), 'heldout' (any of three), or 'heldout/REASON'.

  Raises:
    ValueError: the split is unknown.
  """
  reasons = {'train': (), 'heldout': _REASONS}
  for reason in _REASONS:
    reasons[f'heldout/{reason}'] = (reason,)
  if split not in reasons:
    raise ValueError(f'unknown split {split!r}; choose one of {", ".join(reasons)}')
  return reasons[split]


def _fraction(text: str) -> float:
  """Maps a text to a uniform number in [0, 1)."""
  return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), 'big') / 2**32
