"""The protocol of the visual interfaces: patch features in, vectors for the language model out.

Packing, prompts, decoding and evaluation read `VisualTokens` alone, and so work with every
interface. With most, the vectors stand in the sequence. With a `LayeredInterface`, the sequence has
[IMG] and [/IMG] alone, and layers between those of the language model read the vectors. With a
`RegressingInterface`, the language model predicts the vectors, too.

Axes: B images, N rows of features, D feature width, n vectors of an image, H width of the language
model, T text slots, R rows of the language model, S slots of a row, M images of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array

from lavit_jax.models.llama import ExtraLayers


class VisualTokens(NamedTuple):
  """What an image is for the language model.

  Attributes:
    vectors: dtype[B, n, H]. They stand in the sequence if the interface's `in_sequence` is True;
      otherwise extra layers read them, and their width is that of these layers.
    mask: bool[B, n], a prefix of each row: which vectors count. The others are arbitrary.
  """

  vectors: Array
  mask: Array

  @property
  def lengths(self) -> Array:
    """The number of vectors that count, i32[B]: the `visual_length` of `packing.pack_pairs`."""
    return self.mask.sum(-1, dtype=jnp.int32)


class Context(NamedTuple):
  """What an interface may need beside the features; each takes what it uses.

  Attributes:
    keep: f32[B, N], the selected patches (`LavitInterface`).
    instruction: ids i32[B, T] of the question, in the vocabulary of the Q-Former.
    instruction_mask: bool[B, T], False in padding.
    key: one key, for dropout; None at inference.
  """

  keep: Array | None = None
  instruction: Array | None = None
  instruction_mask: Array | None = None
  key: Array | None = None


NO_CONTEXT = Context()


@runtime_checkable
class VisualInterface(Protocol):
  """A Linen module that follows the protocol; its parameters are those of one module.

  Attributes:
    in_sequence: whether the vectors replace embeddings of the sequence.
  """

  in_sequence: bool

  def num_vectors(self, num_features: int) -> int:
    """n, for N rows of features: the slots of the sequence that an image takes, if any."""
    ...

  def __call__(self, features: Array, context: Context = NO_CONTEXT) -> VisualTokens:
    """Patch features [B, N, D] -> what the language model reads.

    Raises:
      ValueError: the context lacks what the interface needs.
    """
    ...


class RowImages(NamedTuple):
  """The images of packed rows or prompts.

  Attributes:
    vectors: dtype[R, M, n, W]; rows with fewer images have zeros.
    ordinal: i32[R, S], which of them a slot sees; -1 for none.
  """

  vectors: Array
  ordinal: Array


@runtime_checkable
class LayeredInterface(VisualInterface, Protocol):
  """An interface whose vectors are not in the sequence; `in_sequence` is False."""

  def extra_layers(self, params: Mapping[str, Any], images: RowImages) -> ExtraLayers:
    """The layers of the language model that read the vectors, by the interface's parameters."""
    ...


@runtime_checkable
class RegressingInterface(VisualInterface, Protocol):
  """An interface whose vectors the language model can draw; `in_sequence` is True."""

  def regress(self, hidden: Array) -> Array:
    """Hidden states [..., H] -> the input embeddings [..., H] of the next slots."""
    ...


def all_count(vectors: Array) -> VisualTokens:
  """The tokens of an interface whose vectors [B, n, H] all count."""
  return VisualTokens(vectors, jnp.ones(vectors.shape[:2], bool))


def require(value: Array | None, name: str, interface: str) -> Array:
  """A field of the context that the interface cannot do without.

  Raises:
    ValueError: it is None.
  """
  if value is None:
    raise ValueError(f'{interface} needs Context.{name}')
  return value
