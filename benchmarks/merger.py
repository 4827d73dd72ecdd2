"""The merger's kept rows in a bucket beside all rows; tokenizing beside PyTorch.

    python benchmarks/merger.py [--repeats 5] [--json FILE]
    python benchmarks/merger.py --checkpoint lavit_jax/assets/tiny --count 192

The first times, in turn, on eight images of 224 pixels, of which a third of the patches is kept:

merger: the merger of the variant `small`, all rows and in a bucket.
tokenize: images to codes by `small`: all rows, in a bucket, and before (all rows, the nearest code
    by `argmin`); and by the published modules in PyTorch (eager, float32, all cores).
codes: the nearest codes of the tokens, by `nearest_code` and by `argmin`.

The weights are random. Compilation is left out. Numbers are medians.

The second measures, on a trained model, whether a bucket is as good: for each held-out image alone,
how much of the attention is due to eps, and how far the kept rows are from those among all rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from lavit_jax import Lavit
from lavit_jax.data.emoji import corpus
from lavit_jax.evaluation import tokens
from lavit_jax.models import lavit, quantizer
from lavit_jax.models.merger import MAX_EFFECT, SAMPLE_DIVISOR, Merger
from lavit_jax.models.quantizer import l2_normalize, nearest_code

IMAGES = 8
KEPT = 1 / 3
LIMITS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


class Seconds(NamedTuple):
  """Medians over the calls of a function.

  Attributes:
    wall: seconds that passed.
    cpu: seconds of all cores; on a busy machine they are the better measure.
  """

  wall: float
  cpu: float


def time_in_turn(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Seconds]:
  """Times functions in turn, after a first call of each."""
  for function in functions.values():
    function()
  times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
  for _ in range(repeats):
    for name, function in functions.items():
      start = (time.monotonic(), time.process_time())
      function()
      times[name].append((time.monotonic() - start[0], time.process_time() - start[1]))
  medians = {}
  for name, calls in times.items():
    wall, cpu = zip(*calls, strict=True)
    medians[name] = Seconds(statistics.median(wall), statistics.median(cpu))
  return medians


def nearest_by_argmin(z: jax.Array, codebook: jax.Array) -> jax.Array:
  """What `nearest_code` computes, i32[...], by `argmin` over blocks of 2,048 codes, as it once did.

  Args:
    z: f32[..., C].
    codebook: f32[K, C], K a multiple of 2,048.
  """

  def compare(nearest, inputs):
    least_distance, ids = nearest
    start, codes = inputs
    product = jnp.matmul(z, codes.T, precision=jax.lax.Precision.HIGHEST)
    distance = jnp.square(codes).sum(-1) - 2 * product
    least = distance.min(-1)
    closer = least < least_distance
    ids = jnp.where(closer, start + distance.argmin(-1), ids)
    return (jnp.where(closer, least, least_distance), ids), None

  starts = jnp.arange(0, len(codebook), 2048, dtype=jnp.int32)
  none = (jnp.full(z.shape[:-1], jnp.inf), jnp.zeros(z.shape[:-1], jnp.int32))
  blocks = codebook.reshape(-1, 2048, codebook.shape[-1])
  (_, ids), _ = jax.lax.scan(compare, none, (starts, blocks))
  return ids


def time_variant(repeats: int) -> dict[str, Any]:
  """Times the parts of `small`, and compares what they compute."""
  import ours  # noqa: PLC0415  the other mode of this script needs no PyTorch
  import peers  # noqa: PLC0415

  modules = {'all': lavit.build('small', merger_capacities=()), 'bucket': lavit.build('small')}
  small = modules['bucket']
  params = ours.module_params('tokenizer', ours.tokenizer_rules())
  rng = np.random.default_rng(0)
  shape = (IMAGES, small.image_size, small.image_size, 3)
  images = rng.integers(0, 256, shape, np.uint8)
  x = ours.patch_features(images)
  third = np.arange(small.num_patches) < KEPT * small.num_patches
  keep = np.stack([rng.permutation(third) for _ in range(IMAGES)]).astype(np.float32)
  vectors = rng.normal(size=(x.shape[0] * x.shape[1], small.tokenizer.code_dim))
  z = l2_normalize(jnp.asarray(vectors))
  codebook = params['quantizer']['embedding']

  functions: dict[str, Callable[[], Any]] = {}
  for name, module in modules.items():
    merge = jax.jit(functools.partial(module.tokenizer.apply, method='merge_counted'))
    functions[f'merger_{name}'] = lambda merge=merge: jax.block_until_ready(
      merge({'params': params}, x, keep)
    )
    functions[f'tokenize_{name}'] = ours.tokenizing(images, module)
  # Another name, so that the program is compiled apart, with the search as it was.
  before = dataclasses.replace(modules['all'], variant='before')
  functions['tokenize_before'] = ours.tokenizing(images, before)
  with mock.patch.object(quantizer, 'nearest_code', nearest_by_argmin):
    functions['tokenize_before']()
  functions['tokenize_torch'] = peers.tokenizing(small.vit, small.tokenizer, images)
  for name, search in (('codes_argmin', nearest_by_argmin), ('codes', nearest_code)):
    search = jax.jit(search)
    functions[name] = lambda search=search: jax.block_until_ready(search(z, codebook))

  seconds = time_in_turn(functions, repeats)
  rows = {name: functions[f'merger_{name}']() for name in modules}
  kept = keep > 0.5
  results = {name: functions[f'tokenize_{name}']() for name in (*modules, 'before', 'torch')}
  ids, chosen = results['bucket']
  pairs = {
    'merger': ('merger_all', 'merger_bucket'),
    'tokenize': ('tokenize_all', 'tokenize_bucket'),
    'tokenize_in_total': ('tokenize_before', 'tokenize_bucket'),
    'tokenize_beside_torch': ('tokenize_torch', 'tokenize_bucket'),
    'codes': ('codes_argmin', 'codes'),
  }
  ratios = {}
  for name, (slow, fast) in pairs.items():
    for kind in Seconds._fields:
      ratios[f'{name}_{kind}'] = getattr(seconds[slow], kind) / getattr(seconds[fast], kind)
  return {
    'ratios': ratios,
    'seconds': seconds,
    'in_bucket': float(rows['bucket'].in_bucket),
    'max_difference': float(jnp.abs(rows['bucket'].rows - rows['all'].rows)[kept].max()),
    'kept': float(chosen.mean()),
    'same_keep': float(np.mean([np.array_equal(chosen, k) for _, k in results.values()])),
    'same_codes': [float((ids == other)[chosen].mean()) for other, _ in results.values()],
    'load': os.getloadavg()[0],
  }


def measure_checkpoint(folder: str, source: str, count: int) -> dict[str, Any]:
  """Compares kept rows in a bucket with those among all rows, by both mergers of a checkpoint."""
  model = Lavit.from_pretrained(folder)
  examples = corpus.examples(source, 'heldout/pair', 0, count)
  images = [np.asarray(example.image) for example in examples]
  x = tokens.features(model, np.stack(images))
  keep = np.asarray(model.tokenize(images, seed=0).keep, np.float32)
  return {name: measure_merger(model, name, x, keep) for name in ('tokenizer', 'understanding')}


def measure_merger(model: Lavit, name: str, x: np.ndarray, keep: np.ndarray) -> dict[str, Any]:
  """The same for the merger of a module."""
  base = model.modules.tokenizer
  module = Merger(base.hidden_size, base.num_layers, base.num_heads, base.mlp_dim)
  params = {'params': model.params[name]['merger']}
  num_patches = x.shape[1]
  capacities = (7 * num_patches // 16, 11 * num_patches // 16)
  apply = jax.jit(module.apply, static_argnames=('method', 'capacity'))
  effects = []
  differences = []
  for features, mask in zip(x, keep, strict=True):
    rooms = [c for c in capacities if mask.sum() <= c - c // SAMPLE_DIVISOR]
    if not rooms:
      continue
    inputs = (params, features[None], mask[None])
    rows, effect = apply(*inputs, capacity=rooms[0], method='merge_bucket')
    all_rows = apply(*inputs, method='merge_all')
    effects.append(float(effect))
    differences.append(float(np.abs(rows - all_rows)[0, mask > 0.5].max()))
  passes = np.array(effects) <= MAX_EFFECT
  errors = np.array(differences)
  return {
    'images': len(x),
    'with_room': len(effects) / len(x),
    'effect_at_most': {limit: float(np.mean(np.array(effects) <= limit)) for limit in LIMITS},
    'in_bucket': float(passes.mean()),
    'max_difference_in_bucket': float(errors[passes].max(initial=0)),
    'max_difference_of_others': float(errors[~passes].max(initial=0)),
  }


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--checkpoint', help='measure a trained model instead of times')
  parser.add_argument('--source', default='embedded', help='of the images, as in `lavit evaluate`')
  parser.add_argument('--count', type=int, default=192, help='images')
  parser.add_argument('--json', metavar='FILE', help='write all numbers to FILE')
  args = parser.parse_args()
  if args.checkpoint:
    results = measure_checkpoint(args.checkpoint, args.source, args.count)
  else:
    results = time_variant(args.repeats)
  for name, values in results.items():
    print(name, json.dumps(values), flush=True)
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(results) + '\n')


if __name__ == '__main__':
  main()
