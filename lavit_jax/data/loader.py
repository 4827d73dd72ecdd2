"""What a training step sees: batches of composed examples or of a list of sources, endless, seeded, sharded and resumable (grain)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import grain
import grain.experimental
import numpy as np

from lavit_jax.data import images, long_text, prompts, transforms
from lavit_jax.data.cleaning import clean_caption, clean_text
from lavit_jax.data.emoji import questions, splits, sprites
from lavit_jax.data.emoji.corpus import describe_sprite
from lavit_jax.data.emoji.scenes import Composer, Example
from lavit_jax.data.row_workers import RowDataset, SkipCounter, closed_at_exit
from lavit_jax.data.sources import mix_sources
from lavit_jax.data.streams import shards_of
from lavit_jax.data.text import TextTokenizer
from lavit_jax.errors import UserError
from lavit_jax.models.sequence import IMAGE_TO_TEXT, TEXT_ONLY, TEXT_TO_IMAGE

DEFAULT_SHARES = {'caption': 0.35, 'answer': 0.3, 'draw': 0.3, 'text': 0.05}
_ENDLESS = 1 << 62
_TYPES = {
  'format': (str,),
  'path': (str, list, tuple),
  'use': (str,),
  'weight': (float, int),
  'window': (int,),
}  # of a source's options
_NAMES = {
  'image': True,
  'text': True,
  'captions': False,
  'split': False,
  'data_dir': False,
}  # may it be several?
_LONG = 16  # characters for each token that there is room for: more than any language needs


def batches(
  task: Literal['images', 'contrastive', 'lm'],
  *,
  source: str = 'embedded',
  split: str = 'train',
  seed: int = 0,
  batch_size: int,
  image_size: int = 64,
  text_length: int = 48,
  tokenizer_folder: str | None = None,
  shares: Mapping[str, float] | None = None,
  question_weights: Mapping[str, float] | None = None,
  draw_text_weight: float = 0.1,
  drop_text: float = 0.1,
  scene_share: float = 0.3,
  shard_index: int = 0,
  shard_count: int = 1,
  rows: Sequence[int] | None = None,
  num_threads: int = 2,
  sources: Sequence[Mapping] = (),
  heldout: Sequence[Mapping] = (),
  shards: int = 1,
  crop: str = 'none',
  max_skipped: float = 0.05,
  skipped: SkipCounter | None = None,
  vit_size: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """An endless iterator over batches of numpy arrays, with `get_state` / `set_state`.

  `batch_size` counts the rows of one shard; all shards together make a global batch of B = batch_size * shard_count, whose row r in
  batch b is example b * B + r, however many shards there are. `rows` says which of them are this shard's; None: the shard_index'th
  block of batch_size.

  task 'images':      image uint8[B, H, W, 3]
  task 'contrastive': image, text int32[B, T] (captions, padded with 0), text_length int32[B]
  task 'lm':          these, and text_weight float32[B, T + 1], the weight in the loss of each text token and of the one
                      behind the text (1, or 0 where the text was cut, which is no end), and kind int32[B]:
                      0 image to text, 1 text to image, 2 text only. `shares` says how often a row is a 'caption', an
                      'answer' (kind 0; only the answer's tokens weigh; which of the picture's questions is asked goes
                      by `question_weights`, 1 for a type that it does not name), a 'draw' (kind 1; tokens weigh
                      `draw_text_weight`, and a share `drop_text` has no text) or a 'text' (kind 2).
                      Begin and end tokens are the packer's business.

  With `sources` (sources.py), and `heldout` for the held-out splits, rows come from these in place of the composer. They are dealt to `shards`
  (streams.py; whoever reads has several of these), each of which fills some rows of every global batch, which so is the same too. Pictures go through
  `transforms.decode` with `crop`, texts are cleaned and cut at `text_length`, `shares` chooses between 'caption' and 'draw' where the source
  does not say, and what is no example is left out and counted in `skipped`; a larger share than `max_skipped` raises UserError.

  With `vit_size` a batch has 'vit_image' too, uint8[B, vit_size, vit_size, 3]: the same pictures at
  the size that the ViT takes.

  Raises ValueError for an unknown task, share, question type, crop or split, and for a composed text of more than `text_length` tokens.
  """
  validate_options(
    task,
    shares=shares,
    question_weights=question_weights,
    crop=crop,
    sources=sources,
    heldout=heldout,
  )
  rows = list(
    range(shard_index * batch_size, (shard_index + 1) * batch_size) if rows is None else rows
  )
  if len(rows) != batch_size:
    raise ValueError(f'{len(rows)} rows make no batch of {batch_size}')
  if sources:
    splits.heldout_reasons(split)
    chosen = sources if split == 'train' else heldout
    if not chosen:
      raise ValueError(
        'there are sources, but none that are held out: give data.heldout, or eval_every=0 and picture_every=0'
      )
    write = None
    if task == 'lm':
      write = _write_pair(
        _Writer(tokenizer_folder, text_length),
        DEFAULT_SHARES if shares is None else shares,
        draw_text_weight,
        drop_text,
        seed,
      )
    elif task != 'images' or any(source.get('use') == 'text' for source in chosen):
      raise ValueError(
        f"sources are for the tasks 'images' and 'lm', those of use 'text' for 'lm' only; the task is {task!r}"
      )
    held = shards_of(rows, batch_size * shard_count, shards)
    captioned = write is not None
    if split == 'train':
      deal, of = mix_sources(chosen, seed, shards, held, captioned=captioned)
    else:
      deal, of = mix_sources(chosen, None, shards, held, 'heldout', captioned)
    crop = crop if split == 'train' or crop == 'none' else 'center'
    make = transforms.row_builder(seed, image_size, crop, write, vit_size)
    made = RowDataset(
      deal, of, make, skipped or SkipCounter(), max_skipped, num_threads, batch_size // len(held)
    )
    made = made.batch(batch_size, drop_remainder=True)
    return closed_at_exit(
      iter(
        grain.experimental.ThreadPrefetchIterDataset(
          made, prefetch_buffer_size=2 if num_threads else 0
        )
      )
    )
  composer = Composer(sprites.load(source), split, scene_share, image_size)

  def shown(example: Example) -> dict[str, np.ndarray]:
    if not vit_size:
      return {'image': example.image}
    return {'image': example.image, 'vit_image': images.resize(example.image, vit_size)}

  match task:
    case 'images':

      def row(index):
        return shown(composer(seed, index))
    case 'contrastive':
      write = _Writer(tokenizer_folder, text_length)

      def row(index):
        example = composer(seed, index)
        text = write(('', example.caption, 1.0))
        return {**shown(example), 'text': text['text'], 'text_length': text['text_length']}
    case 'lm':
      write = _Writer(tokenizer_folder, text_length)
      kinds, cumulative = _cumulative(DEFAULT_SHARES if shares is None else shares)
      weights = _weights(question_weights or {})

      def row(index):
        example = composer(seed, index)
        rng = np.random.default_rng((seed, index, 1))
        kind = kinds[np.searchsorted(cumulative, rng.random(), side='right')]
        text = write(_texts(kind, example, composer, rng, weights, draw_text_weight, drop_text))
        return {**shown(example), **text, 'kind': np.int32(_KINDS[kind])}

  options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * batch_size)

  def example_of(position):
    batch, r = divmod(position, batch_size)
    return batch * batch_size * shard_count + int(rows[r])

  def pipeline(first):
    positions = grain.MapDataset.range(first * batch_size, _ENDLESS)
    return iter(
      positions.map(example_of)
      .map(row)
      .to_iter_dataset(options)
      .batch(batch_size, drop_remainder=True)
    )

  return Batches(pipeline)


def validate_options(
  task: str,
  *,
  shares: Mapping[str, float] | None = None,
  question_weights: Mapping[str, float] | None = None,
  crop: str = 'none',
  sources: Sequence[Mapping] = (),
  heldout: Sequence[Mapping] = (),
  **others,
) -> None:
  """Raises what `batches` would of these options, whatever the data, which are not opened."""
  del others
  if task not in ('images', 'contrastive', 'lm'):
    raise ValueError(f"unknown task {task!r}; choose 'images', 'contrastive' or 'lm'")
  if crop not in transforms.CROPS:
    raise ValueError(f'unknown crop {crop!r}; choose one of {", ".join(transforms.CROPS)}')
  if task == 'lm':
    _cumulative(DEFAULT_SHARES if shares is None else shares)
    _weights(question_weights or {})
  for name, given in ('sources', sources), ('heldout', heldout):
    for number, source in enumerate(given):
      if not isinstance(source, Mapping):
        raise UserError(f"{name}[{number}] is {source!r}; give {{'format': ..., 'path': ...}}")
      for key, kinds in _TYPES.items():
        if key in source and not isinstance(source[key], kinds):
          raise UserError(
            f'{name}[{number}] has {key} {source[key]!r}, which is no {kinds[0].__name__}'
          )
      for key, several in _NAMES.items():
        if not _is_name(source.get(key), several):
          raise UserError(
            f'{name}[{number}] has {key} {source[key]!r}, which is no str'
            + (' and no list of them' if several else '')
          )


def _is_name(value, several: bool) -> bool:
  """Whether an option is left open (None), a name, or names where there may be several."""
  if several and isinstance(value, (list, tuple)):
    return all(isinstance(each, str) for each in value)
  return value is None or isinstance(value, str)


class Batches(Iterator):
  """Batches that are found by their number: `pipeline(first)` begins at any.

  The state, {'batches': those given}, is the same in every process, and so means the same to another number of processes.
  """

  def __init__(self, pipeline: Callable[[int], Iterator]):
    self._pipeline, self._given, self._iterator = pipeline, 0, None

  def __next__(self) -> dict[str, np.ndarray]:
    if self._iterator is None:
      self._iterator = self._pipeline(self._given)
    batch = next(self._iterator)
    self._given += 1
    return batch

  def get_state(self) -> dict[str, int]:
    return {'batches': self._given}

  def set_state(self, state: dict[str, int]) -> None:
    self._given, self._iterator = state['batches'], None

  def close(self) -> None:
    if self._iterator is not None:
      self._iterator.close()


def batch_shapes(
  task: str, batch_size: int, image_size: int, text_length: int = 0, vit_size: int | None = None
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """What `batches` yields for a task: name -> (shape, dtype)."""
  made = {'image': ((batch_size, image_size, image_size, 3), np.uint8)}
  if vit_size:
    made['vit_image'] = ((batch_size, vit_size, vit_size, 3), np.uint8)
  if task != 'images':
    made |= {
      'text': ((batch_size, text_length), np.int32),
      'text_length': ((batch_size,), np.int32),
    }
  if task == 'lm':
    made |= {
      'text_weight': ((batch_size, text_length + 1), np.float32),
      'kind': ((batch_size,), np.int32),
    }
  return {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in made.items()}


_KINDS = {
  'caption': IMAGE_TO_TEXT,
  'answer': IMAGE_TO_TEXT,
  'draw': TEXT_TO_IMAGE,
  'text': TEXT_ONLY,
}


def _texts(
  kind: str,
  example: Example,
  composer: Composer,
  rng,
  weights: Mapping[str, float],
  draw_text_weight: float,
  drop_text: float,
) -> tuple[str, str, float]:
  """(context without weight, text, weight of the text's tokens)."""
  match kind:
    case 'caption':
      return '', example.caption, 1.0
    case 'answer':
      cumulative = np.cumsum([weights[kind] for kind, _, _ in example.questions])
      _, question, answer = example.questions[
        np.searchsorted(cumulative, rng.random() * cumulative[-1], side='right')
      ]
      return prompts.question_prompt(question), f' {answer}', 1.0
    case 'draw':  # Now and then of nothing: what guidance compares with.
      return '', '' if rng.random() < drop_text else example.caption, draw_text_weight
    case _:
      return '', describe_sprite(composer, example.facts.objects[0].sprite), 1.0


class _Writer:
  """Texts to padded rows of ids."""

  def __init__(self, tokenizer_folder: str | None, length: int):
    if tokenizer_folder is None:
      raise ValueError('this task has text: give tokenizer_folder')
    self._tokenizer, self._length = TextTokenizer.load(tokenizer_folder), length

  def __call__(self, texts: tuple[str, str, float]) -> dict[str, np.ndarray]:
    context, text, weight = texts
    given = self._tokenizer.encode(context) if context else ()
    told = self._tokenizer.encode(
      text.removeprefix(' ') if context else text
    )  # every text is given a space; LLaMA's would be two
    ids = given + told
    if len(ids) > self._length:
      raise ValueError(
        f'text_length is {self._length}, but this text has {len(ids)} tokens: {context + text!r}'
      )
    return self._row(ids, len(given), weight)

  def cut(self, text: str, weight: float) -> dict[str, np.ndarray]:
    """As much of the text as there is room for."""
    ids = self._tokenizer.encode_once(text[: _LONG * self._length])
    whole = len(ids) <= self._length and len(text) <= _LONG * self._length
    return self._row(ids[: self._length], 0, weight, whole)

  def piece(self, text: str, weight: float, epoch: int, seed: int) -> dict[str, np.ndarray]:
    """The piece of a plain text that its row has in this epoch (long_text.py)."""
    ids, ends = long_text.piece_of(text, self._tokenizer.encode_once, self._length, epoch, seed)
    row = self._row(ids, 0, weight)
    if not ends:  # the text goes on: what is behind the piece is not learnt
      row['text_weight'][len(ids) :] = 0.0
    return row

  def _row(
    self, ids: Sequence[int], given: int, weight: float, whole: bool = True
  ) -> dict[str, np.ndarray]:
    """`whole`: the text ends with these ids, which then is learnt."""
    padded, weights = np.zeros(self._length, np.int32), np.zeros(self._length + 1, np.float32)
    padded[: len(ids)], weights[given : len(ids)] = ids, weight
    weights[len(ids)] = float(whole)
    return {'text': padded, 'text_length': np.int32(len(ids)), 'text_weight': weights}


def _write_pair(
  write: _Writer, shares: Mapping[str, float], draw_text_weight: float, drop_text: float, seed: int
) -> Callable:
  """The texts of a record, the use of its source, an rng, the epoch -> text fields and kind of its row; None if there is no text."""
  kinds, cumulative = _cumulative(_of_pictures(shares))

  def write_pair(texts, use, rng, epoch):
    text = transforms.choose_caption(texts, rng, clean_text if use == 'text' else clean_caption)
    if text and use == 'text':
      return {**write.piece(text, 1.0, epoch, seed), 'kind': np.int32(_KINDS['text'])}
    if not text:
      return None
    kind = use or kinds[np.searchsorted(cumulative, rng.random(), side='right')]
    if kind == 'draw' and rng.random() < drop_text:
      text = ''
    return {
      **write.cut(text, draw_text_weight if kind == 'draw' else 1.0),
      'kind': np.int32(_KINDS[kind]),
    }

  return write_pair


def _of_pictures(shares: Mapping[str, float]) -> dict[str, float]:
  """What is made of the pairs of a source that does not say its use."""
  return {kind: shares[kind] for kind in ('caption', 'draw') if shares.get(kind)} or {
    'caption': 1.0
  }


def task_shares(shares: Mapping[str, float], sources: Sequence[Mapping] = ()) -> np.ndarray:
  """How often a row of the task 'lm' is of each kind, f64[3]: image to text, text to image, text only.

  What is no kind does not count: `batches` says so.
  """

  def mixed(of):
    found = np.zeros(3)
    for kind in set(of) & set(_KINDS):
      found[_KINDS[kind]] += of[kind]
    return found / max(found.sum(), 1e-9)

  if not sources:
    return mixed(shares)
  rows = [
    mixed({source['use']: 1.0} if source.get('use') else _of_pictures(shares)) for source in sources
  ]
  return np.average(rows, axis=0, weights=[source.get('weight', 1.0) for source in sources])


def _weights(given: Mapping[str, float]) -> dict[str, float]:
  if set(given) - set(questions.TYPES) or not all(weight > 0 for weight in given.values()):
    raise ValueError(
      f'question_weights must be positive numbers for any of {", ".join(questions.TYPES)}; got {dict(given)}'
    )
  return dict.fromkeys(questions.TYPES, 1.0) | dict(given)


def _cumulative(shares: Mapping[str, float]) -> tuple[tuple[str, ...], np.ndarray]:
  unknown, values = set(shares) - set(_KINDS), np.array(list(shares.values()), np.float64)
  if unknown or (values < 0).any() or not values.sum() > 0:
    raise ValueError(
      f'shares must be non-negative numbers, not all 0, for any of {", ".join(_KINDS)}; got {dict(shares)}'
    )
  kinds = tuple(kind for kind in _KINDS if shares.get(kind))
  cumulative = np.cumsum([shares[kind] for kind in kinds])
  return kinds, cumulative / cumulative[-1]
