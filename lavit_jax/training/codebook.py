"""The codebook as it trains: unit vectors that follow the means of what they are chosen for (BEiT-v2; specification, Training).

It is not trained by gradients but carried as state. Axes: T tokens, K codes, C code width; `weight` f32[T] is 1 where a token
counts (kept patches) and 0 elsewhere, so that shapes stay static.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.tokenizer import l2_normalize, nearest_code

LIVE = 100  # a code is dead once this many batches have passed it by


class Codebook(NamedTuple):
  """`embedding` f32[K, C] unit rows; `cluster_size` f32[K] moving average of the tokens a batch gives each code; `idle` i32[K]
  batches since it was last chosen; `step` i32[], updates seen, whatever they did; `started` bool[], whether k-means has begun it.
  """

  embedding: Array
  cluster_size: Array
  idle: Array
  step: Array
  started: Array


def init_codebook(embedding: Array, started: bool = False) -> Codebook:
  """A codebook of these unit rows f32[K, C], all of them alive; `started` if they are those of an earlier training."""
  num_codes = len(embedding)
  return Codebook(
    embedding,
    jnp.ones(num_codes),
    jnp.zeros(num_codes, jnp.int32),
    jnp.zeros([], jnp.int32),
    jnp.full([], started),
  )


def is_offered(parts: dict) -> bool:
  """Whether a codebook is among parts of the model; the loader leaves out one that was never trained."""
  return 'tokenizer' in parts and 'embedding' in parts['tokenizer']['quantizer']


def take_out(params: dict) -> tuple[dict, Array]:
  """Trees by part, among them 'tokenizer' -> (the same without the codebook, the codebook f32[K, C])."""
  quantizer = dict(params['tokenizer']['quantizer'])
  embedding = quantizer.pop('embedding')
  return {**params, 'tokenizer': {**params['tokenizer'], 'quantizer': quantizer}}, embedding


def put_in(params: dict, embedding: Array) -> dict:
  """The inverse of `take_out`."""
  quantizer = {**params['tokenizer']['quantizer'], 'embedding': embedding}
  return {**params, 'tokenizer': {**params['tokenizer'], 'quantizer': quantizer}}


def moved_away(book: Codebook, revive_after: int) -> Array:
  """bool[K]: the codes that the last `update_codebook` has put elsewhere. Alive they are only when a token chooses them."""
  if not revive_after:
    return jnp.zeros(len(book.idle), bool)
  return (book.idle > 0) & (book.idle % revive_after == 0)


def settle(average: Array, old: Codebook, new: Codebook, revive_after: int) -> Array:
  """The average of a codebook over the last steps, f32[K, C], as unit rows.

  Averaged by the same weights as the parameters, the codes are where averaged parameters put their tokens. Codes that jump begin anew:
  all until the step at which k-means begins them, and those that are moved onto another token.
  """
  anew = ~old.started | moved_away(new, revive_after)
  return jnp.where(anew[:, None], new.embedding, l2_normalize(average))


def count_assignments(z: Array, weight: Array, ids: Array, num_codes: int) -> tuple[Array, Array]:
  """How many tokens chose each code, f32[K], and their sum f32[K, C]."""
  total = jnp.concatenate([weight[:, None], z * weight[:, None]], axis=-1)
  total = jax.ops.segment_sum(total, ids, num_codes)
  return total[:, 0], total[:, 1:]


def draw_vectors(key: Array, z: Array, weight: Array, num: int) -> Array:
  """`num` rows of z f32[T, C], without repeats while there are enough, with chances proportional to `weight` f32[T]."""
  score = jnp.where(weight > 0, jnp.log(weight) + jax.random.gumbel(key, weight.shape), -jnp.inf)
  order = jnp.argsort(-score)
  return z[order[jnp.arange(num) % jnp.maximum((weight > 0).sum(), 1)]]


def kmeans(
  key: Array, z: Array, weight: Array, num_codes: int, iterations: int = 10
) -> tuple[Array, Array]:
  """Spherical k-means of z f32[T, C] (unit rows) from tokens drawn at random; empty clusters stay where they are.

  Returns:
    (embedding f32[K, C], unit rows; the size of each cluster f32[K]).
  """

  def iterate(_, embedding):
    count, total = count_assignments(z, weight, nearest_code(z, embedding), num_codes)
    return jnp.where(count[:, None] > 0, l2_normalize(total), embedding)

  embedding = jax.lax.fori_loop(0, iterations, iterate, draw_vectors(key, z, weight, num_codes))
  count, _ = count_assignments(z, weight, nearest_code(z, embedding), num_codes)
  return embedding, count


def start_from_kmeans(key: Array, book: Codebook, z: Array, weight: Array) -> Codebook:
  """The codebook that k-means finds in the first quantised batch."""
  embedding, count = kmeans(key, z, weight, len(book.embedding))
  return book._replace(
    embedding=embedding,
    cluster_size=count,
    idle=jnp.zeros_like(book.idle),
    started=jnp.ones([], bool),
  )


def update_codebook(
  key: Array, book: Codebook, z: Array, weight: Array, ids: Array, decay: float, revive_after: int
) -> Codebook:
  """One batch's step of the codes towards the means of their tokens.

  Args:
    key: for the revival.
    z: f32[T, C] unit rows; weight f32[T]; ids i32[T] their codes.
    decay: of the moving averages (0.99).
    revive_after: a code that this many batches have passed by moves onto a token that its code describes badly (chances
      proportional to the squared distance, as in k-means++), and again after as many more. 0: never.
  """
  num_codes = len(book.embedding)
  count, total = count_assignments(z, weight, ids, num_codes)
  used = count > 0
  moved = l2_normalize(decay * book.embedding + (1 - decay) * l2_normalize(total))
  embedding = jnp.where(used[:, None], moved, book.embedding)
  cluster_size = decay * book.cluster_size + (1 - decay) * count
  idle = jnp.where(used, 0, book.idle + 1)
  if revive_after:
    error = weight * jnp.square(z - book.embedding[ids]).sum(-1)
    moves = moved_away(book._replace(idle=idle), revive_after)
    order = jnp.maximum(
      jnp.cumsum(moves) - 1, 0
    )  # the first token drawn is the likeliest to be badly described: none goes to waste
    # Only then: to draw sorts all tokens.
    embedding = jax.lax.cond(
      moves.any(),
      lambda e: jnp.where(moves[:, None], draw_vectors(key, z, error, num_codes)[order], e),
      lambda e: e,
      embedding,
    )
  return book._replace(embedding=embedding, cluster_size=cluster_size, idle=idle)


def usage_metrics(book: Codebook) -> dict[str, Array]:
  """What collapse looks like, over the last steps: the share of codes alive, how many are dead, the perplexity of their use (1..K)."""
  dead = book.idle >= LIVE
  return dict(
    code_usage=1 - dead.mean(),
    dead_codes=dead.sum().astype(jnp.float32),
    perplexity=perplexity(book.cluster_size),
  )


def perplexity(count: Array) -> Array:
  """The exponential of the entropy of a distribution given by counts f32[K]: 1 for a single code, K for equal use."""
  share = count / jnp.maximum(count.sum(), 1e-9)
  return jnp.exp(-(share * jnp.log(jnp.maximum(share, 1e-12))).sum())
