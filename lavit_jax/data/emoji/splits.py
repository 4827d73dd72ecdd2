"""What is held out: concepts, a style, (style, concept) pairs, (group, background) combinations.

Each rule is a pure function of names. So every machine and every subset of the data set agree.
"""

import functools
from hashlib import blake2b
from importlib import resources

HELDOUT_STYLE = 'emojione'  # no stage of training sees it
NUM_HELDOUT_CONCEPTS = 80
# The first salt that holds out the last four concepts of the sample (dataset.py) and
# none of its others.
_CONCEPT_SALT = 36133
_PAIR_SHARE = 0.05
_COMBINATION_SHARE = 0.06
_TRAINING_REASONS = ('concept', 'pair', 'combination')  # of the held-out images of training runs


@functools.cache
def concept_groups() -> dict[str, str]:
  """The concepts of the data set and their groups, from concepts.txt: {'owl': 'Animals & Nature'}.

  They are familiar ones that most styles draw. Not among them are most flags, clocks, arrows,
  keycaps and buttons, and what differs from another concept by gender, skin tone or direction only.
  """
  text = (resources.files('lavit_jax') / 'data/emoji/concepts.txt').read_text('utf-8')
  groups = {}
  group = ''
  for line in text.splitlines():
    if line.startswith('# '):
      group = line.removeprefix('# ')
    else:
      groups[line] = group
  return groups


@functools.cache
def concept_names() -> tuple[str, ...]:
  """The names of the concepts; `object_names` of a batch are positions here."""
  return tuple(concept_groups())


@functools.cache
def heldout_concepts() -> frozenset[str]:
  """The names of the concepts that are held out in every style.

  They are the 80 with the least hashes, of those whose name is not part of another concept's name.
  Otherwise training texts would contain it, as 'car key' contains 'key'.
  """
  names = concept_names()
  candidates = []
  for name in names:
    containing = [other for other in names if other != name and f' {name} ' in f' {other} ']
    if not containing:
      candidates.append(name)
  candidates.sort(key=lambda name: _fraction(f'{_CONCEPT_SALT} concept {name}'))
  return frozenset(candidates[:NUM_HELDOUT_CONCEPTS])


def heldout_concept(name: str) -> bool:
  """Whether a concept ('owl') is held out in every style."""
  return name in heldout_concepts()


def heldout_style(style: str) -> bool:
  """Whether a style is held out with all of its sprites."""
  return style == HELDOUT_STYLE


def heldout_pair(style: str, codepoint: str) -> bool:
  """Whether a concept is held out in this style; training may have it in others."""
  return _fraction(f'pair {style} {codepoint}') < _PAIR_SHARE


@functools.cache
def heldout_combination(group: str, background: str) -> bool:
  """Whether members of a group never have this background in training."""
  return _fraction(f'combination {group} {background}') < _COMBINATION_SHARE


def heldout_reasons(split: str) -> tuple[str, ...]:
  """Returns why the examples of a split are held out.

  The split 'heldout', which training runs evaluate, leaves out the held-out style. So no choice is
  made by it.

  Args:
    split: 'train' (no reason), 'heldout' (any of three), or 'heldout/REASON': 'concept', 'pair',
      'combination' or 'style'.

  Raises:
    ValueError: the split is unknown.
  """
  reasons = {'train': (), 'heldout': _TRAINING_REASONS}
  for reason in (*_TRAINING_REASONS, 'style'):
    reasons[f'heldout/{reason}'] = (reason,)
  if split not in reasons:
    raise ValueError(f'unknown split {split!r}; choose one of {", ".join(reasons)}')
  return reasons[split]


def _fraction(text: str) -> float:
  """Maps a text to a uniform number in [0, 1)."""
  return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), 'big') / 2**32
