"""Emu's second output: continuous vectors, regressed one after the other.

In training, the hidden states at [IMG] and at the n slots of an image predict the input embeddings
of the slots that follow, the last of them [/IMG]: n + 1 pairs.

    input      w  [IMG]  v1  v2  v3  [/IMG]  w
    predicts   .   v1    v2  v3  [/IMG]  .   .

Source: Sun et al. 2023, Emu, section 2.2. The released code builds the pairs and leaves the loss
out; the squared error is averaged over pairs and channels here.

Axes: R packed rows, S slots, H width of the language model, B prompts, n vectors of an image.
"""

from collections.abc import Callable
from typing import TypeVar

import chex
import jax
import jax.numpy as jnp
from jax import Array

State = TypeVar('State')


def regression_slots(source: Array, segments: Array) -> Array:
  """The slots whose hidden state predicts an embedding.

  Args:
    source: i32[R, S], not negative at the slots of an image (`packing.PackedBatch.source`).
    segments: i32[R, S].

  Returns:
    bool[R, S]: [IMG] and the n slots of each image.
  """
  is_vector = source >= 0
  follows = jnp.pad(is_vector[:, 1:], ((0, 0), (0, 1)))
  same_pair = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1)))
  return (is_vector | follows) & same_pair


def regression_loss(predicted: Array, inputs: Array, slots: Array) -> tuple[Array, Array]:
  """Squared errors of the next input embeddings, which get no gradient.

  Args:
    predicted: [R, S, H], of the regression head.
    inputs: [R, S, H], the embeddings that the language model read.
    slots: bool[R, S] (`regression_slots`).

  Returns:
    The sum over pairs of the mean squared error over H, f32[], and the number of pairs, f32[].
  """
  chex.assert_equal_shape([predicted, inputs])
  targets = jnp.roll(jax.lax.stop_gradient(inputs), -1, axis=1).astype(jnp.float32)
  # Not `errors * slots`: an empty slot may hold any number, and its gradient must be zero.
  errors = jnp.where(slots[..., None], predicted.astype(jnp.float32) - targets, 0)
  return jnp.square(errors).mean(-1).sum(), slots.sum(dtype=jnp.float32)


def regress(
  step: Callable[[State, Array], tuple[State, Array]],
  state: State,
  hidden: Array,
  head: Callable[[Array], Array],
  num_vectors: int,
) -> tuple[Array, State]:
  """Draws an image as n vectors, each of them fed back.

  Args:
    step: (state, embeddings [B, H]) -> (state, hidden states [B, H]): the language model reads one
      more slot of each row; the state is its cache, and what it needs besides.
    state: after the prompt, whose last token is [IMG].
    hidden: [B, H], the hidden states at [IMG].
    head: the regression head, [B, H] -> [B, H].
    num_vectors: n.

  Returns:
    f32[B, n, H], the condition of the U-Net; and the state after the last vector but one.
  """
  first = head(hidden).astype(jnp.float32)

  def next_vector(carry: tuple[State, Array], _: None) -> tuple[tuple[State, Array], Array]:
    state, vector = carry
    state, hidden = step(state, vector)
    return (state, head(hidden).astype(jnp.float32)), vector

  (state, last), vectors = jax.lax.scan(next_vector, (state, first), None, num_vectors - 1)
  vectors = jnp.concatenate([vectors, last[None]])
  return vectors.swapaxes(0, 1), state
