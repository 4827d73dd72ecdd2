"""Stage 2: the language model predicts the next word or code, with one head for both.

[image, text] reads continuous features, [text, image] code embeddings (specification, Training).
Data with codes alone has no [image, text], and then nothing of the image encoder takes part.
With another interface than LaVIT's (models/interfaces), [image, text] reads the vectors of that,
and there is no [text, image]. Those of Flamingo are not in the sequence: extra layers read them.
With Emu's, [text, image] has the vectors, too, and each of an image's is regressed.
In conversations images stand anywhere, up to K of them, and answers alone are learned.

Axes: B pairs, B' = B K images, N patches, n visual slots of an image, H width of the language
model, R packed rows of S slots, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.data.sources import has_codes
from lavit_jax.errors import UserError
from lavit_jax.models.initialization import init_params
from lavit_jax.models.interfaces.base import RowImages
from lavit_jax.models.interfaces.emu_regression import regression_loss, regression_slots
from lavit_jax.models.interfaces.gated_cross_attention import gather_images, latest_image
from lavit_jax.models.interfaces.variants import LAVIT
from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.packing import PackedBatch, pack_pairs
from lavit_jax.models.sequence import compact, embed_sources
from lavit_jax.sharding import constrain_batch, per_shard
from lavit_jax.training.config import read_options
from lavit_jax.training.lora import LoraOptions
from lavit_jax.training.stages import adapters
from lavit_jax.training.stages.base import (
  BatchLayout,
  Mean,
  ModuleNames,
  Stage,
  Sum,
  Tree,
  apply_module,
  flat_images,
  image_features,
  initialize_params,
  row_keys,
  vit_images,
)
from lavit_jax.visualization import shade_dropped_patches

MODULES = ModuleNames(needs=('vit', 'tokenizer'), takes=('llama', 'understanding'))
INTERFACE_MODULES = ModuleNames(needs=('vit',), takes=('llama', 'interface'))
CODES_MODULES = ModuleNames(takes=('llama',))
KINDS = ('image_to_text', 'text_to_image', 'text_only', 'chat')  # by the number in a batch's `kind`
SPECIAL_TOKENS = 3  # of a pair, besides its text and its image: [IMG], [/IMG] and </s>
NUM_DRAWN = 8  # images
# Where layers read images beside the sequence, a row has room for so many times as many of them as
# it has pairs on average.
IMAGE_MARGIN = 1.25


@dataclasses.dataclass(frozen=True)
class LanguageModelOptions:
  """The section `lm` of the config, its `interface` and its section `lora`."""

  num_rows: int  # packed rows of a step
  row_length: int  # slots of a packed row
  mean_length: int  # tokens that a pair is expected to have
  loss_chunks: int  # parts in which a row's logits are computed, for less memory
  image_loss: bool  # whether the codes of [image, text] are learned too
  max_overflow: float = 1.0  # share of the pairs that may find no room
  regression_weight: float = 1.0  # of an embedding that is regressed, beside a word; of `emu`
  interface: str = LAVIT  # how images are seen: interfaces/variants.py
  lora: LoraOptions = LoraOptions()  # adapters in place of the parameters
  from_codes: bool = False  # whether the data has codes in place of images

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> LanguageModelOptions:
    """Reads them from a config."""
    interface = config.get('interface', LAVIT)  # earlier configs have none, and no adapters
    lora = LoraOptions.from_config(config.get('lora', {}))
    data = config.get('data', {})
    from_codes = has_codes((*data.get('sources', ()), *data.get('heldout', ())))
    own = dict(config['lm'], interface=interface, lora=lora, from_codes=from_codes)
    return read_options(cls, own, 'lm')

  @property
  def num_slots(self) -> int:
    """The slots of a step."""
    return self.num_rows * self.row_length

  @property
  def max_images(self) -> int:
    """The most images of a packed row whose vectors are not in it."""
    return math.ceil(IMAGE_MARGIN * self.row_length / self.mean_length)


def longest_pair(model: LavitModules, layout: BatchLayout) -> int:
  """The most tokens that a pair can have."""
  # A further image takes the place of a token of the text, and has [IMG] and [/IMG] besides.
  further = (layout.max_images - 1) * (model.max_visual_tokens + 1)
  return layout.text_length + model.max_visual_tokens + SPECIAL_TOKENS + further


def module_names(options: LanguageModelOptions) -> ModuleNames:
  """The modules that the stage reads with an interface."""
  if options.from_codes:
    return CODES_MODULES
  modules = MODULES if options.interface == LAVIT else INTERFACE_MODULES
  return adapters.module_names(modules) if options.lora.rank else modules


class _VisualInputs(NamedTuple):
  """The images of a batch for the language model.

  Attributes:
    vectors: [B', n, H]; of a `LayeredInterface` [B', n, W], and they take no slots. None with codes
      alone.
    codes: i32[B', n]; zeros without codes.
    lengths: i32[B'], the slots that an image takes: so many of the vectors and codes count.
    keep: f32[B', N], the patches that were kept; None where none are chosen.
    in_bucket: metrics of mergers with buckets.
  """

  vectors: Array | None
  codes: Array
  lengths: Array
  keep: Array | None
  in_bucket: dict[str, Array]


def build(options: LanguageModelOptions, model: LavitModules, layout: BatchLayout) -> Stage:
  """Builds stage 2: the next word or code, in packed rows; each shard packs its own pairs.

  The merger of `understanding` starts as a copy of the tokenizer's and trains; the tokenizer itself
  is frozen. Another interface starts anew, and trains without dropout.

  With a `RegressingInterface`, the loss is the mean over words and regressed embeddings: as in Sun
  et al. 2023, section 2.2, all elements of a sequence count alike, here by `regression_weight`.

  Raises:
    UserError: the rows do not divide, pairs may be longer than the language model reads, or codes
      should be learned that the interface does not have.
  """
  _validate(options, model, layout)
  if options.from_codes:
    encode_images = _read_codes
    modules = CODES_MODULES
  elif model.interface is None:
    encode_images = _encode_by_tokenizer
    modules = MODULES
  else:
    encode_images = _encode_by_interface
    modules = INTERFACE_MODULES
  trained = modules.takes

  def init(key, loaded):
    if modules is not MODULES:
      return initialize_params(init_params(model, key, trained), loaded), {}
    params = init_params(model, key, trained)
    merger = loaded['tokenizer']['merger']
    params['understanding'] = dict(params['understanding'], merger=merger)
    return initialize_params(params, loaded), {}

  def pack_shard(text, text_length, text_weight, kind, codes, visual_length):
    """The pairs of one shard -> (its rows, the kind i32[R, S] of each slot's pair; -1: empty)."""
    rows = pack_pairs(
      text,
      text_length,
      text_weight,
      kind,
      codes,
      visual_length,
      model.vocabulary,
      num_rows=options.num_rows * len(text) // layout.batch_size,
      row_length=options.row_length,
      max_images=None if model.layered_interface is None else options.max_images,
      image_loss=options.image_loss,
      draw_features=model.regressing_interface is not None,
    )
    kinds = jnp.where(rows.segments > 0, kind[jnp.maximum(rows.segments - 1, 0)], -1)
    return rows._replace(overflow=rows.overflow[None], used=rows.used[None]), kinds

  def run_llama(params, rows, vectors):
    """What packed rows with the vectors [B', n, ...] of their images read, and hidden states.

    Without vectors, they read the codes' embeddings.

    Both [R, S, H].
    """
    embedded = apply_module(model.llama, params['llama'], rows.ids, method='embed')
    embedded = constrain_batch(embedded)
    extra = None
    if vectors is None:
      pass
    elif model.layered_interface is None:
      embedded = per_shard(embed_sources, layout.shards, embedded, rows.source, vectors)
    else:
      images = per_shard(images_of_shard, layout.shards, vectors, rows.ids, rows.segments)
      extra = model.layered_interface.extra_layers(params['interface'], images)
    hidden, _ = apply_module(
      model.llama, params['llama'], embedded, rows.positions, rows.segments, extra=extra
    )
    return embedded, hidden

  def images_of_shard(vectors: Array, ids: Array, segments: Array) -> RowImages:
    ordinal = latest_image(ids == model.vocabulary.image_start, segments)
    return gather_images(vectors, segments - 1, ordinal, options.max_images)

  def loss(params, frozen, state, batch, key, train):
    del train
    visual = encode_images(model, params, frozen, batch, key)
    texts = (batch['text'], batch['text_length'], batch['text_weight'], batch['kind'])
    pairs = len(batch['kind'])
    codes = visual.codes.reshape(pairs, layout.max_images, -1)
    lengths = visual.lengths.reshape(pairs, layout.max_images)
    rows, kinds = per_shard(pack_shard, layout.shards, *texts, codes, lengths)
    embedded, hidden = run_llama(params, rows, visual.vectors)
    nll, correct = _next_token(model, params['llama'], hidden, rows.targets, options.loss_chunks)
    metrics = _metrics(rows, kinds, nll, correct)
    metrics |= dict(cut_texts=Sum(_count_cut_texts(batch)), **visual.in_bucket)
    if visual.keep is not None:
      metrics['keep_ratio'] = visual.keep.mean()
    if model.regressing_interface is not None:
      predicted = apply_module(model.interface, params['interface'], hidden, method='regress')
      slots = regression_slots(rows.source, rows.segments)
      regression = Mean(*regression_loss(predicted, embedded, slots))
      weight = options.regression_weight
      metrics['loss'] = jax.tree.map(lambda x, y: x + weight * y, metrics['loss'], regression)
      metrics['loss_regression'] = regression
    total = metrics['loss']
    return total.total / jnp.maximum(total.weight, 1e-6), (state, metrics)

  def export(params, state):
    del state
    return {name: params[name] for name in trained}

  def draw(params, frozen, state, batch, key):
    """Images, and the patches that the language model sees."""
    del params, state
    images = flat_images(batch['image'])[:NUM_DRAWN]
    x = image_features(model, frozen['vit'], vit_images(batch)[:NUM_DRAWN])[:, 1:]
    tokens = apply_module(model.tokenizer, frozen['tokenizer'], x, key)
    return [images, shade_dropped_patches(images, tokens.keep)]

  stage = Stage(modules, init, loss, export, draw if modules is MODULES else None)
  return adapters.adapt(stage, options.lora, model) if options.lora.rank else stage


def _encode_by_tokenizer(
  model: LavitModules, params: Tree, frozen: Tree, batch: Mapping[str, Array], key: Array
) -> _VisualInputs:
  """LaVIT's continuous tokens and codes; `key` chooses the patches."""
  x = image_features(model, frozen['vit'], vit_images(batch))[:, 1:]
  pairs = len(batch['kind'])
  keys = row_keys(key, batch, pairs, len(x) // pairs)
  # Adapters of the image encoder learn by what is read, not by which patches are kept.
  tokens = apply_module(model.tokenizer, frozen['tokenizer'], jax.lax.stop_gradient(x), keys)
  features, in_bucket = apply_module(
    model.understanding, params['understanding'], x, tokens.keep, method='merge_outputs'
  )
  vectors, mask = compact(features, tokens.keep)
  codes, _ = compact(tokens.ids, tokens.keep)
  metrics = {}
  if model.understanding.capacities:
    metrics = dict(tokenizer_in_bucket=tokens.in_bucket, understanding_in_bucket=in_bucket)
  return _VisualInputs(vectors, codes, mask.sum(-1), tokens.keep, metrics)


def _read_codes(
  model: LavitModules, params: Tree, frozen: Tree, batch: Mapping[str, Array], key: Array
) -> _VisualInputs:
  """The codes of a batch that has no images."""
  del model, params, frozen, key
  return _VisualInputs(None, batch['codes'], batch['code_length'], None, {})


def _encode_by_interface(
  model: LavitModules, params: Tree, frozen: Tree, batch: Mapping[str, Array], key: Array
) -> _VisualInputs:
  """The vectors of another interface; nothing about them is random."""
  del key
  assert model.interface is not None
  features = model.tower.features(frozen['vit'], vit_images(batch))
  tokens = apply_module(model.interface, params['interface'], features)
  codes = jnp.zeros(tokens.mask.shape, jnp.int32)
  lengths = tokens.lengths
  if not model.interface.in_sequence:
    codes = codes[:, :1]  # packing wants one, which does not count
    lengths = jnp.zeros_like(lengths)
  return _VisualInputs(tokens.vectors, codes, lengths, None, {})


def _validate(options: LanguageModelOptions, model: LavitModules, layout: BatchLayout) -> None:
  if options.image_loss and model.interface is not None:
    raise UserError(
      f'lm.image_loss=True: interface={options.interface!r} has no codes to learn; give '
      "lm.image_loss=False, or interface='lavit'"
    )
  if options.num_rows % layout.pieces:
    raise UserError(
      f'lm.num_rows={options.num_rows} must be a multiple of the {layout.pieces} pieces of a batch'
    )
  if options.row_length % options.loss_chunks:
    raise UserError(
      f'lm.row_length={options.row_length} must be a multiple of '
      f'lm.loss_chunks={options.loss_chunks}'
    )
  if layout.max_images > 1 and model.layered_interface is not None:
    raise UserError(
      f'data.max_images={layout.max_images}: with interface={options.interface!r} a conversation '
      'has one image; give data.max_images=1'
    )
  longest = longest_pair(model, layout)
  positions = model.llama.max_position_embeddings
  if longest > positions:
    raise UserError(
      f'data.text_length={layout.text_length}: with {model.max_visual_tokens} visual tokens, '
      f'{SPECIAL_TOKENS} special tokens and data.max_images={layout.max_images} a pair may have '
      f'{longest} tokens, but the language model of this checkpoint reads '
      f'max_position_embeddings={positions}; lower data.text_length'
    )


def _next_token(
  model: LavitModules, params: Tree, hidden: Array, targets: Array, num_chunks: int
) -> tuple[Array, Array]:
  """Negative log-likelihood and correctness of the targets, f32[R, S] each.

  Computed some slots at a time, since logits are V wide.

  Args:
    model: the modules.
    params: of the language model.
    hidden: [R, S, width].
    targets: i32[R, S].
    num_chunks: the parts of a row.
  """

  def chunk(_, inputs):
    hidden, targets = inputs
    logits = apply_module(model.llama, params, hidden, method='logits')
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    return None, (nll, (logits.argmax(-1) == targets).astype(jnp.float32))

  def split(x):
    return jnp.moveaxis(x.reshape(len(x), num_chunks, -1, *x.shape[2:]), 1, 0)

  def join(x):
    return jnp.moveaxis(x, 0, 1).reshape(targets.shape)

  if model.llama.remat != 'none':
    chunk = jax.checkpoint(chunk)
  _, (nll, correct) = jax.lax.scan(chunk, None, (split(hidden), split(targets)))
  return join(nll), join(correct)


def _metrics(rows: PackedBatch, kinds: Array, nll: Array, correct: Array) -> dict[str, Any]:
  """The metrics of packed rows; all but `rows` [R, S]."""
  metrics = dict(
    loss=_weighted_mean(nll, rows.weights),
    token_accuracy=_weighted_mean(correct, rows.weights),
    packed_share=rows.used.mean(),
    overflow=Sum(rows.overflow.sum().astype(jnp.float32)),
    loss_tokens=Sum((rows.weights > 0).sum().astype(jnp.float32)),
  )
  for number, name in enumerate(KINDS):
    weights = rows.weights * (kinds == number)
    metrics[f'loss_{name}'] = _weighted_mean(nll, weights)
    metrics[f'accuracy_{name}'] = _weighted_mean(correct, weights)
  return metrics


def _weighted_mean(values: Array, weights: Array) -> Mean:
  return Mean((values * weights).sum(), weights.sum())


def _count_cut_texts(batch: Mapping[str, Array]) -> Array:
  """How many texts of a batch were cut, f32[]: nothing of weight follows them."""
  if batch['text_weight'].shape[1] == batch['text'].shape[1]:  # none can be
    return jnp.zeros([])
  length = batch['text_length'][:, None]
  behind = jnp.take_along_axis(batch['text_weight'], length, axis=1)
  return (behind == 0).sum().astype(jnp.float32)
