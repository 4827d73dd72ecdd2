"""Packing on the device beside one pair a row: the share of computed tokens that are useful, and useful tokens a second.

    python benchmarks/packing.py [--source data] [--json FILE]

Two distributions of visual tokens, each with captions for text: those that the tiny checkpoint keeps of training pictures, and
a made one of 256 patches, mean 85 (rho 1/3) and standard deviation 25. The step is the language model's forward and backward;
packed and padded run in turn. `page`: of the made pairs, as many as a chip of v5e:16x16 has of a batch of configs/lm.py:lavit_7b, the share
that finds no room in its rows of 2,048 (`lost`) and of the slots that hold a token (`filled`), if it packs them all at once or in the pieces
of `accumulate`. On a CPU attention computes whole rows, which favours the short padded ones; TPUs skip what is masked (models/attention_kernels.py).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax import Lavit
from lavit_jax.data.emoji import corpus
from lavit_jax.evaluation.report import stack_images
from lavit_jax.models.llama import Llama
from lavit_jax.models.sequence import assign_rows, pack_pairs
from lavit_jax.models.vocabulary import Vocabulary

ASSETS = pathlib.Path(__file__).parents[1] / 'lavit_jax' / 'assets' / 'tiny'
ROUNDS = 5
FILL = 0.94  # of the rows, that the mean pairs are to take
PIECES = ((136, 8), (68, 4), (34, 2), (17, 1))  # pairs and the rows that they share
PACKED_BATCHES = 2000  # of 136 pairs


class Pairs(NamedTuple):
  """B pairs as `pack` takes them; `visual_length` i32[B] of at most `capacity` codes."""

  text: np.ndarray
  text_length: np.ndarray
  visual_length: np.ndarray
  capacity: int


def tiny_pairs(source: str, count: int) -> Pairs:
  model = Lavit.from_pretrained(ASSETS)
  examples = corpus.examples(source, 'train', 0, count)
  return captioned(
    [model.tokenizer.encode(example.caption) for example in examples],
    model.tokenize(stack_images(examples)).counts,
    64,
    48,
  )


def made_pairs(count: int) -> Pairs:
  """Captions of 8 to 36 tokens, as published captions are asked for."""
  rng = np.random.default_rng(0)
  visual = np.clip(np.round(rng.normal(85, 25, count)), 1, 256).astype(np.int32)
  return captioned(
    [rng.integers(3, 2000, rng.integers(8, 37)) for _ in range(count)], visual, 256, 48
  )


def captioned(texts, visual, capacity: int, text_length: int) -> Pairs:
  padded = np.zeros((len(texts), text_length), np.int32)
  for row, text in zip(padded, texts):
    row[: len(text)] = text
  return Pairs(
    padded,
    np.array([len(text) for text in texts], np.int32),
    np.asarray(visual, np.int32),
    capacity,
  )


def page(count: int, num_rows: int, row_length: int = 2048) -> dict[str, float]:
  """`lost` and `filled` of the made pairs, where every `count` of them are packed into `num_rows` rows."""
  pairs = made_pairs(PACKED_BATCHES * PIECES[0][0])
  lengths = (pairs.text_length + pairs.visual_length + 3).reshape(-1, count)
  row, _ = jax.vmap(lambda lengths: assign_rows(lengths, num_rows, row_length))(lengths)
  out = np.asarray(row == num_rows)
  return dict(
    lost=float(out.mean()),
    filled=float(lengths[~out].sum() / (len(lengths) * num_rows * row_length)),
  )


def measure(pairs: Pairs, row_length: int, width: int) -> dict[str, float]:
  """Both ways of laying out the same pairs, timed in turn: medians of `ROUNDS`."""
  vocabulary, count = Vocabulary(2048, 1024), len(pairs.text)
  llama = Llama(vocabulary.size, width, 4, 4, 4, width // 4, 3 * width)
  params = llama.init(
    jax.random.key(0), jnp.zeros((1, 8), jnp.int32), method=lambda m, ids: m(m.embed(ids), ids, ids)
  )
  useful = int((pairs.text_length + pairs.visual_length + 3).sum())
  num_rows = -(-useful // int(FILL * row_length))
  padded_length = pairs.text.shape[1] + pairs.capacity + 3
  inputs = (
    pairs.text,
    pairs.text_length,
    np.ones(pairs.text.shape, np.float32),
    np.arange(count, dtype=np.int32) % 2,
    np.zeros((count, pairs.capacity), np.int32),
    pairs.visual_length,
  )

  def loss(params, rows):
    hidden, _ = llama.apply(
      params, llama.apply(params, rows.ids, method='embed'), rows.positions, rows.segments
    )
    logits = llama.apply(params, hidden, method='logits')
    nll = (
      jax.nn.logsumexp(logits, -1)
      - jnp.take_along_axis(logits, rows.targets[..., None], -1)[..., 0]
    )
    return (nll * rows.weights).sum() / rows.weights.sum(), rows.overflow.sum()

  def packed(params, *pairs):
    return jax.value_and_grad(loss, has_aux=True)(
      params, pack_pairs(*pairs, vocabulary, num_rows=num_rows, row_length=row_length)
    )

  def one_a_row(params, *pairs):
    rows = jax.vmap(
      lambda *pair: pack_pairs(
        *(x[None] for x in pair), vocabulary, num_rows=1, row_length=padded_length
      )
    )(*pairs)
    return jax.value_and_grad(loss, has_aux=True)(
      params, jax.tree.map(lambda x: x[:, 0] if x.ndim == 3 else x, rows)
    )

  steps = {'packed': jax.jit(packed), 'padded': jax.jit(one_a_row)}
  values = {name: jax.device_get(step(params, *inputs)[0]) for name, step in steps.items()}
  seconds = {name: [] for name in steps}
  for _ in range(ROUNDS):
    for name, step in steps.items():
      start = time.monotonic()
      jax.block_until_ready(step(params, *inputs))
      seconds[name].append(time.monotonic() - start)
  speed = {name: useful / statistics.median(times) for name, times in seconds.items()}
  return dict(
    mean_visual=float(pairs.visual_length.mean()),
    mean_length=useful / count,
    overflow=int(values['packed'][1]),
    loss_difference=float(abs(values['packed'][0] - values['padded'][0])),
    useful_packed=useful / (num_rows * row_length),
    useful_padded=useful / (count * padded_length),
    tokens_per_second_packed=round(speed['packed']),
    tokens_per_second_padded=round(speed['padded']),
    speedup=speed['packed'] / speed['padded'],
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--source', default='embedded', help='the data set of the tiny distribution')
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args()
  result = dict(
    tiny=measure(tiny_pairs(args.source, 128), 256, 160),
    mean_85=measure(made_pairs(160), 1024, 160),
    page={f'{count} pairs to {rows} rows': page(count, rows) for count, rows in PIECES},
  )
  print(json.dumps(result, indent=1))
  if args.json:
    args.json.write_text(json.dumps(result) + '\n')


if __name__ == '__main__':
  main()
