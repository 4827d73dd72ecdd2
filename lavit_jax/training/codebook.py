"""The codebook as it trains: unit vectors that follow the means of the tokens that choose them.

As in BEiT-v2 (specification, Training), it is not trained by gradients but carried as state. Axes:
T tokens, K codes, C code width. `weight` f32[T] is 1 where a token counts (kept patches) and 0
elsewhere, so that shapes stay static.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.quantizer import l2_normalize, nearest_code

DEAD_AFTER = 100  # batches without a token after which a code counts as dead


class Codebook(NamedTuple):
  """The codes, and how they were used."""

  embedding: Array  # f32[K, C], unit vectors
  cluster_size: Array  # f32[K], moving average of the tokens that a batch gives each code
  idle: Array  # i32[K], batches since a token last chose the code
  step: Array  # i32[], batches seen, whether or not the codes moved
  started: Array  # bool[], whether k-means has started it


def init_codebook(embedding: Array, started: bool = False) -> Codebook:
  """A codebook of unit vectors f32[K, C], all of them alive.

  Args:
    embedding: the codes.
    started: whether they are those of an earlier training.
  """
  num_codes = len(embedding)
  return Codebook(
    embedding,
    jnp.ones(num_codes),
    jnp.zeros(num_codes, jnp.int32),
    jnp.zeros([], jnp.int32),
    jnp.full([], started),
  )


def has_codebook(params: Mapping[str, Any]) -> bool:
  """Whether params have a codebook; the loader leaves out one that was never trained."""
  return 'tokenizer' in params and 'embedding' in params['tokenizer']['quantizer']


def take_out(params: Mapping[str, Any]) -> tuple[dict[str, Any], Array]:
  """Separates the codebook from the tokenizer's parameters.

  Returns:
    (params without it, the codebook f32[K, C]).
  """
  quantizer = dict(params['tokenizer']['quantizer'])
  embedding = quantizer.pop('embedding')
  return {**params, 'tokenizer': {**params['tokenizer'], 'quantizer': quantizer}}, embedding


def put_in(params: Mapping[str, Any], embedding: Array) -> dict[str, Any]:
  """The inverse of `take_out`."""
  quantizer = {**params['tokenizer']['quantizer'], 'embedding': embedding}
  return {**params, 'tokenizer': {**params['tokenizer'], 'quantizer': quantizer}}


def revived_codes(book: Codebook, revive_after: int) -> Array:
  """The codes that the last `update_codebook` has moved onto another token, bool[K].

  They are alive again only when a token chooses them.
  """
  if not revive_after:
    return jnp.zeros(len(book.idle), bool)
  return (book.idle > 0) & (book.idle % revive_after == 0)


def restart_average(average: Array, old: Codebook, new: Codebook, revive_after: int) -> Array:
  """The average of a codebook over the last steps, as unit vectors.

  Averaged by the same weights as the parameters, the codes are where averaged parameters put their
  tokens. The average restarts for codes that jump: all until the step at which k-means starts them,
  and those that are moved onto another token.

  Args:
    average: f32[K, C].
    old: the codebook before the step.
    new: the codebook after it.
    revive_after: see `update_codebook`.

  Returns:
    f32[K, C].
  """
  restarts = ~old.started | revived_codes(new, revive_after)
  return jnp.where(restarts[:, None], new.embedding, l2_normalize(average))


def count_assignments(
  vectors: Array, weight: Array, ids: Array, num_codes: int
) -> tuple[Array, Array]:
  """How many tokens chose each code, f32[K], and the sum of their vectors, f32[K, C].

  Args:
    vectors: f32[T, C].
    weight: f32[T].
    ids: i32[T], the codes that the tokens chose.
    num_codes: K.
  """
  columns = jnp.concatenate([weight[:, None], vectors * weight[:, None]], axis=-1)
  sums = jax.ops.segment_sum(columns, ids, num_codes)
  return sums[:, 0], sums[:, 1:]


def draw_vectors(key: Array, vectors: Array, weight: Array, num: int) -> Array:
  """Draws `num` of the vectors f32[T, C], with chances proportional to `weight` f32[T].

  Without repeats while there are enough.
  """
  noise = jax.random.gumbel(key, weight.shape)
  score = jnp.where(weight > 0, jnp.log(weight) + noise, -jnp.inf)
  order = jnp.argsort(-score)
  return vectors[order[jnp.arange(num) % jnp.maximum((weight > 0).sum(), 1)]]


def kmeans(
  key: Array, vectors: Array, weight: Array, num_codes: int, iterations: int = 10
) -> tuple[Array, Array]:
  """Spherical k-means, from tokens drawn at random; empty clusters stay where they are.

  Args:
    key: of the draw.
    vectors: f32[T, C], unit vectors.
    weight: f32[T].
    num_codes: K.
    iterations: of the centers.

  Returns:
    (the centers f32[K, C], unit vectors; the size of each cluster f32[K]).
  """

  def iterate(_, embedding):
    ids = nearest_code(vectors, embedding)
    count, total = count_assignments(vectors, weight, ids, num_codes)
    return jnp.where(count[:, None] > 0, l2_normalize(total), embedding)

  first = draw_vectors(key, vectors, weight, num_codes)
  embedding = jax.lax.fori_loop(0, iterations, iterate, first)
  ids = nearest_code(vectors, embedding)
  count, _ = count_assignments(vectors, weight, ids, num_codes)
  return embedding, count


def start_from_kmeans(key: Array, book: Codebook, vectors: Array, weight: Array) -> Codebook:
  """The codebook that k-means finds in the first quantized batch."""
  embedding, count = kmeans(key, vectors, weight, len(book.embedding))
  return book._replace(
    embedding=embedding,
    cluster_size=count,
    idle=jnp.zeros_like(book.idle),
    started=jnp.ones([], bool),
  )


def update_codebook(
  key: Array,
  book: Codebook,
  vectors: Array,
  weight: Array,
  ids: Array,
  decay: float,
  revive_after: int,
) -> Codebook:
  """One batch's step of the codes towards the means of their tokens.

  Args:
    key: for the revival.
    book: the codebook before the batch.
    vectors: f32[T, C], unit vectors.
    weight: f32[T].
    ids: i32[T], their codes.
    decay: of the moving averages (0.99).
    revive_after: a code that no token of this many batches has chosen moves onto a token that its
      code describes badly (chances proportional to the squared distance, as in k-means++), and
      again after as many more. 0: never.
  """
  chex.assert_rank([vectors, weight, ids], [2, 1, 1])
  chex.assert_equal_shape_prefix([vectors, weight, ids], 1)
  num_codes = len(book.embedding)
  count, total = count_assignments(vectors, weight, ids, num_codes)
  used = count > 0
  moved = l2_normalize(decay * book.embedding + (1 - decay) * l2_normalize(total))
  embedding = jnp.where(used[:, None], moved, book.embedding)
  cluster_size = decay * book.cluster_size + (1 - decay) * count
  idle = jnp.where(used, 0, book.idle + 1)
  if revive_after:
    error = weight * jnp.square(vectors - book.embedding[ids]).sum(-1)
    revived = revived_codes(book._replace(idle=idle), revive_after)
    embedding = _revive(key, embedding, revived, vectors, error)
  return book._replace(embedding=embedding, cluster_size=cluster_size, idle=idle)


def _revive(key: Array, embedding: Array, revived: Array, vectors: Array, error: Array) -> Array:
  """Moves the codes of the mask `revived` bool[K] onto tokens with a large `error` f32[T]."""
  # The first vector drawn is the likeliest to be badly described: none is drawn in vain.
  order = jnp.maximum(jnp.cumsum(revived) - 1, 0)

  def move(embedding):
    drawn = draw_vectors(key, vectors, error, len(embedding))
    return jnp.where(revived[:, None], drawn[order], embedding)

  # Only where codes are revived: drawing sorts all tokens.
  return jax.lax.cond(revived.any(), move, lambda embedding: embedding, embedding)


def usage_metrics(book: Codebook) -> dict[str, Array]:
  """The signs of collapse over the last steps, f32[] each.

  These are the share of codes alive, how many are dead, and the perplexity of their use (1..K).
  """
  dead = book.idle >= DEAD_AFTER
  return dict(
    code_usage=1 - dead.mean(),
    dead_codes=dead.sum().astype(jnp.float32),
    perplexity=perplexity(book.cluster_size),
  )


def perplexity(count: Array) -> Array:
  """The exponential of the entropy of a distribution, f32[]: 1 for a single code, K for equal use.

  Args:
    count: f32[K].
  """
  share = count / jnp.maximum(count.sum(), 1e-9)
  return jnp.exp(-(share * jnp.log(jnp.maximum(share, 1e-12))).sum())
