"""What the parts of the tokenizer's training are worth: runs that differ in one option each.

python benchmarks/ablations.py --workdir runs/ablations --frozen runs/encoder/export --source data
python benchmarks/ablations.py --workdir runs/ablations --report --out docs/assets/ablations.svg

Each run is `lavit train --config configs/tokenizer.py:tiny` with the options of its row. The study
can be stopped at any time; the same command continues it.

A run is measured on held-out images (split 'heldout/pair'), by its own choice of patches: the
selection as in `lavit evaluate`; the cosine of the features that are rebuilt from its codes; and
the shares of images whose category and whose name linear classifiers read from these features. The
classifiers are trained on rebuilt features of training images; others read the true features.
"""

import argparse
import functools
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import curves
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lavit_jax.data.emoji import corpus, splits, sprites
from lavit_jax.data.emoji.scenes import Composer, Example
from lavit_jax.evaluation import report as evaluation
from lavit_jax.evaluation import selection, tokens
from lavit_jax.models import lavit, vit
from lavit_jax.models.initialization import init_params
from lavit_jax.models.selector import gumbel_keep
from lavit_jax.models.sequence import compact
from lavit_jax.training import codebook
from lavit_jax.training.config import load_config
from lavit_jax.training.run import Run, resolve
from lavit_jax.training.stages.tokenizer import choose_patches
from lavit_jax.weights.store.folder import load_params, save_params

CONFIG = 'configs/tokenizer.py:tiny'
LEARNED = 'learned'
CROSS_ATTENTION = 'cross_attention'
SHUFFLED = 'shuffled'
PUBLISHED = (
  'tokenizer.ratio_scope=image',
  'tokenizer.ratio_of=choices',
  'tokenizer.selector_gradient=published',
  'tokenizer.entropy_weight=0.0',
  'tokenizer.freeze_selector_from=-1',
  'tokenizer.cross_attention_from=0',
  'optim.lr_scale=()',
  'optim.clip_groups=()',
)
ROWS: dict[str, tuple[str, ...]] = {  # the options in which a run differs from the config
  LEARNED: (),
  CROSS_ATTENTION: ('tokenizer.cross_attention_from=0',),
  # With the selector of the run above, from which it differs by nothing else: a tokenizer of
  # `init_from` has its cross-attention from the start, whatever `cross_attention_from` says.
  SHUFFLED: ('tokenizer.selection=shuffled', 'tokenizer.freeze_selector_from=0'),
  'published': PUBLISHED,
  'fixed': ('tokenizer.selection=fixed',),
  'no_counterfactual': ('tokenizer.selector_gradient=published',),
  'no_entropy': ('tokenizer.entropy_weight=0.0',),
  'ratio_of_choices': ('tokenizer.ratio_of=choices',),
  'ratio_of_image': ('tokenizer.ratio_scope=image',),
  'one_clip': ('optim.clip_groups=()',),
  'early_codes': ('tokenizer.quantize_from=150',),
  'commitment_1': ('tokenizer.commitment_weight=1.0',),
  'keep_0.2': ('tokenizer.keep_ratio=0.2',),
  'keep_0.5': ('tokenizer.keep_ratio=0.5',),
  'keep_1': ('tokenizer.keep_ratio=1.0',),
}
COLUMNS = (  # measure, head, digits
  ('cosine', '1 - cosine', 3),
  ('category', 'category, %', 1),
  ('name', 'name, %', 1),
  ('true_category', 'category by true features, %', 1),
  ('true_name', 'name by true features, %', 1),
  ('sampled_object', 'objects kept', 2),
  ('sampled_background', 'background kept', 2),
  ('correlation_sampled', 'count and object share', 2),
  ('count_std_ratio', 'spread of the count', 2),
  ('tokens', 'tokens per image', 1),
  ('distinct', 'different codes per image', 1),
  ('codes', 'codes used', 0),
  ('perplexity', 'perplexity', 0),
)
LINES = {LEARNED: curves.BLUE, SHUFFLED: curves.RED, 'published': '#7f7f7f', 'fixed': '#2ca02c'}
TRAIN_IMAGES = 8192
HELDOUT_IMAGES = 1024
PROBE_STEPS = 400
BATCH = 256


def main() -> None:
  """Trains and measures what is missing, or prints the report."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--frozen', help='checkpoint with the ViT')
  parser.add_argument('--source', default='data', help="data_dir of the emoji, or 'embedded'")
  parser.add_argument('--rows', default=','.join(ROWS), help='rows, in their order')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--set', action='append', default=[], metavar='KEY=VALUE', help='of all runs')
  parser.add_argument('--images', type=int, default=HELDOUT_IMAGES, help='held-out ones')
  parser.add_argument('--report', action='store_true', help='print the table and draw the figure')
  parser.add_argument('--out', type=pathlib.Path, help='SVG file')
  args = parser.parse_args()
  if args.report:
    if not any(finished(args.workdir, name) for name in ROWS):
      parser.error(f'{args.workdir} has no finished run')
    print(table(args.workdir))
    if args.out:
      args.out.write_text(figure(args.workdir))
    return
  names = args.rows.split(',')
  unknown = [name for name in names if name not in ROWS]
  if unknown or not args.frozen:
    parser.error(f'unknown rows: {", ".join(unknown)}' if unknown else '--frozen is missing')
  for seed in range(args.seeds):
    for name in names:
      study(args, name, seed)


def study(args: argparse.Namespace, name: str, seed: int) -> None:
  """Trains and measures one run, as far as that is missing."""
  workdir = args.workdir / f'{name}-{seed}'
  if (workdir / 'measures.json').exists():
    return
  options = (
    f'frozen={args.frozen}',
    f'data.source={args.source}',
    f'seed={seed}',
    'picture_every=0',
    *ROWS[name],
    *args.set,
  )
  if name == SHUFFLED:
    options += (f'init_from={selector_of(args.workdir, seed)}',)
  lavit_command = pathlib.Path(sys.executable).with_name('lavit')
  command = [str(lavit_command), 'train', '--config', CONFIG]
  command += ['--workdir', str(workdir), *(f'--config.{option}' for option in options)]
  subprocess.run(command, check=True)
  overrides = [tuple(option.split('=', 1)) for option in options]
  run = resolve(load_config(CONFIG, overrides), workdir)
  measures = measure(run, args.frozen, args.source, args.images)
  unfinished = workdir / 'measures.tmp'
  unfinished.write_text(json.dumps(measures, indent=1) + '\n')
  unfinished.rename(workdir / 'measures.json')
  print(name, seed, json.dumps(measures), flush=True)


def selector_of(workdir: pathlib.Path, seed: int) -> pathlib.Path:
  """The selector of a learned run in an otherwise fresh tokenizer, whose counts are compared."""
  learned = workdir / f'{CROSS_ATTENTION}-{seed}' / 'export'
  folder = workdir / f'{CROSS_ATTENTION}-{seed}' / 'selector'
  if not learned.exists():
    raise SystemExit(f'{SHUFFLED} needs the run {CROSS_ATTENTION} of the same seed first')
  if not folder.exists():
    model = lavit.build('tiny')
    fresh = init_params(model, jax.random.key(1000 + seed), ('tokenizer', 'decoder'))
    tokenizer = load_params(learned, ['tokenizer'])['tokenizer']
    fresh['tokenizer'] = {**fresh['tokenizer'], 'selector': tokenizer['selector']}
    save_params(folder, 'tiny', fresh, metadata=dict(codebook='untrained'))
  return folder


# --- Measures ------------------------------------------------------------------------------------


def measure(run: Run, frozen: str, source: str, num_images: int) -> dict[str, float]:
  """Measures an export on held-out images, with the run's own choice of patches."""
  params = load_params(frozen, ['vit']) | load_params(run.workdir / 'export')
  encode = functools.partial(encode_images, make_encoder(run), params)
  trained = corpus.examples(source, 'train', 0, TRAIN_IMAGES, 'single')
  heldout = corpus.examples(source, 'heldout/pair', 0, num_images, 'single')
  scenes = corpus.examples(source, 'heldout/pair', 0, num_images // 2, 'scene')

  x_trained, rebuilt_trained, *_ = encode(evaluation.stack_images(trained))
  both = heldout + scenes
  x, rebuilt, probabilities, keep, most_probable, ids = encode(evaluation.stack_images(both))
  x = x[: len(heldout)]
  ids = ids[: len(heldout)]
  read = read_features(rebuilt_trained, trained, rebuilt[: len(heldout)], heldout)
  true = read_features(x_trained, trained, x, heldout)

  composer = Composer(sprites.load(source), 'heldout/pair')
  masks = np.stack([composer.object_mask(example.facts) for example in both])
  side = run.model.image_size // run.model.vit.patch_size
  coverage = selection.patch_coverage(masks, side)
  counts = np.bincount(ids[ids >= 0], minlength=run.model.vocabulary.codebook_size)
  return dict(
    cosine=1 - tokens.mean_cosine(x, rebuilt[: len(heldout)]),
    **read,
    **{f'true_{key}': value for key, value in true.items()},
    tokens=float((ids >= 0).sum(1).mean()),
    distinct=float(np.mean([len(np.unique(row[row >= 0])) for row in ids])),
    codes=int((counts > 0).sum()),
    perplexity=float(codebook.perplexity(counts)),
    **selection.score_selection(probabilities, keep, most_probable, coverage),
  )


def make_encoder(run: Run) -> Callable[..., tuple[jax.Array, ...]]:
  """A jitted (params, images uint8[B, H, W, 3], key) -> arrays, see `encode_images`."""
  model = run.model

  @jax.jit
  def encode(params, images, key):
    encoded = model.vit.apply({'params': params['vit']}, vit.preprocess(images))
    x = encoded[:, 1:].astype(jnp.float32)
    tokenizer = functools.partial(model.tokenizer.apply, {'params': params['tokenizer']})
    log_probs = tokenizer(x, method='select')
    keep = choose_patches(run.options, log_probs, key)
    ids, _ = tokenizer(tokenizer(x, keep, method='merge'), method='quantize')
    codes, mask = compact(tokenizer(ids, method='lookup'), keep)
    rebuilt = model.decoder.apply({'params': params['decoder']}, codes, mask)
    probabilities = jnp.exp(log_probs[..., 0])
    most_probable = gumbel_keep(log_probs) > 0.5
    return x, rebuilt, probabilities, keep > 0.5, most_probable, jnp.where(keep > 0.5, ids, -1)

  return encode


def encode_images(
  encode: Callable[..., tuple[jax.Array, ...]], params: Any, images: np.ndarray
) -> list[np.ndarray]:
  """Encodes images in batches.

  Returns:
    features f32[B, N, D], rebuilt features f32[B, N, D], probabilities f32[B, N], sampled patches
    bool[B, N], most probable patches bool[B, N], ids i32[B, N] with -1 where a patch is dropped.
  """
  batches = []
  for start in range(0, len(images), BATCH):
    outputs = encode(params, images[start : start + BATCH], jax.random.key(start))
    batches.append([np.asarray(output) for output in outputs])
  return [np.concatenate(arrays) for arrays in zip(*batches, strict=True)]


def pool(features: np.ndarray) -> np.ndarray:
  """The mean and the maximum over the patches, f32[B, N, D] -> f32[B, 2 D]."""
  return np.concatenate([features.mean(1), features.max(1)], axis=1)


def read_features(
  trained_features: np.ndarray,
  trained: Sequence[Example],
  features: np.ndarray,
  examples: Sequence[Example],
) -> dict[str, float]:
  """Reads category and name by linear classifiers.

  Args:
    trained_features: of the training images, f32[T, N, D].
    trained: the T training examples.
    features: f32[B, N, D].
    examples: the B examples.

  Returns:
    {'category': % of right ones, 'name': % of right ones}.
  """
  measures = {}
  num_classes = {'category': len(evaluation.GROUPS), 'name': len(splits.concept_names())}
  for key, index in (('category', evaluation.group_indices), ('name', name_indices)):
    read = linear_probe(pool(trained_features), index(trained), num_classes[key])
    measures[key] = 100 * float((read(pool(features)) == index(examples)).mean())
  return measures


def name_indices(examples: Sequence[Example]) -> np.ndarray:
  """The concept of the first object of each image, i32[B]."""
  names = splits.concept_names()
  return np.array([names.index(example.facts.objects[0].name) for example in examples])


def linear_probe(
  x: np.ndarray, labels: np.ndarray, num_classes: int
) -> Callable[[np.ndarray], np.ndarray]:
  """Trains a linear classifier; f32[B, D] and labels i32[B] -> a function f32[B, D] -> i32[B]."""
  mean = x.mean(0)
  std = x.std(0) + 1e-6
  standardized = jnp.asarray((x - mean) / std)
  targets = jnp.asarray(labels)
  optimizer = optax.adamw(1e-2, weight_decay=0.1)
  weights = jnp.zeros((x.shape[1] + 1, num_classes))

  def logits(weights, x):
    return x @ weights[1:] + weights[0]

  def loss(weights):
    return optax.softmax_cross_entropy_with_integer_labels(
      logits(weights, standardized), targets
    ).mean()

  @jax.jit
  def step(weights, state):
    updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
    return optax.apply_updates(weights, updates), state

  state = optimizer.init(weights)
  for _ in range(PROBE_STEPS):
    weights, state = step(weights, state)
  return lambda x: np.asarray(logits(weights, (x - mean) / std)).argmax(1)


# --- Report --------------------------------------------------------------------------------------


def finished(workdir: pathlib.Path, name: str) -> list[pathlib.Path]:
  """The work directories of the measured runs of a row, a seed each."""
  return sorted(path.parent for path in workdir.glob(f'{name}-[0-9]*/measures.json'))


def table(workdir: pathlib.Path) -> str:
  """The measures in Markdown: the mean over the seeds, and in brackets the least and the most."""
  lines = [
    f'| run | seeds | {" | ".join(head for _, head, _ in COLUMNS)} |',
    f'|---|---|{"---|" * len(COLUMNS)}',
  ]
  for name in ROWS:
    runs = [json.loads((run / 'measures.json').read_text()) for run in finished(workdir, name)]
    if runs:
      cells = [format_cell([run.get(key) for run in runs], digits) for key, _, digits in COLUMNS]
      lines.append(f'| {name} | {len(runs)} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def format_cell(values: Sequence[float | None], digits: int) -> str:
  """'0.186 (0.184-0.188)'; '-' where nothing was measured."""
  measured = [value for value in values if value is not None]
  if not measured:
    return '-'
  mean = f'{np.mean(measured):.{digits}f}'
  if len(measured) == 1:
    return mean
  return f'{mean} ({min(measured):.{digits}f}-{max(measured):.{digits}f})'


def figure(workdir: pathlib.Path) -> str:
  """Curves of the first seeds: the error of the features, and the spread of the expected count."""
  panels = []
  for key, title in (('cosine', '1 - cosine of rebuilt features'), ('count_std', 'count spread')):
    lines = []
    for name, color in LINES.items():
      for run in finished(workdir, name)[:1]:
        records = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
        lines.append((color, curves.smooth(curves.series(records, key)), []))
    if lines:
      panels.append(curves.panel(title, lines))
  return curves.grid(panels)


if __name__ == '__main__':
  main()
