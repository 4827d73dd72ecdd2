"""What the rows of the task 'lm' are used for, and how often.

| use     | kind of row   | loss on                                            |
|---------|---------------|----------------------------------------------------|
| caption | image to text | the caption                                        |
| answer  | image to text | the answer to a question about the image           |
| draw    | text to image | the image, and a little on its caption             |
| text    | text only     | the text                                           |
| chat    | chat          | the answers of a conversation, with any images     |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lavit_jax.data.emoji import questions
from lavit_jax.models.packing import CHAT, IMAGE_TO_TEXT, TEXT_ONLY, TEXT_TO_IMAGE

DEFAULT_SHARES = {'caption': 0.35, 'answer': 0.3, 'draw': 0.3, 'text': 0.05}
KIND_OF_USE = {
  'caption': IMAGE_TO_TEXT,
  'answer': IMAGE_TO_TEXT,
  'draw': TEXT_TO_IMAGE,
  'text': TEXT_ONLY,
  'chat': CHAT,
}
DIALOGS = ('chat', 'answer')  # uses of sources whose records are conversations or questions


class UseSampler:
  """Draws the use of a row.

  Args:
    shares: {use: how often, against the others}.

  Raises:
    ValueError: an unknown use, a negative share, or all shares 0.
  """

  def __init__(self, shares: Mapping[str, float]):
    values = np.array(list(shares.values()), np.float64)
    if set(shares) - set(KIND_OF_USE) or (values < 0).any() or not values.sum() > 0:
      raise ValueError(
        'shares must be non-negative numbers, not all 0, for any of '
        f'{", ".join(KIND_OF_USE)}; got {dict(shares)}'
      )
    self._uses = [use for use in KIND_OF_USE if shares.get(use)]
    cumulative = np.cumsum([shares[use] for use in self._uses])
    self._cumulative = cumulative / cumulative[-1]

  def __call__(self, rng: np.random.Generator) -> str:
    """The use of the next row."""
    return self._uses[np.searchsorted(self._cumulative, rng.random(), side='right')]


def pair_shares(shares: Mapping[str, float]) -> dict[str, float]:
  """The shares of the uses that an image with a caption can have: 'caption' and 'draw'."""
  pairs = {use: shares[use] for use in ('caption', 'draw') if shares.get(use)}
  return pairs or {'caption': 1.0}


def task_shares(
  shares: Mapping[str, float], sources: Sequence[Mapping[str, Any]] = ()
) -> np.ndarray:
  """The expected share of each kind of row in the task 'lm'.

  Args:
    shares: of the uses; unknown uses are ignored, for `loader.batches` reports them.
    sources: options of sources; without them rows are composed.

  Returns:
    f64[3]: image to text, text to image, text only; a conversation counts as an image to text.
  """
  if not sources:
    return _kind_shares(shares)
  source_shares = []
  for source in sources:
    use = source.get('use')
    source_shares.append(_kind_shares({use: 1.0} if use else pair_shares(shares)))
  return np.average(source_shares, axis=0, weights=source_weights(shares, sources))


def source_weights(
  shares: Mapping[str, float], sources: Sequence[Mapping[str, Any]]
) -> list[float]:
  """How often rows come from each source.

  By the weights of the sources. With a share of 'chat', the sources of conversations and questions
  together have that share, against the shares of the uses that the other sources have.
  """
  weights = [float(source.get('weight', 1.0)) for source in sources]
  share = shares.get('chat', 0.0)
  is_dialog = [source.get('use') in DIALOGS for source in sources]
  if not share or all(is_dialog) or not any(is_dialog):
    return weights
  other_uses: set[str] = set()
  for source in sources:
    use = source.get('use')
    if use not in DIALOGS:
      other_uses |= {use} if use else set(pair_shares(shares))
  rest = sum(shares.get(use, 0.0) for use in other_uses)
  if not rest:
    raise ValueError(
      f'shares.chat={share:g}, and those of the other sources ({", ".join(sorted(other_uses))}) '
      'are 0; give them some, or shares.chat=0 for the weights of the sources'
    )
  total = {
    kind: sum(w for w, dialog in zip(weights, is_dialog, strict=True) if dialog == kind)
    for kind in (True, False)
  }
  return [
    weight / total[dialog] * (share if dialog else rest)
    for weight, dialog in zip(weights, is_dialog, strict=True)
  ]


def _kind_shares(shares: Mapping[str, float]) -> np.ndarray:
  """f64[3], with a sum of 1."""
  totals = np.zeros(3)
  for use in set(shares) & set(KIND_OF_USE):
    totals[KIND_OF_USE[use] if use != 'chat' else IMAGE_TO_TEXT] += shares[use]
  return totals / max(totals.sum(), 1e-9)


def question_weights(weights: Mapping[str, float]) -> dict[str, float]:
  """How often each type of question is asked; 1 for a type that `weights` does not name.

  Raises:
    ValueError: an unknown type, or a weight that is not positive.
  """
  if set(weights) - set(questions.TYPES) or not all(weight > 0 for weight in weights.values()):
    raise ValueError(
      f'question_weights must be positive numbers for any of {", ".join(questions.TYPES)}; '
      f'got {dict(weights)}'
    )
  return dict.fromkeys(questions.TYPES, 1.0) | dict(weights)
