"""A codebook of 16,384 codes: which training keeps it in use, and what does that cost?

    python benchmarks/codebook.py --workdir WORKDIR [--source data] [--variants ours fsq ...]
    python benchmarks/codebook.py --workdir WORKDIR --report --out docs/assets/codebook.svg

Quantizers train on patch features of the tiny checkpoint's frozen ViT, which are computed once. As
in the tokenizer stage, the features pass the quantizer's own projection, and a decoder (an MLP
without context) reconstructs them from the codes:

    loss = mean(1 - cos(x, reconstructed)) + commitment

There is no selector and no merger: every patch is a token, so that variants differ in nothing but
the quantizer. The first `--quantize_from` steps have no quantization, as in the stage.

WORKDIR/<variant>-seed<k>.jsonl gets a line every `--record_every` steps. `usage` (%) is the share
of codes that a token of the last 100 batches chose, `perplexity` that of moving averages with decay
0.99, whatever the variant; `heldout/...` are of all tokens of held-out images. The same command
continues a study that was interrupted, and skips what is finished.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import curves
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from quantizer_training import Program, State, draw_images, evaluate, init, start_codebook, train
from quantizers import code_width

from lavit_jax import Lavit
from lavit_jax.data.emoji import sprites
from lavit_jax.data.emoji.scenes import Composer
from lavit_jax.evaluation import tokens

TINY = pathlib.Path(__file__).parents[1] / 'lavit_jax' / 'assets' / 'tiny'
SCENE_SHARE = 0.3
SPLITS = {'train': 0, 'heldout': 1}  # and the seeds of their images
COLORS = (
  *('#1f77b4', '#ff7f0e', '#2ca02c', '#d62728', '#9467bd', '#8c564b'),
  *('#e377c2', '#7f7f7f', '#bcbd22', '#17becf', '#000000'),
)


class Variant(NamedTuple):
  """One way to train a codebook; the defaults are those of the tokenizer stage."""

  kind: str = 'ema'
  kmeans: bool = True
  revive_after: int = 100
  decay: float = 0.99
  width: int | None = None  # of the codes; None: --code_dim
  mean_commitment: bool = False  # over the width, in place of the sum


VARIANTS = {
  'ours': Variant(),
  'no_revival': Variant(revive_after=0),
  'no_kmeans': Variant(kmeans=False),
  'ema_only': Variant(kmeans=False, revive_after=0),
  'gradient': Variant('gradient', kmeans=False, revive_after=0),
  'fsq': Variant('fsq', kmeans=False, revive_after=0),
  'lfq': Variant('lfq', kmeans=False, revive_after=0),
  'decay_0.9': Variant(decay=0.9),
  'revive_20': Variant(revive_after=20),
  'width_8': Variant(width=8),
  'commitment_mean': Variant(mean_commitment=True),
}


# --- A study -------------------------------------------------------------------------------------


def patch_features(source: str, split: str, count: int) -> np.ndarray:
  """Features of composed images, without the class token, f32[count, N, D]."""
  model = Lavit.from_pretrained(TINY)
  composer = Composer(sprites.load(source), split, SCENE_SHARE, model.modules.image_size)
  images = np.stack([composer(SPLITS[split], index).image for index in range(count)])
  return tokens.features(model, images)


def cached_features(workdir: pathlib.Path, source: str, split: str, count: int) -> np.ndarray:
  """`patch_features`, computed only once."""
  path = workdir / f'features-{split}.npy'
  if not path.exists():
    unfinished = path.with_suffix(f'.unfinished-{os.getpid()}')
    with unfinished.open('wb') as file:
      np.save(file, patch_features(source, split, count))
    unfinished.rename(path)
  return np.load(path)


def save_state(path: pathlib.Path, state: State, seconds: float) -> None:
  """Replaces the file at once, so that an interrupted study finds the previous one."""
  unfinished = path.with_suffix('.unfinished')
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
  with unfinished.open('wb') as file:
    np.savez(file, *leaves, seconds=seconds)
  unfinished.rename(path)


def load_state(path: pathlib.Path, like: State) -> tuple[State, float]:
  """The inverse of `save_state`; `like` is any state of the same program."""
  with np.load(path) as arrays:
    leaves = [jnp.asarray(arrays[f'arr_{i}']) for i in range(len(arrays.files) - 1)]
    seconds = float(arrays['seconds'])
  return jax.tree.unflatten(jax.tree.structure(like), leaves), seconds


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
  """The complete lines of a JSONL file; none if there is no such file."""
  if not path.exists():
    return []
  lines = path.read_text().splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith('\n')]


def keep_records(path: pathlib.Path, last_step: int) -> None:
  """Removes the records of steps that a resumed study makes again."""
  records = [record for record in read_records(path) if record['step'] <= last_step]
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))


def make_program(args: argparse.Namespace, name: str, features: int) -> Program:
  """What a variant trains on features of a width.

  Raises:
    ValueError: it cannot have so many codes.
  """
  variant = VARIANTS[name]
  width = code_width(variant.kind, args.codes, variant.width or args.code_dim)
  return Program(variant.kind, args.codes, width, features, args.batch_size, args.steps)


def run_variant(args: argparse.Namespace, name: str, seed: int, data: Mapping[str, Array]) -> None:
  """Trains one variant from one seed, from where an interrupted study left it."""
  variant = VARIANTS[name]
  program = make_program(args, name, data['train'].shape[-1])
  commitment_weight = 1 / program.width if variant.mean_commitment else 1.0
  init_key, kmeans_key, key = jax.random.split(jax.random.key(seed), 3)
  state = init(program, init_key)
  seconds = 0.0
  checkpoint = args.workdir / f'{name}-seed{seed}.npz'
  log = args.workdir / f'{name}-seed{seed}.jsonl'
  if checkpoint.exists():
    state, seconds = load_state(checkpoint, state)
  first = int(state.step)
  keep_records(log, first)
  for step in range(first, args.steps, args.record_every):
    start = time.monotonic()
    images = draw_images(program, seed, len(data['train']), step, args.record_every)
    if step == args.quantize_from and state.book is not None:
      book = state.book._replace(started=jnp.ones([], bool))
      if variant.kmeans:
        book = start_codebook(program, kmeans_key, data['train'][images[0]], state)
      state = state._replace(book=jax.block_until_ready(book))
    quantizing = step >= args.quantize_from
    steps_start = time.monotonic()
    state, metrics = train(
      program,
      variant.revive_after,
      variant.decay,
      commitment_weight,
      quantizing,
      key,
      data['train'],
      images,
      state,
    )
    jax.block_until_ready(state)
    milliseconds = 1000 * (time.monotonic() - steps_start) / args.record_every
    done = step + args.record_every
    due = done % args.evaluate_every == 0 or done == args.steps
    if due:
      metrics |= evaluate(program, quantizing, data['heldout'], state)
    values = {metric: float(value) for metric, value in metrics.items()}
    if not quantizing:  # no code is in use
      values = {metric: value for metric, value in values.items() if metric.endswith('cosine')}
    seconds += time.monotonic() - start
    record = dict(step=done, seconds=seconds, milliseconds_per_step=milliseconds, **values)
    with log.open('a') as file:
      file.write(json.dumps(record) + '\n')
    print(name, seed, json.dumps(record), flush=True)
    if due:
      save_state(checkpoint, state, seconds)


def check_settings(args: argparse.Namespace) -> None:
  """Writes the options that all runs of a folder share, or compares them with those before.

  Raises:
    ValueError: they differ, or do not go together.
  """
  for name in ('steps', 'quantize_from', 'evaluate_every'):
    if getattr(args, name) % args.record_every:
      raise ValueError(f'--{name} must be a multiple of --record_every {args.record_every}')
  if args.batch_size > args.train_images:
    raise ValueError(f'--batch_size {args.batch_size} is more than --train_images')
  for name in args.variants:
    make_program(args, name, 0)
  names = (
    *('source', 'codes', 'code_dim', 'batch_size', 'steps', 'quantize_from', 'record_every'),
    *('evaluate_every', 'train_images', 'heldout_images'),
  )
  settings = {name: getattr(args, name) for name in names}
  path = args.workdir / 'settings.json'
  if not path.exists():
    path.write_text(json.dumps(settings, indent=1) + '\n')
  earlier = json.loads(path.read_text())
  if earlier != settings:
    raise ValueError(f'{path} has other options: {earlier}; use another --workdir')


# --- The report ----------------------------------------------------------------------------------


def mean_points(runs: Sequence[Sequence[dict]], key: str) -> curves.Points:
  """The curve of a variant: the mean of its seeds at each step that all of them have."""
  values = [dict(curves.series(records, key)) for records in runs]
  steps = set(values[0]).intersection(*values[1:])
  return [(step, statistics.mean(by_step[step] for by_step in values)) for step in sorted(steps)]


def report(workdir: pathlib.Path, names: Sequence[str]) -> tuple[str, str]:
  """A Markdown table of the last values, and the curves as SVG."""
  columns = {
    'usage, %': ('usage', '.1f'),
    'perplexity': ('perplexity', ',.0f'),
    '1 - cosine': ('cosine', '.4f'),
    'held-out usage, %': ('heldout/usage', '.1f'),
    'held-out perplexity': ('heldout/perplexity', ',.0f'),
    'held-out 1 - cosine': ('heldout/cosine', '.4f'),
  }
  rows = [
    f'| variant | seeds | steps | {" | ".join(columns)} | ms per step |',
    f'|---|{"---|" * (3 + len(columns))}',
  ]
  panels = {
    'usage': 'codes in use, %',
    'perplexity': 'perplexity',
    'heldout/cosine': 'held-out 1 - cosine',
  }
  lines = {key: [] for key in panels}
  colors = {}
  for color, name in zip(COLORS, VARIANTS):
    runs = [read_records(path) for path in sorted(workdir.glob(f'{name}-seed*.jsonl'))]
    runs = [records for records in runs if records]
    if name not in names or not runs:
      continue
    cells = [name, str(len(runs)), str(min(records[-1]['step'] for records in runs))]
    for key, form in columns.values():
      points = mean_points(runs, key)
      cells.append(format(points[-1][1], form) if points else '')
    times = [record['milliseconds_per_step'] for records in runs for record in records]
    cells.append(f'{statistics.median(times):.0f}')
    rows.append(f'| {" | ".join(cells)} |')
    colors[name] = color
    for key in panels:
      points = mean_points(runs, key)
      if points:
        lines[key].append((color, points, []))
  plots = [curves.panel(title, lines[key]) for key, title in panels.items() if lines[key]]
  return '\n'.join(rows), curves.grid([*plots, curves.legend(colors)])


def main(argv: Sequence[str] | None = None) -> None:
  """Trains what is not finished, or reports."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--source', default='embedded', help="data_dir of the emoji, or 'embedded'")
  parser.add_argument('--variants', nargs='+', choices=VARIANTS, default=list(VARIANTS))
  parser.add_argument('--seeds', nargs='+', type=int, default=[0])
  parser.add_argument('--steps', type=int, default=2000)
  parser.add_argument('--batch_size', type=int, default=256, help='images')
  parser.add_argument('--codes', type=int, default=16384)
  parser.add_argument('--code_dim', type=int, default=32)
  parser.add_argument('--quantize_from', type=int, default=100, help='step')
  parser.add_argument('--record_every', type=int, default=50, help='steps')
  parser.add_argument('--evaluate_every', type=int, default=250, help='steps; saves the state, too')
  parser.add_argument('--train_images', type=int, default=8192)
  parser.add_argument('--heldout_images', type=int, default=1000)
  parser.add_argument('--report', action='store_true', help='of what is there, without training')
  parser.add_argument('--out', type=pathlib.Path, help='SVG file of the report')
  args = parser.parse_args(argv)
  if args.report:
    table, figure = report(args.workdir, args.variants)
    print(table)
    if args.out:
      args.out.write_text(figure)
    return
  args.workdir.mkdir(parents=True, exist_ok=True)
  try:
    check_settings(args)
  except ValueError as error:
    parser.error(str(error))
  counts = {'train': args.train_images, 'heldout': args.heldout_images}
  data = {}
  for split, count in counts.items():
    data[split] = jnp.asarray(cached_features(args.workdir, args.source, split, count))
  for seed in args.seeds:
    for name in args.variants:
      run_variant(args, name, seed, data)


if __name__ == '__main__':
  main()
