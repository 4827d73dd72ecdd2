"""The first stage of BLIP-2's Q-Former: images and captions, without a language model.

Three losses with equal weights: which caption belongs to an image (contrast), whether a caption
belongs to an image (matching, with hard negatives), and the next word of a caption that sees the
queries (captioning). Their negatives are those of the whole batch, on all devices. Source: Li et
al. 2023, BLIP-2, section 3.2.

One departure: captions are read in the tokens of `data.tokenizer_folder`, where the published code
has BERT's, since what goes on to stage `lm` reads no text.

Axes: B images, T tokens of a caption, V text vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.data.text import BEGIN, END
from lavit_jax.errors import UserError
from lavit_jax.models.initialization import init_params
from lavit_jax.models.interfaces.qformer import QFormerInterface
from lavit_jax.models.interfaces.qformer_pretraining import QFormerPretraining
from lavit_jax.models.lavit import LavitModules
from lavit_jax.training.config import read_options
from lavit_jax.training.stages.base import (
  BatchLayout,
  ModuleNames,
  Stage,
  Tree,
  apply_module,
  initialize_params,
  row_keys,
  vit_images,
)
from lavit_jax.visualization import similarity_cells

MODULES = ModuleNames(needs=('vit',))
INTERFACE = 'qformer'
SPECIAL_TOKENS = 2  # of a caption, besides its text: begin and end


@dataclasses.dataclass(frozen=True)
class QFormerOptions:
  """The section `qformer` of the config."""

  output_dim: int  # of the space in which images and captions are compared
  dropout_rate: float

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> QFormerOptions:
    """Reads them from a config."""
    return read_options(cls, config['qformer'], 'qformer')


def check_captions(
  shares: Mapping[str, float],
  sources: Sequence[Mapping[str, Any]] = (),
  heldout: Sequence[Mapping[str, Any]] = (),
) -> None:
  """Checks that all texts are captions of their images.

  Raises:
    UserError: a share or a source has another use.
  """
  reason = 'stage qformer learns from images with captions alone'
  for use, share in shares.items():
    if share and use != 'caption':
      raise UserError(f'data.shares.{use}={share}: {reason}; give data.shares.{use}=0')
  for key, all_sources in (('sources', sources), ('heldout', heldout)):
    for number, source in enumerate(all_sources):
      use = source.get('use', '')
      if use not in ('', 'caption'):  # without a use, it follows the shares
        raise UserError(f"data.{key}[{number}] has use {use!r}: {reason}; give it use 'caption'")


def build(options: QFormerOptions, model: LavitModules, layout: BatchLayout) -> Stage:
  """Contrast, matching and captioning; exports the interface of stage `lm`.

  Its Linear into the language model is fresh: it trains in stage `lm`.

  Raises:
    UserError: a batch of one, which has no negatives.
  """
  if layout.batch_size < 2:
    raise UserError('batch_size=1: the negatives of a pair are the others of the batch; give more')
  interface = model.interface
  assert isinstance(interface, QFormerInterface)
  decode_id = model.vocabulary.text_size
  pretraining = QFormerPretraining(
    num_queries=interface.num_queries,
    hidden_size=interface.hidden_size,
    num_layers=interface.num_layers,
    num_heads=interface.num_heads,
    mlp_dim=interface.mlp_dim,
    vocab_size=decode_id + 1,
    output_dim=options.output_dim,
    max_positions=layout.text_length + SPECIAL_TOKENS,
    dropout_rate=options.dropout_rate,
    dtype=interface.dtype,
    remat=interface.remat,
  )

  def init(key, loaded):
    features = jnp.zeros((2, model.tower.num_features, model.vit.hidden_size))
    text = jnp.zeros((2, layout.text_length + SPECIAL_TOKENS), jnp.int32)
    keys = jax.random.split(key, (2, 2))
    inputs = (features, text, text > -1, keys)
    fresh = pretraining.init(key, *inputs, decode_id=decode_id)['params']
    projection = init_params(model, key, ('interface',))['interface']['vit_proj']
    return initialize_params({INTERFACE: fresh}, loaded), {'vit_proj': projection}

  def loss(params, frozen, state, batch, key, train):
    features = model.tower.features(frozen['vit'], vit_images(batch))
    text, text_mask = mark_captions(batch['text'], batch['text_length'])
    negatives_key, dropout_key = jax.random.split(key)
    keys = row_keys(negatives_key, batch, len(text))
    losses = apply_module(
      pretraining,
      params[INTERFACE],
      features,
      text,
      text_mask,
      jax.vmap(lambda row: jax.random.split(row, 2))(keys),
      decode_id=decode_id,
      key=dropout_key if train else None,
    )
    metrics = dict(
      contrastive=losses.contrastive,
      matching=losses.matching,
      captioning=losses.captioning,
      accuracy=losses.image_to_text,
      matched=losses.matched,
      temperature=params[INTERFACE]['temperature'],
    )
    return losses.total, (state, metrics)

  def export(params, state):
    like = jax.eval_shape(lambda: init_params(model, jax.random.key(0), ('interface',)))
    return {'interface': take_params({**params[INTERFACE], **state}, like['interface'])}

  def draw(params, frozen, state, batch, key):
    """Similarities: images down, captions across; the diagonal should be bright."""
    del state, key
    features = model.tower.features(frozen['vit'], vit_images(batch))
    text, text_mask = mark_captions(batch['text'], batch['text_length'])
    similarities = apply_module(
      pretraining, params[INTERFACE], features, text, text_mask, method='similarities'
    )
    return [similarity_cells(similarities)]

  return Stage(MODULES, init, loss, export, draw)


def mark_captions(text: Array, length: Array) -> tuple[Array, Array]:
  """Adds the begin and end tokens of captions.

  Args:
    text: ids i32[B, T], padded.
    length: i32[B].

  Returns:
    ids i32[B, T + 2], and bool[B, T + 2], False in padding.
  """
  slots = jnp.arange(text.shape[1] + SPECIAL_TOKENS)
  end = length[:, None] + 1
  marked = jnp.pad(text, ((0, 0), (1, 1))).at[:, 0].set(BEGIN)
  return jnp.where(slots == end, END, marked), slots <= end


def take_params(params: Tree, like: Tree) -> Tree:
  """The arrays of `params` that a tree with fewer of them has."""
  if not isinstance(like, Mapping):
    return params
  return {name: take_params(params[name], inner) for name, inner in like.items()}
