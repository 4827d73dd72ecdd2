"""Stage 1: the dynamic visual tokenizer (specification, Training).

Features become as few tokens as are needed to reconstruct them; first continuous ones, from
`quantize_from` on codes. Axes: B images, N patches, D width of the features, C width of the codes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.models.initialization import init_params
from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.selector import gumbel, gumbel_keep
from lavit_jax.models.sequence import compact
from lavit_jax.sharding import path_name
from lavit_jax.training import codebook
from lavit_jax.training.codebook import Codebook
from lavit_jax.training.config import read_options
from lavit_jax.training.optimizer import Hold
from lavit_jax.training.stages.base import (
  Average,
  BatchLayout,
  ModuleNames,
  Stage,
  Tree,
  apply_module,
  cosine_similarity,
  image_features,
  initialize_params,
  vit_images,
)
from lavit_jax.visualization import feature_colors, shade_dropped_patches

MODULES = ModuleNames(needs=('vit',), takes=('tokenizer', 'decoder'))
SELECTOR = r'^tokenizer/selector/'
CROSS_ATTENTION_OUTPUT = r'^tokenizer/merger/blocks/cross_attn/proj/'
WHEN_QUANTIZING = -1  # value of `freeze_selector_from`
NUM_DRAWN = 8  # images


@dataclasses.dataclass(frozen=True)
class TokenizerOptions:
  """The section `tokenizer` of the config."""

  keep_ratio: float  # rho, the share of the patches that should become tokens
  ratio_weight: float  # lambda, of the ratio's error in the loss
  decay: float  # of the codebook's moving averages
  commitment_weight: float
  quantize_from: int  # the step at which k-means starts the codebook
  revive_after: int  # batches after which an unused code moves; 0: never
  freeze_selector_from: int  # the step at which the selector stops; -1: when quantization begins
  ratio_scope: str = 'image'  # 'image': each has the ratio; 'batch': only their mean has it
  ratio_of: str = 'choices'  # 'choices': of the drawn mask; 'probabilities': of its expectation
  selector_gradient: str = 'published'  # or 'counterfactual': through the decoder's attention, too
  entropy_weight: float = 0.0  # of the entropy of the choices in the loss
  entropy_from: int = 0  # the step from which it counts
  cross_attention_from: int = 0  # the step from which kept patches take in dropped ones
  selection: str = 'learned'  # or, to compare with: 'shuffled', 'fixed'

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> TokenizerOptions:
    """Reads them from a config."""
    return read_options(cls, config['tokenizer'], 'tokenizer')


def build(options: TokenizerOptions, model: LavitModules, layout: BatchLayout) -> Stage:
  """Builds stage 1: selector, merger, codebook and decoder learn to reconstruct the features.

  The codebook is state: k-means on the first quantized batch, then moving averages. The selector
  stops at `freeze_selector_from`: trained on codes by the published formulas, it would keep more
  patches to offset what quantization costs.

  A codebook in `init_from` continues as it is, and so quantization begins with the first step. If
  the tokenizer in `init_from` has none (its own training ended before), k-means starts it as usual.
  """
  del layout

  def init(key, loaded):
    fresh = init_params(model, key, ('tokenizer', 'decoder'))
    if _starts_without_cross_attention(options, loaded):
      fresh['tokenizer'] = without_cross_attention(fresh['tokenizer'])
    continues = codebook.has_codebook(loaded)
    if 'tokenizer' in loaded and not continues:
      loaded = codebook.put_in(loaded, fresh['tokenizer']['quantizer']['embedding'])
    params, embedding = codebook.take_out(initialize_params(fresh, loaded))
    return params, codebook.init_codebook(embedding, started=continues)

  def hold(loaded):
    step = options.freeze_selector_from
    if step <= WHEN_QUANTIZING:
      step = 0 if codebook.has_codebook(loaded) else options.quantize_from
    holds = [Hold(SELECTOR, step)]
    if _starts_without_cross_attention(options, loaded):
      holds.append(Hold(CROSS_ATTENTION_OUTPUT, 0, options.cross_attention_from))
    return tuple(holds)

  counterfactual = options.selector_gradient == 'counterfactual'
  module = model.tokenizer.clone(counterfactual=counterfactual)

  def selector_trains(book):
    """Whether the selector still moves (`hold`): then the merger must compute all rows, bool[]."""
    step = options.freeze_selector_from
    if step > WHEN_QUANTIZING:
      return book.step < step
    return ~book.started & (book.step < options.quantize_from)

  def encode(params, book, x, key, trains=False):
    """Selects, merges, and projects.

    Returns:
      (log-probabilities f32[B, N, 2], keep f32[B, N], unit vectors before quantization
      f32[B, N, C], whether the merger used a bucket f32[]).
    """
    tokenizer = _with_codebook(params, book)['tokenizer']
    log_probs = apply_module(module, tokenizer, x, method='select')
    keep = choose_patches(options, log_probs, key)
    merged, in_bucket = apply_module(module, tokenizer, x, keep, trains, method='merge_outputs')
    _, vectors = apply_module(module, tokenizer, merged, method='quantize')
    return log_probs, keep, vectors, in_bucket

  def reconstruct(params, codes, keep):
    """Codes f32[B, N, C] and keep f32[B, N], through which the gradient reaches the selector."""
    if counterfactual:
      return apply_module(model.decoder, params['decoder'], codes, keep, method='decode_kept')
    return apply_module(model.decoder, params['decoder'], *compact(codes * keep[..., None], keep))

  def loss(params, frozen, book, batch, key, train):
    keep_key, kmeans_key, revive_key = jax.random.split(key, 3)
    x = _patch_features(model, frozen, vit_images(batch))
    trains = selector_trains(book) if train else False
    log_probs, keep, z, in_bucket = encode(params, book, x, keep_key, trains)
    probabilities = jnp.exp(log_probs[..., 0])
    flat = jax.lax.stop_gradient(z.reshape(-1, model.tokenizer.code_dim))
    weight = jax.lax.stop_gradient(keep.reshape(-1))
    if train:  # an evaluated batch starts nothing
      book = _start_if_due(options, kmeans_key, book, flat, weight)
    quantizing = book.started
    ids = codebook.nearest_code(flat, book.embedding)
    chosen = book.embedding[ids].reshape(z.shape)
    commitment = commitment_error(z, chosen, keep)
    codes = jnp.where(quantizing, z + jax.lax.stop_gradient(chosen - z), z)

    cosine = 1 - cosine_similarity(x, reconstruct(params, codes, keep)).mean()
    ratio = ratio_error(options, probabilities, keep)
    weighted_commitment = jnp.where(quantizing, options.commitment_weight * commitment, 0.0)
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean()
    weighted_entropy = jnp.where(
      book.step >= options.entropy_from, options.entropy_weight * entropy, 0.0
    )
    value = cosine + options.ratio_weight * ratio + weighted_commitment + weighted_entropy

    book = _step_codebook(options, revive_key, book, flat, weight, ids)
    count, _ = codebook.count_assignments(flat, weight, ids, len(book.embedding))
    metrics = dict(
      cosine=cosine,
      ratio=ratio,
      commitment=commitment,
      keep_ratio=keep.mean(),
      keep_entropy=entropy,
      keep_probability_std=probabilities.std(),
      count_std=count_std(probabilities),
      batch_codes=(count > 0).mean(),
      token_spread=token_spread(z, keep),
      distinct_tokens=distinct_share(ids.reshape(keep.shape), keep),
      batch_perplexity=codebook.perplexity(count),
    )
    if module.capacities:
      metrics['tokenizer_in_bucket'] = in_bucket
    if train:  # over the last steps, of which an evaluated batch is none
      metrics |= codebook.usage_metrics(book)
    return value, (book, metrics)

  def export(params, book):
    tokenizer = _with_codebook(params, book)['tokenizer']
    return dict(tokenizer=tokenizer, decoder=params['decoder'])

  def draw(params, frozen, book, batch, key):
    """Images, kept patches, and the features and their reconstruction as colors."""
    images = batch['image'][:NUM_DRAWN]
    x = _patch_features(model, frozen, vit_images(batch)[:NUM_DRAWN])
    _, keep, z, _ = encode(params, book, x, key)
    codes = jnp.where(book.started, book.embedding[codebook.nearest_code(z, book.embedding)], z)
    colors = feature_colors(x, reconstruct(params, codes, keep), images.shape[1])
    return [images, shade_dropped_patches(images, keep), *colors]

  return Stage(
    MODULES,
    init,
    loss,
    export,
    draw,
    hold,
    average=_codebook_average(options.revive_after),
    export_metadata=_export_metadata,
    warnings=lambda loaded, num_steps: _warnings(options, loaded, num_steps),
  )


def _patch_features(model: LavitModules, frozen: Mapping[str, Tree], images: Array) -> Array:
  """The features of the patches, without the class token's, f32[B, N, D]."""
  return image_features(model, frozen['vit'], images)[:, 1:].astype(jnp.float32)


def without_cross_attention(tokenizer: Tree) -> Tree:
  """The tokenizer with a merger whose cross-attention adds nothing: its output layer is zero."""

  def zero(path, leaf):
    name = 'tokenizer/' + path_name(path)
    return jnp.zeros_like(leaf) if re.search(CROSS_ATTENTION_OUTPUT, name) else leaf

  return jax.tree_util.tree_map_with_path(zero, tokenizer)


def _starts_without_cross_attention(options: TokenizerOptions, loaded: Mapping[str, Tree]) -> bool:
  return options.cross_attention_from > 0 and 'tokenizer' not in loaded


def choose_patches(options: TokenizerOptions, log_probs: Array, key: Array) -> Array:
  """The patches to keep, f32[B, N], by the log-probabilities f32[B, N, 2] of the selector.

  'learned' samples as published. The others show what learning is worth: 'shuffled' keeps as many
  patches of each image, but any; 'fixed' keeps the same number in all images.
  """
  if options.selection == 'fixed':
    count = max(1, round(options.keep_ratio * log_probs.shape[1]))
    return fixed_keep(log_probs, key, count)
  if options.selection == 'shuffled':
    choice_key, shuffle_key = jax.random.split(key)
    keep = jax.lax.stop_gradient(gumbel_keep(log_probs, key=choice_key))
    return jax.random.permutation(shuffle_key, keep, axis=-1, independent=True)
  return gumbel_keep(log_probs, key=key)


def fixed_keep(log_probs: Array, key: Array, count: int) -> Array:
  """Keeps `count` patches of each image: the most probable ones after the noise of `gumbel_keep`.

  The gradient is that of `gumbel_keep` at temperature 1.

  Args:
    log_probs: [B, N, 2]; class 0 is keep.
    key: of the noise.
    count: from 1 to N.

  Returns:
    f32[B, N], 0 or 1.
  """
  logits = log_probs.astype(jnp.float32)
  noisy = logits + gumbel(jax.random.uniform(key, logits.shape))
  margin = noisy[..., 0] - noisy[..., 1]
  rank = jnp.argsort(jnp.argsort(-margin))
  soft = jax.nn.sigmoid(margin)
  return (rank < count) + (soft - jax.lax.stop_gradient(soft))


def commitment_error(vectors: Array, codes: Array, keep: Array) -> Array:
  """The mean squared distance of kept vectors f32[B, N, C] to their codes f32[B, N, C], f32[].

  The mask keep f32[B, N] gets no gradient: the selector would keep what is easy to quantize.
  """
  weight = jax.lax.stop_gradient(keep)
  return (weight * jnp.square(vectors - codes).sum(-1)).sum() / weight.sum()


def ratio_error(options: TokenizerOptions, probabilities: Array, keep: Array) -> Array:
  """The squared error of the ratio of kept patches, f32[], by probabilities and keep f32[B, N].

  A fixed number of choices cannot change, so that there the probabilities count.
  """
  of_choices = options.ratio_of == 'choices' and options.selection != 'fixed'
  chosen = keep if of_choices else probabilities
  ratio = chosen.mean(-1) if options.ratio_scope == 'image' else chosen.mean()
  return jnp.square(options.keep_ratio - ratio).mean()


def token_spread(vectors: Array, keep: Array) -> Array:
  """The share of the tokens' variance that lies within images, f32[].

  It is 0 if the tokens of an image are copies of each other, however much images differ. Then they
  carry what one token could, and it does not matter how many there are, or where.

  Args:
    vectors: f32[B, N, C].
    keep: f32[B, N], 0 or 1.
  """
  weight = keep[..., None]
  counts = jnp.maximum(weight.sum(1, keepdims=True), 1)
  image_means = (weight * vectors).sum(1, keepdims=True) / counts
  mean = (weight * vectors).sum((0, 1)) / jnp.maximum(weight.sum(), 1)
  within = (weight * jnp.square(vectors - image_means)).sum()
  return within / jnp.maximum((weight * jnp.square(vectors - mean)).sum(), 1e-12)


def distinct_share(ids: Array, keep: Array) -> Array:
  """Of the tokens of an image, the share that are not copies of another one, f32[].

  Args:
    ids: of the codes, i32[B, N].
    keep: f32[B, N], 0 or 1.
  """
  sorted_ids = jnp.sort(jnp.where(keep > 0.5, ids, -1), axis=-1)  # dropped patches first
  is_new = jnp.diff(sorted_ids, axis=-1, prepend=-1) != 0
  return is_new.sum() / jnp.maximum(keep.sum(), 1)


def count_std(probabilities: Array) -> Array:
  """How the expected number of tokens differs between images, f32[], by probabilities f32[B, N].

  The unit is the standard deviation of a binomial count with one probability for all patches. It is
  0 if all images have the same expectation, and 1 if expectations differ as much as drawn counts do
  by chance.
  """
  mean = probabilities.mean()
  num_patches = probabilities.shape[-1]
  return probabilities.sum(-1).std() / jnp.sqrt(num_patches * mean * (1 - mean))


def _with_codebook(params: Tree, book: Codebook) -> Tree:
  return codebook.put_in(params, book.embedding)


def _start_if_due(
  options: TokenizerOptions, key: Array, book: Codebook, vectors: Array, weight: Array
) -> Codebook:
  """The codebook after k-means on the first quantized batch; as it is in every other step."""
  due = (book.step >= options.quantize_from) & ~book.started
  return jax.lax.cond(
    due,
    lambda book: codebook.start_from_kmeans(key, book, vectors, weight),
    lambda book: book,
    book,
  )


def _step_codebook(
  options: TokenizerOptions, key: Array, book: Codebook, vectors: Array, weight: Array, ids: Array
) -> Codebook:
  """The codebook after a batch; its codes move only once quantization has begun."""
  moved = codebook.update_codebook(
    key, book, vectors, weight, ids, options.decay, options.revive_after
  )
  embedding = jnp.where(book.started, moved.embedding, book.embedding)
  return moved._replace(embedding=embedding, step=book.step + 1)


def _codebook_average(revive_after: int) -> Average:
  """Averages the codebook with the parameters."""

  def split(average, book):
    params, embedding = codebook.take_out(average)
    return params, book._replace(embedding=embedding)

  def restart(average, old, new):
    params, embedding = codebook.take_out(average)
    return codebook.put_in(params, codebook.restart_average(embedding, old, new, revive_after))

  return Average(_with_codebook, split, restart)


def _export_metadata(book: Codebook) -> dict[str, str]:
  return dict(codebook='trained' if book.started else 'untrained')


def _warnings(options: TokenizerOptions, loaded: Mapping[str, Tree], num_steps: int) -> list[str]:
  lines = []
  if options.cross_attention_from and 'tokenizer' in loaded:
    lines.append(
      'the merger of init_from goes on with its cross-attention, whatever '
      'tokenizer.cross_attention_from says'
    )
  elif num_steps <= options.cross_attention_from:
    lines.append(
      f'num_steps={num_steps} ends before the merger takes in dropped patches '
      f'(tokenizer.cross_attention_from={options.cross_attention_from})'
    )
  if codebook.has_codebook(loaded):
    lines.append(
      'the codebook of init_from goes on: quantization begins with the first step, whatever '
      'tokenizer.quantize_from says'
    )
  elif num_steps <= options.quantize_from:
    lines.append(
      f'num_steps={num_steps} ends before quantization begins '
      f'(tokenizer.quantize_from={options.quantize_from}): the codebook stays untrained, and later '
      'stages will refuse the export'
    )
  return lines
