"""The results of the user's API.

They are named tuples, so that they also unpack: `ids, keep, counts = model.tokenize(images)`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lavit_jax.inference.deprecated import renamed_attribute


class VisualTokens(NamedTuple):
  """The visual tokens of B images of N patches.

  Attributes:
    ids: i32[n] for each image, the codes of its tokens in the order of their patches.
    keep: bool[B, N], the patches that became tokens.
    counts: i32[B], the number n of tokens of each image.
  """

  ids: list[np.ndarray]
  keep: np.ndarray
  counts: np.ndarray


class PatchSelection(NamedTuple):
  """What the selector makes of B images of N patches, without sampling.

  Attributes:
    probabilities: f32[B, N], that a patch becomes a token when patches are sampled.
    keep: bool[B, N], the round(sum of probabilities) most probable patches, which become tokens
      without sampling.
    counts: i32[B], their number.
  """

  probabilities: np.ndarray
  keep: np.ndarray
  counts: np.ndarray


class TextOutput(NamedTuple):
  """A caption or an answer.

  Attributes:
    text: the result of `caption` or `answer`.
    ids: i32[n], the new tokens, with </s> if the text ended there.
    score: of a beam, the log-probability divided by n ** length_penalty, which ranks it; of a
      sample, the log-probability.
  """

  text: str
  ids: np.ndarray
  score: float


class CodesOutput(NamedTuple):
  """The codes of one generated image.

  Attributes:
    codes: i32[n], in 0..codebook_size - 1, the result of `sample_codes`.
    ids: i32[m], the new tokens of the language model, with [/IMG] if the image ended there.
    score: log-probability of the tokens under guidance, before any id was suppressed.
  """

  codes: np.ndarray
  ids: np.ndarray
  score: float


class DecodedImages(NamedTuple):
  """B images that were decoded from codes.

  Attributes:
    images: uint8[B, H, W, 3].
    flagged: bool[B], images that the safety checker flagged; these are black.
  """

  images: np.ndarray
  flagged: np.ndarray

  pictures = renamed_attribute('pictures', 'images')


class ImageOutput(NamedTuple):
  """B images that were generated from prompts.

  Attributes:
    images: uint8[B, H, W, 3].
    flagged: bool[B], images that the safety checker flagged; these are black.
    codes: the codes that each image was decoded from; none if it was decoded from vectors.
  """

  images: np.ndarray
  flagged: np.ndarray
  codes: list[CodesOutput]

  pictures = renamed_attribute('pictures', 'images')
  sampled = renamed_attribute('sampled', 'codes')
