"""`lavit evaluate`: one page of numbers about a checkpoint, on pictures it was not trained on, each beside its trivial baseline."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table

from lavit_jax.data.emoji import corpus, questions, sprites
from lavit_jax.errors import UserError
from lavit_jax.evaluation import captions, images, vqa
from lavit_jax.inference.pipeline import Lavit
from lavit_jax.output import write_json

SPLITS = {'heldout/pair': 'unseen style of a concept', 'heldout/concept': 'unseen concept'}
KINDS = tuple(questions.CATEGORIES)
STEPS = 25


def evaluate(
  model: Lavit, source: str, count: int, out, *, drawn: int = 256, train: int = 8192, seed: int = 0
) -> dict:
  """Measures a model and writes the report.

  Args:
    source: the data set: 'embedded' or a data_dir.
    count: pictures a split; `drawn`: texts drawn a split.
    out: the JSON file.
    train: training pictures, for the classifier that judges what is drawn and for the most frequent answers.
    seed: of the examples and of all sampling.

  Returns:
    split -> {tokens, captions, questions, drawings}, each measure beside its baseline.

  Raises:
    UserError: there is no such data set; the checkpoint lacks a part; the report cannot be written.
  """
  try:
    known = sprites.load(source)
  except FileNotFoundError as error:
    raise UserError(str(error)) from None
  taught = corpus.examples(source, 'train', seed, train, 'single')
  scenes = corpus.examples(source, 'train', seed, train // 4, 'scene')
  classify = images.train_classifier(pixels(taught), kinds(taught), len(KINDS), seed=seed)
  usual = vqa.fit_majority(vqa.ask(taught + scenes))
  mean_features = images.mean_direction(images.features(model, pixels(taught[:256])), 0)

  report = dict(
    variant=model.model.variant,
    source=str(source),
    count=count,
    drawn=min(drawn, count),
    seed=seed,
    splits={},
  )
  for split in SPLITS:
    single = corpus.examples(source, split, seed, count, 'single')
    asked = single[: count // 2] + corpus.examples(source, split, seed, count // 2, 'scene')
    report['splits'][split] = dict(
      tokens=measure_tokens(model, single, mean_features, seed),
      captions=captions.score(
        model.caption(pixels(single), seed=seed), single, captions.groups_by_name(known), taught
      ),
      questions=measure_answers(model, asked, usual, seed),
      drawings=measure_drawings(model, single[:drawn], classify, seed),
    )
  write_json(out, report)
  Console().print(*tables(report))
  return report


def pixels(examples) -> np.ndarray:
  """uint8[B, H, W, 3]."""
  return np.stack([example.image for example in examples])


def kinds(examples) -> np.ndarray:
  """Index of the group of the first thing of each picture, i32[B]."""
  return np.array([KINDS.index(example.facts.objects[0].group) for example in examples])


def measure_tokens(
  model: Lavit, examples, mean_features: np.ndarray, seed: int
) -> dict[str, float]:
  """How much the tokens say: cosine of the features rebuilt from them, beside that of the mean training features, and that of
  the mean of a picture's own: above it, tokens say where things are.
  """
  tokens, x = model.tokenize(pixels(examples), seed=seed), images.features(model, pixels(examples))
  return dict(
    cosine=images.cosine(x, images.rebuilt_features(model, tokens)),
    cosine_of_mean=images.cosine(x, mean_features),
    cosine_of_own_mean=images.cosine(x, images.mean_direction(x, 1)),
    **images.usage(tokens, model.model.vocabulary.codebook_size),
  )


def measure_answers(model: Lavit, examples, usual: vqa.MajorityBaseline, seed: int) -> dict:
  """Every question of every example."""
  asked, shown = vqa.ask(examples), pixels(examples)
  answers = model.answer(
    shown[[each.index for each in asked]], [each.question for each in asked], seed=seed
  )
  return vqa.score(answers, asked, usual)


def measure_drawings(model: Lavit, examples, classify, seed: int) -> dict[str, dict[str, float]]:
  """Share of pictures with the kind and the background that their text asks for, as the independent judges see it.

  drawn: from the caption. reconstructed: from the tokens of the real picture. real: the real pictures, the ceiling.
  shuffled: those drawn, held against other prompts; noise: uniform pixels; both are floors.
  """
  real = pixels(examples)
  drawn = model.generate([example.caption for example in examples], steps=STEPS, seed=seed)
  rng = np.random.default_rng(seed)
  truth, behind = kinds(examples), np.array([example.facts.background for example in examples])

  def share(pictures, order=slice(None)):
    return dict(
      category=float((classify(pictures) == truth[order]).mean()),
      background=captions.mean(
        images.background(p) == name for p, name in zip(pictures, behind[order])
      ),
    )

  return dict(
    drawn=share(drawn),
    reconstructed=share(model.reconstruct(real, steps=STEPS, seed=seed)),
    real=share(real),
    shuffled=share(drawn, rng.permutation(len(examples))),
    noise=share(rng.integers(0, 256, real.shape, np.uint8)),
  )


def tables(report: dict) -> list[Table]:
  """The report as tables for the terminal, a column for each split."""
  splits = report['splits']

  def table(title, rows):
    grid = Table(title, *SPLITS.values(), title_justify='left')
    for name, *cells in rows:
      grid.add_row(name, *cells)
    return grid

  def percent(path, key):
    def dig(tree):
      for step in path:
        tree = tree.get(step, {})
      return f'{100 * tree[key]:.1f}' if key in tree else '-'

    return [dig(splits[split]) for split in SPLITS]

  def beside(path, key, *others):
    return [
      f'{a} ({"; ".join(rest)})'
      for a, *rest in zip(percent(path, key), *(percent(path, other) for other in others))
    ]

  tokens = [splits[split]['tokens'] for split in SPLITS]
  asked = dict.fromkeys(kind for split in SPLITS for kind in splits[split]['questions'])
  return [
    table(
      'visual tokens',
      [
        (
          'cosine of rebuilt features (of the mean)',
          *[f'{t["cosine"]:.3f} ({t["cosine_of_mean"]:.3f})' for t in tokens],
        ),
        ("cosine of a picture's own mean", *[f'{t["cosine_of_own_mean"]:.3f}' for t in tokens]),
        ('tokens an image', *[f'{t["tokens"]:.1f}' for t in tokens]),
        ('codes in use, perplexity', *[f'{t["codes"]}, {t["perplexity"]:.0f}' for t in tokens]),
      ],
    ),
    table(
      'captions, % (majority)',
      [
        (key, *beside(('captions',), key, f'{key}_majority'))
        for key in ('name', 'category', 'background')
      ],
    ),
    table(
      'answers, % (majority of the type; of the question)',
      [(kind, *beside(('questions', kind), 'accuracy', 'majority', 'blind')) for kind in asked],
    ),
    table(
      'pictures, % right category, background',
      [
        (
          kind,
          *[
            f'{a}, {b}'
            for a, b in zip(
              percent(('drawings', kind), 'category'), percent(('drawings', kind), 'background')
            )
          ],
        )
        for kind in ('drawn', 'reconstructed', 'real', 'shuffled', 'noise')
      ],
    ),
  ]
