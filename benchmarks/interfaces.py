"""Compares the interfaces between images and the language model at equal compute.

RESULTS=docs/assets/interfaces.jsonl
FROZEN=runs/encoder/export,runs/tokenizer/export
python benchmarks/interfaces.py $RESULTS --workdir runs/interfaces --source data --frozen $FROZEN
python benchmarks/interfaces.py $RESULTS --report --out docs/assets/interfaces.svg

All systems read the same frozen image encoder and learn captions and answers of the same images, in
the same order, from the same language model, which has read the training texts without images. What
each of them may spend is a number of floating-point operations (training/flops.py), and so the
number of steps differs. The language model trains along, or is frozen. The study can be stopped at
any time; the same command continues it. The results file gets a line for each finished run, which
is not repeated: several machines can add to it.

A run is measured by its captions and answers of new images of the training sprites, and of held-out
drawings of concepts that were seen (split 'heldout/pair').
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import curves
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lavit_jax import Lavit
from lavit_jax.data.emoji import corpus, sprites
from lavit_jax.evaluation import captions, vqa
from lavit_jax.evaluation.report import stack_images
from lavit_jax.training import flops
from lavit_jax.training.config import load_config
from lavit_jax.training.run import Run, resolve
from lavit_jax.weights.store.folder import load_params, save_params

CONFIG = 'configs/lm.py:tiny'
COLORS = {  # of each system's lines
  'lavit': '#1f77b4',
  'linear': '#7f7f7f',
  'mlp': '#bcbd22',
  'resampler': '#2ca02c',
  'flamingo': '#9467bd',
  'qformer': '#d62728',
  'emu': '#ff7f0e',
}
# Nothing is drawn here, which changes how long a mean pair is: LaVIT's are longer than the config
# says, and Emu's as long as the Q-Former's.
OWN_OPTIONS = {'lavit': ('lm.mean_length=53',), 'emu': ('lm.mean_length=48',)}
LANGUAGE_MODELS: dict[str, tuple[str, ...]] = {
  'trained': (),
  'frozen': ("optim.freeze=('^llama/',)",),
}
TEXT_STEPS = 600  # of the language model that all begin with
TEXT_EXAMPLES = 100_000  # composed images whose texts it reads
SHARES = {'caption': 0.68, 'answer': 0.3, 'draw': 0.0, 'text': 0.02}  # not all systems draw
SPLITS = {'train': 'new images', 'heldout/pair': 'unseen drawings'}
NEW_IMAGES_SEED = 1 << 40  # runs have small seeds
HELDOUT_MEASURE = 'heldout/accuracy_image_to_text'
COLUMNS = (  # measure, head, digits
  ('tokens', 'tokens per image', 1),
  ('steps', 'steps', 0),
  ('train/category', 'category, new images, %', 1),
  ('train/name', 'name, new images, %', 1),
  ('train/answers', 'answers, new images, %', 1),
  ('heldout/pair/category', 'category, unseen drawings, %', 1),
  ('heldout/pair/name', 'name, unseen drawings, %', 1),
  ('heldout/pair/answers', 'answers, unseen drawings, %', 1),
)


def main() -> None:
  """Trains and measures what is missing, or prints the report."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('results', type=pathlib.Path, help='JSON lines, one for each finished run')
  parser.add_argument('--workdir', type=pathlib.Path, help='work directories of the trainings')
  parser.add_argument('--frozen', help='checkpoints with the ViT and the tokenizer, A,B')
  parser.add_argument('--source', default='data', help="data_dir of the emoji, or 'embedded'")
  parser.add_argument('--systems', default=','.join(COLORS), help='in their order')
  parser.add_argument('--language-models', default=','.join(LANGUAGE_MODELS))
  parser.add_argument('--seeds', default='0,1,2')
  parser.add_argument('--flops', type=float, default=1e13, help='operations of each training')
  parser.add_argument('--images', type=int, default=256, help='measured ones of each split')
  parser.add_argument('--report', action='store_true', help='print the table and draw the figure')
  parser.add_argument('--out', type=pathlib.Path, help='SVG file')
  args = parser.parse_args()
  if args.report:
    results = read_results(args.results)
    if not results:
      parser.error(f'{args.results} has no finished run')
    print(table(results))
    if args.out:
      args.out.write_text(figure(results))
    return
  systems = args.systems.split(',')
  unknown = [name for name in systems if name not in COLORS]
  if unknown:
    parser.error(f'unknown systems: {", ".join(unknown)}')
  if not (args.workdir and args.frozen):
    parser.error('--workdir and --frozen are needed to train')
  for mode in args.language_models.split(','):
    for seed in args.seeds.split(','):
      for system in systems:
        study(args, system, mode, int(seed))


# --- Training ------------------------------------------------------------------------------------


def train(args: argparse.Namespace, workdir: pathlib.Path, options: Sequence[str]) -> Run:
  """Trains, or continues to train, in a work directory; returns its run."""
  lavit_command = pathlib.Path(sys.executable).with_name('lavit')
  command = [str(lavit_command), 'train', '--config', CONFIG, '--workdir', str(workdir)]
  command += ['--compilation-cache', str(args.workdir / 'compiled')]
  subprocess.run([*command, *(f'--config.{option}' for option in options)], check=True)
  return resolve_options(options, workdir)


def resolve_options(options: Sequence[str], workdir: pathlib.Path) -> Run:
  """The run of options 'KEY=VALUE' of the config."""
  overrides = []
  for option in options:
    key, value = option.split('=', 1)
    overrides.append((key, value))
  return resolve(load_config(CONFIG, overrides), workdir)


def language_model(args: argparse.Namespace) -> pathlib.Path:
  """A language model that has read the training texts, but has seen no image."""
  workdir = args.workdir / 'texts'
  folder = workdir / 'llama'  # the export without its interface
  if folder.exists():
    return folder
  workdir.mkdir(parents=True, exist_ok=True)
  texts = workdir / 'texts.parquet'
  if not texts.exists():
    lines = list(corpus.training_texts(args.source, TEXT_EXAMPLES, NEW_IMAGES_SEED + 1))
    np.random.default_rng(0).shuffle(lines)
    unfinished = workdir / 'texts.tmp'
    pq.write_table(pa.table({'text': lines}), unfinished, row_group_size=len(lines) // 16)
    unfinished.rename(texts)
  options = (
    'interface=linear',  # without use here; it needs no tokenizer
    f'frozen={args.frozen}',
    f"data.sources=({{'format': 'parquet', 'path': '{texts}', 'use': 'text'}},)",
    f'num_steps={TEXT_STEPS}',
    'batch_size=128',
    'lm.num_rows=10',
    'lm.mean_length=18',
    'eval_every=0',
    'picture_every=0',
  )
  train(args, workdir, options)
  save_params(folder, 'tiny', load_params(workdir / 'export', ['llama']))
  return folder


def study(args: argparse.Namespace, system: str, mode: str, seed: int) -> None:
  """Trains and measures one run, as far as that is missing."""
  name = {'system': system, 'language_model': mode, 'seed': seed}
  if any(name.items() <= result.items() for result in read_results(args.results)):
    return
  workdir = args.workdir / f'{system}-{mode}-{seed}'
  options = [
    f'interface={system}',
    f'frozen={args.frozen}',
    f'init_from={language_model(args)}',
    f'data.source={args.source}',
    *(f'data.shares.{use}={share}' for use, share in SHARES.items()),
    f'seed={seed}',
    'picture_every=0',
    *LANGUAGE_MODELS[mode],
    *OWN_OPTIONS.get(system, ()),
  ]
  run = resolve_options(options, workdir)
  step = flops.step_flops(run).at(flops.expected_share(run))
  steps = max(1, round(args.flops / step))
  every = max(1, steps // 8)
  options += [f'num_steps={steps}', f'optim.warmup_steps={steps // 10}']
  options += [f'eval_every={every}', 'eval_batches=4']
  run = train(args, workdir, options)
  records = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  curve = [(at, round(value, 4)) for at, value in curves.series(records, HELDOUT_MEASURE)]
  costs = {'flops': args.flops, 'step_flops': step, 'steps': steps}
  line = json.dumps({**name, **costs, **measure(args, run), 'curve': curve})
  with args.results.open('a') as file:
    file.write(line + '\n')
  print(line, flush=True)


# --- Measures ------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, run: Run) -> dict[str, Any]:
  """Measures the captions and answers of a finished run, in %, and its tokens per image."""
  model = open_model(args, run)
  groups = captions.groups_by_name(sprites.load(args.source))
  single = corpus.examples(args.source, 'train', NEW_IMAGES_SEED, args.images, 'single')
  baseline = vqa.fit_majority(vqa.collect_questions(single))
  measures: dict[str, Any] = {'tokens': tokens_per_image(model, stack_images(single))}
  for split in SPLITS:
    seed = NEW_IMAGES_SEED if split == 'train' else 0
    single = corpus.examples(args.source, split, seed, args.images, 'single')
    scenes = corpus.examples(args.source, split, seed, args.images // 2, 'scene')
    captioned = model.caption(stack_images(single), seed=0)
    scores = captions.score_captions(captioned, single, groups, single)
    asked = vqa.collect_questions(single[: args.images // 2] + scenes)
    pixels = stack_images(single[: args.images // 2] + scenes)
    answers = model.answer(
      pixels[[question.index for question in asked]],
      [question.question for question in asked],
      seed=0,
    )
    by_type = vqa.score_answers(answers, asked, baseline)
    measures[f'{split}/name'] = 100 * scores['name']
    measures[f'{split}/category'] = 100 * scores['category']
    measures[f'{split}/answers'] = 100 * by_type['all']['accuracy']
    measures[f'{split}/by_type'] = {
      name: round(100 * values['accuracy'], 1) for name, values in by_type.items()
    }
  return measures


def open_model(args: argparse.Namespace, run: Run) -> Lavit:
  """The run's model with the encoders that it was trained with."""
  folder = run.workdir / 'model'
  if not folder.exists():
    exports = [*args.frozen.split(','), str(run.workdir / 'export')]
    lavit_command = pathlib.Path(sys.executable).with_name('lavit')
    subprocess.run([str(lavit_command), 'bundle', *exports, '--out', str(folder)], check=True)
  return Lavit.from_pretrained(folder)


def tokens_per_image(model: Lavit, images: np.ndarray) -> float:
  """The mean number of vectors that the language model sees of an image."""
  if model.modules.interface is not None:
    return float(model.modules.num_image_vectors)
  return float(model.tokenize(images, seed=0).counts.mean())


# --- Report --------------------------------------------------------------------------------------


def read_results(path: pathlib.Path) -> list[dict[str, Any]]:
  """The finished runs."""
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]


def select(results: Sequence[dict[str, Any]], system: str, mode: str) -> list[dict[str, Any]]:
  """The runs of a system, one for each seed."""
  return [run for run in results if (run['system'], run['language_model']) == (system, mode)]


def table(results: Sequence[dict[str, Any]]) -> str:
  """The measures in Markdown: the mean over the seeds, and in brackets the least and the most."""
  lines = [
    f'| language model | system | seeds | {" | ".join(head for _, head, _ in COLUMNS)} |',
    f'|---|---|---|{"---|" * len(COLUMNS)}',
  ]
  for mode in LANGUAGE_MODELS:
    for system in COLORS:
      runs = select(results, system, mode)
      if runs:
        cells = [format_cell([run[key] for run in runs], digits) for key, _, digits in COLUMNS]
        lines.append(f'| {mode} | {system} | {len(runs)} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def format_cell(values: Sequence[float], digits: int) -> str:
  """'41.2 (39.8-42.0)', or '64' where all are equal."""
  mean = f'{np.mean(values):.{digits}f}'
  if min(values) == max(values):
    return mean
  return f'{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})'


def figure(results: Sequence[dict[str, Any]]) -> str:
  """Accuracy of held-out words against operations, and of held-out categories against tokens."""
  cells = []
  for mode in LANGUAGE_MODELS:
    lines = []
    points = []
    for system, color in COLORS.items():
      runs = select(results, system, mode)
      for run in runs:
        teraflops = run['step_flops'] / 1e12
        lines.append((color, [(step * teraflops, value) for step, value in run['curve']], []))
      points.append((color, [], [(run['tokens'], run['heldout/pair/category']) for run in runs]))
    if lines:
      cells.append(curves.panel(f'{mode}: right words, held out', lines, 'TFLOP'))
      cells.append(curves.panel(f'{mode}: category, unseen drawings, %', points, 'tokens'))
  cells.append(curves.legend(COLORS))
  return curves.grid(cells)


if __name__ == '__main__':
  main()
