"""Packed rows beside one pair in a row: the share of useful tokens, and useful tokens per second.

    python benchmarks/packing.py [--source data] [--json FILE]

There are two distributions of visual tokens, each with captions: those that the tiny checkpoint
keeps of training images, and a synthetic one of 256 patches, with mean 85 (rho 1/3) and standard
deviation 25. A step is the forward and the backward pass of the language model; packed and padded
steps run in turn.

`pieces` is about the synthetic pairs, as many as a chip of v5e:16x16 has in a batch of
configs/lm.py:lavit_7b. It gives the share of pairs that do not fit in its rows of 2,048 (`lost`)
and the share of slots that hold a token (`filled`), for packing all pairs at once or in the pieces
of `accumulate`.

On a CPU attention computes whole rows, which favors the short padded ones; TPUs skip what is masked
(models/attention_kernels.py).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax import Lavit
from lavit_jax.data.emoji import corpus
from lavit_jax.evaluation.report import stack_images
from lavit_jax.models.llama import Llama
from lavit_jax.models.packing import assign_rows, pack_pairs
from lavit_jax.models.vocabulary import Vocabulary

ASSETS = pathlib.Path(__file__).parents[1] / 'lavit_jax' / 'assets' / 'tiny'
ROUNDS = 5
FILL = 0.94  # share of the rows that pairs of mean length take
PIECES = ((136, 8), (68, 4), (34, 2), (17, 1))  # (pairs, rows that they share)
PACKED_BATCHES = 2000  # of 136 pairs
VOCABULARY = Vocabulary(2048, 1024)
MARKERS = 3  # tokens of a pair besides its text and codes


class Pairs(NamedTuple):
  """B pairs, as `pack_pairs` takes them.

  Attributes:
    text: i32[B, T], padded.
    text_length: i32[B].
    visual_length: i32[B], the number of codes of each pair.
    capacity: the largest number of codes.
  """

  text: np.ndarray
  text_length: np.ndarray
  visual_length: np.ndarray
  capacity: int

  def lengths(self) -> np.ndarray:
    """The number of tokens of each pair, i32[B]."""
    return self.text_length + self.visual_length + MARKERS


def tiny_pairs(source: str, count: int) -> Pairs:
  """Training examples with the numbers of tokens that the tiny checkpoint keeps."""
  model = Lavit.from_pretrained(ASSETS)
  examples = corpus.examples(source, 'train', 0, count)
  texts = [model.tokenizer.encode(example.caption) for example in examples]
  return make_pairs(texts, model.tokenize(stack_images(examples)).counts, 64, 48)


def synthetic_pairs(count: int) -> Pairs:
  """Pairs with captions of 8 to 36 tokens, the lengths of published captions."""
  rng = np.random.default_rng(0)
  visual_length = np.clip(np.round(rng.normal(85, 25, count)), 1, 256).astype(np.int32)
  texts = [rng.integers(3, 2000, rng.integers(8, 37)) for _ in range(count)]
  return make_pairs(texts, visual_length, 256, 48)


def make_pairs(
  texts: Sequence[Any], visual_length: np.ndarray, capacity: int, text_capacity: int
) -> Pairs:
  """Pads the texts."""
  padded = np.zeros((len(texts), text_capacity), np.int32)
  for row, text in zip(padded, texts):
    row[: len(text)] = text
  text_length = np.array([len(text) for text in texts], np.int32)
  return Pairs(padded, text_length, np.asarray(visual_length, np.int32), capacity)


def measure_pieces(count: int, num_rows: int, row_length: int = 2048) -> dict[str, float]:
  """`lost` and `filled` of synthetic pairs, with `count` of them in every `num_rows` rows."""
  lengths = synthetic_pairs(PACKED_BATCHES * PIECES[0][0]).lengths().reshape(-1, count)
  rows, _ = jax.vmap(lambda lengths: assign_rows(lengths, num_rows, row_length))(lengths)
  lost = np.asarray(rows == num_rows)
  slots = len(lengths) * num_rows * row_length
  return {'lost': float(lost.mean()), 'filled': float(lengths[~lost].sum() / slots)}


def measure(pairs: Pairs, row_length: int, width: int) -> dict[str, float]:
  """Both layouts of the same pairs, timed in turn: medians of `ROUNDS`."""
  count = len(pairs.text)
  useful = int(pairs.lengths().sum())
  num_rows = -(-useful // int(FILL * row_length))
  padded_length = pairs.text.shape[1] + pairs.capacity + MARKERS
  llama = Llama(VOCABULARY.size, width, 4, 4, 4, width // 4, 3 * width)
  ids = jnp.zeros((1, 8), jnp.int32)
  params = llama.init(
    jax.random.key(0), ids, method=lambda module, ids: module(module.embed(ids), ids, ids)
  )
  inputs = (
    pairs.text,
    pairs.text_length,
    np.ones(pairs.text.shape, np.float32),
    np.arange(count, dtype=np.int32) % 2,
    np.zeros((count, pairs.capacity), np.int32),
    pairs.visual_length,
  )
  steps = {
    'packed': packed_step(llama, num_rows, row_length),
    'padded': padded_step(llama, padded_length),
  }
  losses = {}
  for name, step in steps.items():
    values, _ = step(params, *inputs)
    losses[name] = jax.device_get(values)
  seconds = {name: [] for name in steps}
  for _ in range(ROUNDS):
    for name, step in steps.items():
      start = time.monotonic()
      jax.block_until_ready(step(params, *inputs))
      seconds[name].append(time.monotonic() - start)
  packed_loss, overflow = losses['packed']
  padded_loss, _ = losses['padded']
  packed_speed = useful / statistics.median(seconds['packed'])
  padded_speed = useful / statistics.median(seconds['padded'])
  return {
    'mean_visual': float(pairs.visual_length.mean()),
    'mean_length': useful / count,
    'overflow': int(overflow),
    'loss_difference': float(abs(packed_loss - padded_loss)),
    'useful_packed': useful / (num_rows * row_length),
    'useful_padded': useful / (count * padded_length),
    'tokens_per_second_packed': round(packed_speed),
    'tokens_per_second_padded': round(padded_speed),
    'speedup': packed_speed / padded_speed,
  }


def packed_step(llama: Llama, num_rows: int, row_length: int) -> Callable:
  """A train step without an update: ((loss, pairs that did not fit), gradients)."""

  @jax.jit
  def step(params, *pairs):
    rows = pack_pairs(*pairs, VOCABULARY, num_rows=num_rows, row_length=row_length)
    return jax.value_and_grad(loss, argnums=1, has_aux=True)(llama, params, rows)

  return step


def padded_step(llama: Llama, row_length: int) -> Callable:
  """As `packed_step`, with one pair in each row."""

  def pack_one(*pair):
    batch = [x[None] for x in pair]
    return pack_pairs(*batch, VOCABULARY, num_rows=1, row_length=row_length)

  @jax.jit
  def step(params, *pairs):
    rows = jax.vmap(pack_one)(*pairs)
    rows = jax.tree.map(lambda x: x[:, 0] if x.ndim == 3 else x, rows)
    return jax.value_and_grad(loss, argnums=1, has_aux=True)(llama, params, rows)

  return step


def loss(llama: Llama, params, rows) -> tuple[jax.Array, jax.Array]:
  """The weighted mean loss of rows, and the number of pairs that did not fit."""
  embeddings = llama.apply(params, rows.ids, method='embed')
  hidden, _ = llama.apply(params, embeddings, rows.positions, rows.segments)
  logits = llama.apply(params, hidden, method='logits')
  target_logits = jnp.take_along_axis(logits, rows.targets[..., None], -1)[..., 0]
  nll = jax.nn.logsumexp(logits, -1) - target_logits
  return (nll * rows.weights).sum() / rows.weights.sum(), rows.overflow.sum()


def main() -> None:
  """Measures and prints JSON."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--source', default='embedded', help='data set of the tiny distribution')
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args()
  pieces = {}
  for count, num_rows in PIECES:
    pieces[f'{count} pairs to {num_rows} rows'] = measure_pieces(count, num_rows)
  result = {
    'tiny': measure(tiny_pairs(args.source, 128), 256, 160),
    'mean_85': measure(synthetic_pairs(160), 1024, 160),
    'pieces': pieces,
  }
  print(json.dumps(result, indent=1))
  if args.json:
    args.json.write_text(json.dumps(result) + '\n')


if __name__ == '__main__':
  main()
