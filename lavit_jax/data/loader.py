"""The batches of a training step: composed examples or a list of sources.

They are endless, seeded, sharded and resumable (grain).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import grain
import grain.experimental
import numpy as np

from lavit_jax.data import tasks, transforms
from lavit_jax.data.chat import TEMPLATES
from lavit_jax.data.composed import (
  MAX_OBJECTS,
  Batches,
  composed_batches,
  contrastive_rows,
  image_rows,
  lm_rows,
)
from lavit_jax.data.emoji import splits, sprites
from lavit_jax.data.emoji.scenes import Composer
from lavit_jax.data.row_workers import RowDataset, closed_at_exit
from lavit_jax.data.shards import shards_of
from lavit_jax.data.skips import SkipCounter
from lavit_jax.data.sources import mix_sources
from lavit_jax.data.tasks import DEFAULT_SHARES, DIALOGS, UseSampler, task_shares
from lavit_jax.data.text_fields import TextEncoder, pair_encoder
from lavit_jax.errors import UserError

__all__ = [
  'Batches',
  'BatchIterator',
  'DEFAULT_SHARES',
  'batch_shapes',
  'batches',
  'task_shares',
  'validate_options',
]

TASKS = ('images', 'contrastive', 'lm')
_SOURCE_TYPES = {
  'format': (str,),
  'path': (str, list, tuple),
  'use': (str,),
  'weight': (float, int),
  'window': (int,),
}
_NAME_OPTIONS = (
  'image',
  'text',
  'captions',
  'annotations',
  'split',
  'data_dir',
)  # of a source: strings
_LIST_OPTIONS = ('image', 'text')  # those that may be lists of names


class BatchIterator(Protocol):
  """An endless iterator over batches that stops and goes on anywhere."""

  def __next__(self) -> dict[str, np.ndarray]: ...

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...

  def get_state(self) -> dict[str, Any]:
    """The position, as JSON."""
    ...

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a position."""
    ...

  def close(self) -> None:
    """Ends the threads."""
    ...


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
  max_questions: int = 1,
  draw_text_weight: float = 0.1,
  drop_text: float = 0.1,
  scene_share: float = 0.3,
  augment: bool = False,
  shard_index: int = 0,
  shard_count: int = 1,
  rows: Sequence[int] | None = None,
  num_threads: int = 2,
  sources: Sequence[Mapping[str, Any]] = (),
  heldout: Sequence[Mapping[str, Any]] = (),
  shards: int = 1,
  crop: str = 'none',
  max_skipped: float = 0.05,
  skipped: SkipCounter | None = None,
  vit_size: int | None = None,
  code_sizes: transforms.CodeSizes | None = None,
  chat_template: str = 'lavit',
  max_images: int = 1,
) -> BatchIterator:
  """Endless batches for a task, as dictionaries of NumPy arrays.

  | field        | tasks           | array             | content                               |
  |--------------|-----------------|-------------------|---------------------------------------|
  | image        | all             | uint8[B, H, W, 3] | RGB, H = W = `image_size`             |
  | vit_image    | with `vit_size` | uint8[B, V, V, 3] | the same image, V = `vit_size`        |
  | codes        | with            | int32[B, N]       | in place of the images: their codes,  |
  |              | `code_sizes`    |                   | padded with 0                         |
  | code_length  | with            | int32[B]          | codes without padding                 |
  |              | `code_sizes`    |                   |                                       |
  | text         | contrastive, lm | int32[B, T]       | ids, padded with 0, T = `text_length` |
  | text_length  | contrastive, lm | int32[B]          | ids without padding                   |
  | object_map   | contrastive,    | uint8[B, H, W]    | 0 background, i + 1 object i          |
  | object_names | if composed     | int32[B, 2]       | their concepts, or -1 (splits.py)     |
  | text_weight  | lm              | f32[B, T + 1]     | weights in the loss                   |
  | kind         | lm              | int32[B]          | 0 image to text, 1 text to image,     |
  |              |                 |                   | 2 text only, 3 chat (packing.py)      |

  `text_weight` has a weight for each token, and for the one after the text: 1, or 0 where the
  text was cut and does not end. Begin and end tokens are added when rows are packed. In the text
  of a chat, `packing.IMAGE_ID` is an image. With a `max_images` K above 1, images are
  uint8[B, K, ...].

  The processes together make a global batch of batch_size * shard_count rows, whose row r in batch
  b is example b * batch_size * shard_count + r, whatever the number of processes.

  With `sources` (sources.py), and `heldout` for held-out splits, rows come from these instead of
  the composer. They are dealt to `shards` (shards.py), of which a process reads several. Images are
  decoded by `transforms.decode_sizes` with `crop`, texts are cleaned and cut at `text_length`.

  Args:
    task: 'images', 'contrastive' or 'lm'.
    source: of composed examples: 'embedded', or the data_dir of the emoji data set.
    split: 'train', 'heldout' or one of its parts (emoji/splits.py).
    seed: of the run.
    batch_size: rows of a batch in this process.
    image_size: pixels of a side.
    text_length: tokens of a row.
    tokenizer_folder: of the tokenizer; needed for texts.
    shares: how often a row of the task 'lm' has each use (tasks.py); None: DEFAULT_SHARES.
    question_weights: {type of question: how often}; 1 for a type that is not named.
    max_questions: the most questions about an image that a composed row of use 'answer' has, one
      after the other, each answer with an end token; as many as `text_length` has room for.
    draw_text_weight: the weight of captions in rows of use 'draw'.
    drop_text: the share of these rows that have no text.
    scene_share: the share of composed examples with several sprites.
    augment: turn, stretch and recolor composed training examples a little.
    shard_index: the block of the global batch that this process has.
    shard_count: the number of blocks.
    rows: the rows of the global batch that this process has, if they are not a block.
    num_threads: threads that make rows; 0: none.
    sources: options of each source.
    heldout: options of each held-out source.
    shards: into how many parts the sources are divided.
    crop: of images of sources; held-out images are cropped at the center.
    max_skipped: the share of a source that may be skipped.
    skipped: counts what is skipped.
    vit_size: pixels of a side of `vit_image`; None: no such field.
    code_sizes: where all sources have codes or texts alone; None: they have images.
    chat_template: how conversations and questions are written (chat.py).
    max_images: the most images of a row; conversations with more are skipped.

  Raises:
    ValueError: an unknown task, share, question type, crop or split; when iterated, a composed text
      with more than `text_length` tokens.
    UserError: a source that cannot be read; when iterated, more than `max_skipped` of one.
  """
  validate_options(
    task,
    shares=shares,
    question_weights=question_weights,
    crop=crop,
    sources=sources,
    heldout=heldout,
    max_images=max_images,
  )
  if rows is None:
    rows = range(shard_index * batch_size, (shard_index + 1) * batch_size)
  if len(rows) != batch_size:
    raise ValueError(f'{len(rows)} rows make no batch of {batch_size}')
  global_batch_size = batch_size * shard_count
  shares = DEFAULT_SHARES if shares is None else shares
  if sources:
    splits.heldout_reasons(split)  # raises ValueError for an unknown split
    _check_task_of_sources(task, sources if split == 'train' else heldout)
  encoder = None
  if task != 'images':
    encoder = TextEncoder(tokenizer_folder, text_length)
  if not sources:
    loaded = sprites.load(source)
    composer = Composer(loaded, split, scene_share, image_size, augment and split == 'train')
    if encoder is None:
      make_row = image_rows(composer, seed, vit_size)
    elif task == 'contrastive':
      make_row = contrastive_rows(composer, seed, vit_size, encoder)
    else:
      weights = tasks.question_weights(question_weights or {})
      make_row = lm_rows(
        composer,
        seed,
        vit_size,
        encoder,
        shares,
        weights,
        max_questions,
        draw_text_weight,
        drop_text,
        TEMPLATES[chat_template],
      )
    return composed_batches(make_row, rows, global_batch_size, num_threads)
  is_train = split == 'train'
  encode_texts = None
  if encoder is not None:
    template = TEMPLATES[chat_template]
    encode_texts = pair_encoder(encoder, shares, draw_text_weight, drop_text, seed, template)
  local_shards = shards_of(rows, global_batch_size, shards)
  open_shards, identity = mix_sources(
    sources if is_train else heldout,
    seed if is_train else None,
    shards,
    local_shards,
    'sources' if is_train else 'heldout',
    captioned=encode_texts is not None,
    weights=tasks.source_weights(shares, sources if is_train else heldout),
  )
  if not is_train and crop != 'none':
    crop = 'center'
  dataset = RowDataset(
    open_shards,
    identity,
    transforms.row_builder(seed, image_size, crop, encode_texts, vit_size, code_sizes, max_images),
    SkipCounter() if skipped is None else skipped,
    max_skipped,
    num_threads,
    batch_size // len(local_shards),
  )
  return _prefetch(dataset, batch_size, 2 if num_threads else 0)


def _check_task_of_sources(task: str, sources: Sequence[Mapping[str, Any]]) -> None:
  if not sources:
    raise ValueError(
      'there are sources, but none that are held out: give data.heldout, or eval_every=0 and '
      'picture_every=0'
    )
  of_lm = any(source.get('use') in ('text', *DIALOGS) for source in sources)
  if task == 'contrastive' or (task == 'images' and of_lm):
    raise ValueError(
      "sources are for the tasks 'images' and 'lm', those of use 'text', 'chat' or 'answer' for "
      f"'lm' only; the task is {task!r}"
    )


def _prefetch(dataset: RowDataset, batch_size: int, ahead: int) -> BatchIterator:
  """Batches of a data set, of which a thread makes `ahead` before they are taken."""
  batched = dataset.batch(batch_size, drop_remainder=True)
  prefetched = grain.experimental.ThreadPrefetchIterDataset(batched, prefetch_buffer_size=ahead)
  return closed_at_exit(iter(prefetched))


def validate_options(
  task: str,
  *,
  shares: Mapping[str, float] | None = None,
  question_weights: Mapping[str, float] | None = None,
  crop: str = 'none',
  sources: Sequence[Mapping[str, Any]] = (),
  heldout: Sequence[Mapping[str, Any]] = (),
  max_images: int = 1,
) -> None:
  """Checks options of `batches` without opening the data.

  Raises:
    ValueError: as `batches`.
    UserError: an option of a source is of a wrong type.
  """
  if task not in TASKS:
    raise ValueError(f"unknown task {task!r}; choose 'images', 'contrastive' or 'lm'")
  if crop not in transforms.CROPS:
    raise ValueError(f'unknown crop {crop!r}; choose one of {", ".join(transforms.CROPS)}')
  if task == 'lm':
    UseSampler(DEFAULT_SHARES if shares is None else shares)
    tasks.question_weights(question_weights or {})
    has_dialogs = any(
      isinstance(source, Mapping) and source.get('use') in DIALOGS for source in sources
    )
    for name, value, default in (
      ('shares.chat', (shares or {}).get('chat', 0), 0),
      ('max_images', max_images, 1),
    ):
      if value != default and not has_dialogs:
        raise ValueError(
          f"{name}={value} is for conversations; give a source with the use 'chat', or "
          f'{name}={default}'
        )
  for name, source_list in (('sources', sources), ('heldout', heldout)):
    for number, source in enumerate(source_list):
      _check_source_types(f'{name}[{number}]', source)
  if task == 'lm':
    tasks.source_weights(DEFAULT_SHARES if shares is None else shares, sources)


def _check_source_types(name: str, source: Any) -> None:
  """Raises UserError if a source is not a mapping, or an option of it is of a wrong type."""
  if not isinstance(source, Mapping):
    raise UserError(f"{name} is {source!r}; give {{'format': ..., 'path': ...}}", option=name)
  for key, types in _SOURCE_TYPES.items():
    if key in source and not isinstance(source[key], types):
      raise UserError(
        f'{name} has {key} {source[key]!r}, which is no {types[0].__name__}', option=name
      )
  for key in _NAME_OPTIONS:
    value = source.get(key)
    may_be_list = key in _LIST_OPTIONS
    if value is None or isinstance(value, str):
      continue
    if may_be_list and isinstance(value, (list, tuple)):
      if all(isinstance(item, str) for item in value):
        continue
    kind = 'str and no list of them' if may_be_list else 'str'
    raise UserError(f'{name} has {key} {value!r}, which is no {kind}', option=name)


def batch_shapes(
  task: str,
  batch_size: int,
  image_size: int,
  text_length: int = 0,
  vit_size: int | None = None,
  composed: bool = False,
  code_sizes: transforms.CodeSizes | None = None,
  max_images: int = 1,
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """The fields of the batches of a task: {name: (shape, dtype)}; see `batches`.

  Args:
    task: as for `batches`, like the sizes.
    batch_size: B.
    image_size: H = W.
    text_length: T.
    vit_size: V.
    composed: whether the images are composed, not read from sources.
    code_sizes: where there are codes in place of images.
    max_images: K.
  """
  shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
  if code_sizes is None:
    several = (max_images,) if max_images > 1 else ()
    for name, size in (('image', image_size), ('vit_image', vit_size)):
      if size:
        shapes[name] = ((batch_size, *several, size, size, 3), np.uint8)
  else:
    shapes['codes'] = ((batch_size, code_sizes.num_patches), np.int32)
    shapes['code_length'] = ((batch_size,), np.int32)
  if task != 'images':
    shapes['text'] = ((batch_size, text_length), np.int32)
    shapes['text_length'] = ((batch_size,), np.int32)
  if task == 'contrastive' and composed:
    shapes['object_map'] = ((batch_size, image_size, image_size), np.uint8)
    shapes['object_names'] = ((batch_size, MAX_OBJECTS), np.int32)
  if task == 'lm':
    shapes['text_weight'] = ((batch_size, text_length + 1), np.float32)
    shapes['kind'] = ((batch_size,), np.int32)
  return {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in shapes.items()}
