"""The training of codebook.py: a projection, a quantizer and a decoder on cached features.

Axes: I images, B images of a batch, N patches, D feature width, T tokens (all patches of a batch),
K codes, C width of the codes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from quantizers import quantize, straight_through

from lavit_jax.models.layers import gelu
from lavit_jax.models.quantizer import Quantizer, l2_normalize, unit_rows
from lavit_jax.training import codebook
from lavit_jax.training.codebook import Codebook
from lavit_jax.training.optimizer import OptimizerConfig, make_optimizer
from lavit_jax.training.schedule import ScheduleConfig
from lavit_jax.training.stages.base import cosine_similarity

DECAY = 0.99  # of the averages behind `perplexity`
EVALUATED_TOGETHER = 250  # images


class Program(NamedTuple):
  """What the compiled functions depend on; variants with the same program share them."""

  kind: str
  num_codes: int
  width: int
  features: int  # D
  batch_size: int  # images
  steps: int


class State(NamedTuple):
  """All that training changes.

  Attributes:
    params: of the quantizer and the decoder.
    optimizer: its state.
    book: the codebook of moving averages; None in other kinds.
    idle: i32[K], batches since a token last chose the code.
    average: f32[K], moving average of the tokens that a batch gives each code.
    step: i32[].
  """

  params: Any
  optimizer: Any
  book: Codebook | None
  idle: Array
  average: Array
  step: Array


class PatchDecoder(nn.Module):
  """Codes [T, C] -> features [T, D], each patch on its own."""

  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[T, C] -> f32[T, D]."""
    x = gelu(nn.Dense(256)(x))
    x = gelu(nn.Dense(256)(x))
    return nn.Dense(self.features)(x)


def modules(program: Program) -> tuple[Quantizer, PatchDecoder]:
  """The two modules; only a codebook that trains by gradient is a parameter."""
  num_rows = program.num_codes if program.kind == 'gradient' else 1
  quantizer = Quantizer(program.features, num_rows, program.width)
  return quantizer, PatchDecoder(program.features)


def optimizer_of(program: Program, params: Any) -> optax.GradientTransformation:
  """That of the tokenizer stage: AdamW with warm-up and cosine decay."""
  warmup = min(100, program.steps // 10)
  schedule = ScheduleConfig(program.steps, 1e-3, warmup, final_fraction=0.05)
  config = OptimizerConfig(
    schedule,
    weight_decay=0.05,
    b1=0.9,
    b2=0.98,
    mu_dtype='float32',
    nu_dtype='float32',
    clip_norm=1.0,
    freeze=(),
    lr_scale=(),
  )
  return make_optimizer(config, params)


def init(program: Program, key: Array) -> State:
  """The state before the first step."""
  keys = jax.random.split(key, 3)
  quantizer, decoder = modules(program)
  params = {
    'quantizer': quantizer.init(keys[0], jnp.zeros((1, program.features)), method='encode'),
    'decoder': decoder.init(keys[1], jnp.zeros((1, program.width))),
  }
  book = None
  if program.kind == 'ema':
    book = codebook.init_codebook(unit_rows(keys[2], (program.num_codes, program.width)))
  return State(
    params,
    optimizer_of(program, params).init(params),
    book,
    jnp.full(program.num_codes, codebook.DEAD_AFTER, jnp.int32),  # in no use yet
    jnp.zeros(program.num_codes),
    jnp.zeros([], jnp.int32),
  )


def draw_images(program: Program, seed: int, num_images: int, first: int, num: int) -> np.ndarray:
  """The images of steps `first` to `first + num - 1`, i32[num, B]; each epoch has another order."""
  per_epoch = num_images // program.batch_size
  rows = []
  for step in range(first, first + num):
    epoch, batch = divmod(step, per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(num_images)
    rows.append(order[batch * program.batch_size : (batch + 1) * program.batch_size])
  return np.array(rows, np.int32)


def embedding_of(params: Any, book: Codebook | None, kind: str) -> Array | None:
  """The codebook, unit vectors f32[K, C]; None if the codes are digits."""
  if kind == 'gradient':
    return l2_normalize(params['quantizer']['params']['embedding'])
  return book.embedding if book else None


def reconstruct(program, params, book, x, quantizing, commitment_weight):
  """Tokens f32[T, D] -> (`Quantized`, cosine similarity of each with its reconstruction f32[T])."""
  quantizer, decoder = modules(program)
  encoded = quantizer.apply(params['quantizer'], x, method='encode')
  embedding = embedding_of(params, book, program.kind)
  quantized = quantize(program.kind, encoded, embedding, commitment_weight)
  codes = straight_through(quantized.z, quantized.codes)
  codes = jnp.where(quantizing, codes, quantized.z)
  return quantized, cosine_similarity(x, decoder.apply(params['decoder'], codes))


def train_step(program, revive_after, decay, commitment_weight, quantizing, key, x, state):
  """One update on tokens f32[T, D]; returns (state, f32[] cosine term)."""

  def loss(params):
    quantized, cosine = reconstruct(program, params, state.book, x, quantizing, commitment_weight)
    cosine_term = 1 - cosine.mean()
    return cosine_term + jnp.where(quantizing, quantized.loss, 0), (quantized, cosine_term)

  gradient, (quantized, cosine_term) = jax.grad(loss, has_aux=True)(state.params)
  optimizer = optimizer_of(program, state.params)
  updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
  params = optax.apply_updates(state.params, updates)
  ones = jnp.ones(len(x))
  book = state.book
  if book is not None:
    key = jax.random.fold_in(key, state.step)
    moved = codebook.update_codebook(
      key, book, quantized.z, ones, quantized.ids, decay, revive_after
    )
    book = jax.tree.map(lambda new, old: jnp.where(quantizing, new, old), moved, book)
  count, _ = codebook.count_assignments(quantized.z, ones, quantized.ids, program.num_codes)
  idle = jnp.where(quantizing & (count > 0), 0, state.idle + 1)
  average = jnp.where(quantizing, DECAY * state.average + (1 - DECAY) * count, 0)
  return State(params, optimizer_state, book, idle, average, state.step + 1), cosine_term


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=8)
def train(
  program: Program,
  revive_after: int,
  decay: float,
  commitment_weight: float,
  quantizing: bool,
  key: Array,
  features: Array,
  images: Array,
  state: State,
) -> tuple[State, dict[str, Array]]:
  """Some steps, and what is recorded of them.

  Args:
    program: what is trained.
    revive_after: batches after which an unused code moves; 0: never.
    decay: of the codebook's moving averages.
    commitment_weight: of the squared distance of a token to its code.
    quantizing: whether quantization has begun.
    key: for the revival.
    features: of the training images, f32[I, N, D].
    images: those of each step, i32[steps, B].
    state: before the steps.
  """

  def step(state, chosen):
    x = features[chosen].reshape(-1, program.features)
    return train_step(program, revive_after, decay, commitment_weight, quantizing, key, x, state)

  state, cosines = jax.lax.scan(step, state, images)
  metrics = dict(
    cosine=cosines.mean(),
    usage=100 * (state.idle < codebook.DEAD_AFTER).mean(),
    perplexity=codebook.perplexity(state.average),
  )
  return state, metrics


@functools.partial(jax.jit, static_argnums=0)
def start_codebook(program: Program, key: Array, features: Array, state: State) -> Codebook:
  """The codebook that k-means finds in the first quantized batch, features f32[B, N, D]."""
  quantizer, _ = modules(program)
  x = features.reshape(-1, program.features)
  z = quantizer.apply(state.params['quantizer'], x, method='project')
  return codebook.start_from_kmeans(key, state.book, z, jnp.ones(len(z)))


@functools.partial(jax.jit, static_argnums=0)
def evaluate(program: Program, quantizing: bool, features: Array, state: State) -> dict[str, Array]:
  """The cosine term and the use of the codes on held-out features f32[I, N, D]."""
  divisors = [n for n in range(1, EVALUATED_TOGETHER + 1) if len(features) % n == 0]
  pieces = features.reshape(-1, divisors[-1] * features.shape[1], program.features)

  def reconstruct_piece(x):
    quantized, cosine = reconstruct(program, state.params, state.book, x, quantizing, 1.0)
    return quantized.ids, cosine

  ids, cosine = jax.lax.map(reconstruct_piece, pieces)
  count = jnp.zeros(program.num_codes).at[ids.reshape(-1)].add(1)
  return {
    'heldout/cosine': 1 - cosine.mean(),
    'heldout/usage': 100 * (count > 0).mean(),
    'heldout/perplexity': codebook.perplexity(count),
  }
