"""`lavit evaluate`: measures a checkpoint on held-out images, each number beside its baseline."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from lavit_jax.data.emoji import corpus, questions, sprites
from lavit_jax.data.emoji.scenes import Composer, Example
from lavit_jax.data.emoji.sprites import Sprites
from lavit_jax.errors import UserError
from lavit_jax.evaluation import captions, images, selection, tokens, vqa
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.output import write_json

SPLITS = {  # with the heading of their column
  'train': 'trained sprites, new images',
  'heldout/pair': 'unseen style of a concept',
  'heldout/style': 'a whole unseen style',
  'heldout/concept': 'unseen concept',
}
# Of the images of trained sprites: those of small seeds are the training images of runs.
_TRAIN_SEED = 1 << 40
GROUPS = tuple(questions.CATEGORIES)
_STEPS = 25  # of the image decoder
_NUM_MEAN_FEATURES = 256  # training images whose mean feature is the baseline of tokens
_IMAGE_KINDS = ('drawn', 'reconstructed', 'real', 'shuffled', 'noise')
_SELECTION_ROWS = {  # row of the table -> measure of each kind of patch
  f'probability of {", ".join(selection.KINDS)}, %': 'probability',
  'kept by sampling, %': 'sampled',
  'kept as most probable, %': 'most_probable',
}
_SELECTION_VALUES = (  # (row of the table, measure, baseline)
  ('probability of object / background', 'probability_ratio', 1),
  ('standard deviation of the probability', 'probability_std', 0),
  ('correlation of tokens with object share', 'correlation_sampled', 0),
  ('correlation of expected tokens', 'correlation_expected', 0),
  ('spread of tokens / binomial', 'count_std_ratio', 1),
)

Report = dict[str, Any]
Rows = tuple[str, list[list[str]]]  # (title, rows) of a table
Classify = Callable[[np.ndarray], np.ndarray]  # uint8[B, H, W, 3] -> i32[B]


class Baselines(NamedTuple):
  """What is fitted on training examples.

  Attributes:
    train: the training examples of one sprite each.
    groups: spoken name -> group.
    classify: the classifier of images; None where nothing is drawn.
    answers: the most frequent answers.
    mean_features: direction of the mean features, f32[1, N, D]; None where no codes are measured.
  """

  train: list[Example]
  groups: dict[str, str]
  classify: Classify | None
  answers: vqa.MajorityBaseline
  mean_features: np.ndarray | None


def evaluate(
  model: Lavit,
  source: str,
  count: int,
  out: str | os.PathLike,
  *,
  drawn: int = 256,
  train: int = 8192,
  seed: int = 0,
) -> Report:
  """Measures a model, writes the report and prints it.

  Args:
    model: a checkpoint with all modules; with another interface than LaVIT's, with those of
      captions and answers. It has no codes, so tokens, selection and drawings are left out.
    source: the data set: 'embedded' or a data_dir.
    count: images of each split.
    out: the JSON file.
    drawn: captions of each split from which images are generated.
    train: training images, for the classifier of generated images and for the baselines.
    seed: of the examples and of all sampling.

  Returns:
    The report. `report['splits']` is split -> {tokens, selection, captions, questions, drawings},
    those that the model can do, each measure beside its baseline. `report['interface']` is the
    name of another interface.

  Raises:
    UserError: there is no such data set, the checkpoint lacks a module, or the report cannot be
      written.
  """
  try:
    loaded = sprites.load(source)
  except FileNotFoundError as error:
    raise UserError(str(error)) from None
  baselines = _fit_baselines(model, source, loaded, train, seed)
  composer = Composer(loaded)
  splits = {}
  for split in SPLITS:
    if not composer.has_split(split):  # the sample has no sprite of the held-out style
      continue
    split_seed = seed + _TRAIN_SEED if split == 'train' else seed
    single = corpus.examples(source, split, split_seed, count, 'single')
    scenes = corpus.examples(source, split, split_seed, count // 2, 'scene')
    measures = {}
    captioned = model.caption(stack_images(single), seed=seed)
    if baselines.mean_features is not None:
      measures['tokens'] = measure_tokens(model, single, baselines.mean_features, seed)
      measures['selection'] = measure_selection(model, single + scenes, composer, seed)
    measures['captions'] = captions.score_captions(
      captioned, single, baselines.groups, baselines.train
    )
    examples = single[: count // 2] + scenes
    measures['questions'] = measure_answers(model, examples, baselines.answers, seed)
    if baselines.classify is not None:
      measures['drawings'] = measure_images(model, single[:drawn], baselines.classify, seed)
    splits[split] = measures
  report = {
    'variant': model.modules.variant,
    'source': str(source),
    'count': count,
    'drawn': min(drawn, count),
    'seed': seed,
    'splits': splits,
  }
  if model.modules.interface is not None:
    report |= {'interface': model.modules.interface_name, 'drawn': 0}
  write_json(out, report)
  Console().print(*report_tables(report))
  return report


def _fit_baselines(model: Lavit, source: str, loaded: Sprites, count: int, seed: int) -> Baselines:
  """Fits the baselines on `count` training examples of one sprite and a quarter as many scenes."""
  single = corpus.examples(source, 'train', seed, count, 'single')
  scenes = corpus.examples(source, 'train', seed, count // 4, 'scene')
  classify = None
  mean_features = None
  if model.modules.interface is None:
    classify = images.train_classifier(
      stack_images(single), group_indices(single), len(GROUPS), seed=seed
    )
    features = tokens.features(model, stack_images(single[:_NUM_MEAN_FEATURES]))
    mean_features = tokens.mean_direction(features, 0)
  return Baselines(
    train=single,
    groups=captions.groups_by_name(loaded),
    classify=classify,
    answers=vqa.fit_majority(vqa.collect_questions(single + scenes)),
    mean_features=mean_features,
  )


def stack_images(examples: Sequence[Example]) -> np.ndarray:
  """Returns the images of examples, uint8[B, H, W, 3]."""
  return np.stack([example.image for example in examples])


def group_indices(examples: Sequence[Example]) -> np.ndarray:
  """Returns the index of the group of the first object of each image, i32[B]."""
  return np.array([GROUPS.index(example.facts.objects[0].group) for example in examples])


# ------------------------------------------------------------------------------------ measurements


def measure_tokens(
  model: Lavit, examples: Sequence[Example], mean_features: np.ndarray, seed: int
) -> dict[str, float]:
  """Measures how much tokens tell about an image.

  Returns:
    cosine: of the features that are rebuilt from the tokens, with the true ones.
    cosine_of_mean: of the mean training features, the baseline.
    cosine_of_own_mean: of the mean over the patches of the same image. Tokens above it tell where
      things are.
    Also what `tokens.codebook_usage` returns.
  """
  pixels = stack_images(examples)
  image_tokens = model.tokenize(pixels, seed=seed)
  features = tokens.features(model, pixels)
  rebuilt = tokens.rebuilt_features(model, image_tokens)
  return {
    'cosine': tokens.mean_cosine(features, rebuilt),
    'cosine_of_mean': tokens.mean_cosine(features, mean_features),
    'cosine_of_own_mean': tokens.mean_cosine(features, tokens.mean_direction(features, 1)),
    **tokens.codebook_usage(image_tokens, model.modules.vocabulary.codebook_size),
  }


def measure_selection(
  model: Lavit, examples: Sequence[Example], composer: Composer, seed: int
) -> dict[str, float]:
  """Measures whether the selector keeps objects rather than background.

  Args:
    model: with ViT and tokenizer.
    examples: of one sprite and of several. Those of several vary most in the share of the image
      that objects cover, with which the number of tokens can correlate.
    composer: has the sprites of the examples.
    seed: of the sampled patches.

  Returns:
    What `selection.score_selection` returns.
  """
  masks = np.stack([composer.object_mask(example.facts) for example in examples])
  return selection.measure_selection(model, stack_images(examples), masks, seed)


def measure_answers(
  model: Lavit, examples: Sequence[Example], baseline: vqa.MajorityBaseline, seed: int
) -> dict[str, dict[str, float]]:
  """Measures the answers to every question about every example; see `vqa.score_answers`."""
  vqa_examples = vqa.collect_questions(examples)
  pixels = stack_images(examples)[[example.index for example in vqa_examples]]
  answers = model.answer(pixels, [example.question for example in vqa_examples], seed=seed)
  return vqa.score_answers(answers, vqa_examples, baseline)


def measure_images(
  model: Lavit, examples: Sequence[Example], classify: Classify, seed: int
) -> dict[str, dict[str, float]]:
  """Measures generated images by judges that are independent of the model.

  Returns:
    Fractions of images with the right category and the right background, of these images:
    drawn: from the captions.
    reconstructed: from the tokens of the real images.
    real: the real images, an upper bound.
    shuffled: the drawn ones, with the captions of others, a lower bound.
    noise: uniform noise, another lower bound.
  """
  real = stack_images(examples)
  generated = model.generate(
    [example.caption for example in examples], num_inference_steps=_STEPS, seed=seed
  )
  rng = np.random.default_rng(seed)
  groups = group_indices(examples)
  backgrounds = np.array([example.facts.background for example in examples])

  def accuracy(pixels: np.ndarray, order: np.ndarray | None = None) -> dict[str, float]:
    """Compares images with the examples, or with the examples in another order."""
    true_groups = groups if order is None else groups[order]
    true_backgrounds = backgrounds if order is None else backgrounds[order]
    return {
      'category': float((classify(pixels) == true_groups).mean()),
      'background': captions.mean(
        images.background_color(image) == background
        for image, background in zip(pixels, true_backgrounds, strict=True)
      ),
    }

  return {
    'drawn': accuracy(generated),
    'reconstructed': accuracy(model.reconstruct(real, num_inference_steps=_STEPS, seed=seed)),
    'real': accuracy(real),
    'shuffled': accuracy(generated, rng.permutation(len(examples))),
    'noise': accuracy(rng.integers(0, 256, real.shape, np.uint8)),
  }


# ------------------------------------------------------------------------------------------ tables


def report_tables(report: Report) -> list[Table]:
  """Returns the tables of a report for the terminal, with a column for each split."""
  headings = [SPLITS[split] for split in report['splits']]
  makers: dict[str, Callable[[Sequence[Any]], Rows]] = {
    'tokens': _tokens_rows,
    'selection': _selection_rows,
    'captions': _captions_rows,
    'questions': _questions_rows,
    'drawings': _images_rows,
  }
  tables = []
  for measure, make_rows in makers.items():
    measured = [split[measure] for split in report['splits'].values() if measure in split]
    if measured:
      tables.append(_table(*make_rows(measured), headings))
  return tables


def _tokens_rows(splits: Sequence[dict[str, float]]) -> Rows:
  rows = [
    ['cosine of rebuilt features (of the mean)'],
    ["cosine of an image's own mean"],
    ['tokens an image, different codes among them'],
    ['codes in use, perplexity'],
  ]
  for values in splits:
    cells = (
      f'{values["cosine"]:.3f} ({values["cosine_of_mean"]:.3f})',
      f'{values["cosine_of_own_mean"]:.3f}',
      f'{values["tokens"]:.1f}, {values["distinct"]:.1f}',
      f'{values["codes"]}, {values["perplexity"]:.0f}',
    )
    for row, cell in zip(rows, cells, strict=True):
      row.append(cell)
  return 'visual tokens', rows


def _selection_rows(splits: Sequence[dict[str, float]]) -> Rows:
  rows = []
  for label, measure in _SELECTION_ROWS.items():
    row = [label]
    for values in splits:
      row.append(', '.join(_percent(values, f'{measure}_{kind}') for kind in selection.KINDS))
    rows.append(row)
  for label, key, baseline in _SELECTION_VALUES:
    row = [f'{label} ({baseline})']
    for values in splits:
      row.append(f'{values[key]:.3f}' if key in values else '-')
    rows.append(row)
  return 'selection (the same probability for all patches)', rows


def _captions_rows(splits: Sequence[dict[str, float]]) -> Rows:
  rows = []
  for key in ('name', 'category', 'background'):
    rows.append([key, *(_with_baselines(values, key, f'{key}_majority') for values in splits)])
  return 'captions, % (majority)', rows


def _questions_rows(splits: Sequence[dict[str, dict[str, float]]]) -> Rows:
  rows = []
  for question_type in dict.fromkeys(itertools.chain.from_iterable(splits)):
    row = [question_type]
    for values in splits:
      row.append(_with_baselines(values.get(question_type, {}), 'accuracy', 'majority', 'blind'))
    rows.append(row)
  return 'answers, % (majority of the type; of the question)', rows


def _images_rows(splits: Sequence[dict[str, dict[str, float]]]) -> Rows:
  rows = []
  for kind in _IMAGE_KINDS:
    row = [kind]
    for values in splits:
      category = _percent(values[kind], 'category')
      row.append(f'{category}, {_percent(values[kind], "background")}')
    rows.append(row)
  return 'images, % right category, background', rows


def _table(title: str, rows: Iterable[Sequence[str]], headings: Sequence[str]) -> Table:
  table = Table(title, *headings, title_justify='left')
  for row in rows:
    table.add_row(*row)
  return table


def _with_baselines(values: dict[str, float], key: str, *baselines: str) -> str:
  """Formats a measure and its baselines, as in '50.0 (25.0; 30.0)'."""
  return f'{_percent(values, key)} ({"; ".join(_percent(values, name) for name in baselines)})'


def _percent(values: dict[str, float], key: str) -> str:
  return f'{100 * values[key]:.1f}' if key in values else '-'
