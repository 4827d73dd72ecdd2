"""The image encoder: contrastive image-text training of the ViT (CLIP), in the role of EVA-CLIP.

LaVIT takes a trained encoder for granted. The tiny variants train theirs here; the large ones are
converted. Axes: B images, N patches, D width of the features, P width of the shared space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.data.emoji import splits
from lavit_jax.errors import UserError
from lavit_jax.models import vit
from lavit_jax.models.initialization import init_params
from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.llama import Llama
from lavit_jax.models.packing import segment_mask
from lavit_jax.models.quantizer import l2_normalize
from lavit_jax.training.config import read_options
from lavit_jax.training.stages.base import (
  BatchLayout,
  ModuleNames,
  Stage,
  Tree,
  apply_module,
  image_features,
  initialize_params,
)
from lavit_jax.visualization import similarity_cells

MODULES = ModuleNames(takes=('vit',))
INITIAL_TEMPERATURE = 0.07
MAX_LOGIT_SCALE = 100.0


@dataclasses.dataclass(frozen=True)
class TextTowerOptions:
  """The sizes of the text tower, a small language model."""

  hidden_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int


@dataclasses.dataclass(frozen=True)
class EncoderOptions:
  """The options that configs of this stage have besides the common ones."""

  text_tower: TextTowerOptions
  pixel_weight: float  # of the pixels' error in the loss
  place_weight: float  # of the places' error in the loss
  name_weight: float = 0.0  # of the objects' names and groups in the loss, if composed

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> EncoderOptions:
    """Reads them from a config."""
    tower = read_options(TextTowerOptions, config['text_tower'], 'text_tower')
    return read_options(cls, {**config, 'text_tower': tower})


def build(options: EncoderOptions, model: LavitModules, layout: BatchLayout) -> Stage:
  """Symmetric cross-entropy over the batch, with a learned temperature.

  A patch must also predict its own pixels and its place. EVA's features come from masked image
  modeling and stay local; those of the contrastive loss alone become the same at every patch of an
  image, and then no token could say what is where. With `name_weight`, a patch must also tell the
  group of the object that it shows, and the patches of an object together its name.

  Raises:
    UserError: the images have another size than the ViT takes.
  """
  if layout.image_size != model.image_size:
    raise UserError(
      f'data.image_size={layout.image_size}: the encoder of variant {model.variant} learns from '
      f'{model.image_size} pixels a side'
    )
  tower = Llama(
    vocab_size=model.vocabulary.text_size,
    dtype=model.vit.dtype,
    remat=model.vit.remat,
    **dataclasses.asdict(options.text_tower),
  )

  def init(key, loaded):
    vit_key, text_key, projection_key, pixel_key, place_key = jax.random.split(key, 5)
    name_key = jax.random.fold_in(key, 5)
    width = tower.hidden_size
    projection = jax.random.normal(projection_key, (width, model.vit.output_dim)) * width**-0.5
    num_pixels = 3 * model.vit.patch_size**2
    fresh = dict(
      **init_params(model, vit_key, ('vit',)),
      text=_init_tower(tower, text_key),
      text_proj=dict(kernel=projection),
      to_pixels=jax.random.normal(pixel_key, (model.vit.hidden_size, num_pixels)),
      to_place=jax.random.normal(place_key, (model.vit.hidden_size, 2)),
      temperature=jnp.log(1 / INITIAL_TEMPERATURE),
    )
    if options.name_weight:
      width = model.vit.hidden_size
      num_groups = 1 + max(_groups_of_concepts())
      for number, (name, size) in enumerate(
        (('to_name', len(splits.concept_names())), ('to_group', 1 + num_groups))
      ):
        reader_key = jax.random.fold_in(name_key, number)
        fresh[name] = jax.random.normal(reader_key, (width, size)) * width**-0.5
    return initialize_params(fresh, loaded), {}

  def embed(params, batch):
    """-> (features [B, 1 + N, D], unit vectors of the images f32[B, P], of the texts f32[B, P])."""
    x = image_features(model, params['vit'], batch['image'])
    image = apply_module(model.vit, params['vit'], x, method='pooled')
    text = _last_hidden(tower, params['text'], batch['text'], batch['text_length'])
    text = text.astype(jnp.float32) @ params['text_proj']['kernel']
    return x, l2_normalize(image), l2_normalize(text)

  def loss(params, frozen, state, batch, key, train):
    del frozen, key, train
    x, image, text = embed(params, batch)
    scale = jnp.exp(jnp.minimum(params['temperature'], jnp.log(MAX_LOGIT_SCALE)))
    logits = scale * image @ text.T
    # Equal captions are no negatives of each other.
    same = (batch['text'][:, None] == batch['text']).all(-1)
    target = same / same.sum(-1, keepdims=True)
    contrastive = (_cross_entropy(target, logits) + _cross_entropy(target, logits.T)) / 2
    pixel = _pixel_error(model, params['to_pixels'], x, batch['image'])
    place = _place_error(model, params['to_place'], x)
    hit = jnp.take_along_axis(same, logits.argmax(-1)[:, None], axis=-1)
    metrics = dict(
      contrastive=contrastive,
      pixel=pixel,
      place=place,
      accuracy=hit.mean(),
      temperature=jnp.exp(-params['temperature']),
    )
    value = contrastive + options.pixel_weight * pixel + options.place_weight * place
    if options.name_weight:
      objects = (_object_shares(model, batch), batch['object_names'])
      name, metrics['name_accuracy'] = _name_error(params['to_name'], x, *objects)
      group = _group_error(params['to_group'], x, *objects)
      metrics |= dict(name=name, group=group)
      value += options.name_weight * (name + group)
    return value, (state, metrics)

  def export(params, state):
    del state
    return dict(vit=params['vit'])

  def draw(params, frozen, state, batch, key):
    """Similarities: images down, captions across; the diagonal should be bright."""
    del frozen, state, key
    _, image, text = embed(params, batch)
    return [similarity_cells(image @ text.T)]

  return Stage(MODULES, init, loss, export, draw)


def _init_tower(tower: Llama, key: Array) -> Tree:
  hidden = jnp.zeros((1, 1, tower.hidden_size))
  positions = jnp.zeros((1, 1), jnp.int32)
  mask = jnp.ones((1, 1, 1, 1), bool)
  return tower.init(key, hidden, positions, mask)['params']


def _last_hidden(tower: Llama, params: Tree, ids: Array, length: Array) -> Array:
  """The hidden state of the last token of each text; ids i32[B, T], length i32[B] -> [B, width]."""
  slots = jnp.arange(ids.shape[1])
  mask = segment_mask((slots < length[:, None]).astype(jnp.int32))
  positions = jnp.broadcast_to(slots, ids.shape)
  embedded = apply_module(tower, params, ids, method='embed')
  hidden, _ = apply_module(tower, params, embedded, positions, mask)
  last = jnp.maximum(length - 1, 0)
  return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def _cross_entropy(target: Array, logits: Array) -> Array:
  return -(target * jax.nn.log_softmax(logits)).sum(-1).mean()


def _pixel_error(model: LavitModules, kernel: Array, features: Array, images: Array) -> Array:
  """The mean squared error of a linear prediction of the patches' pixels, f32[].

  The kernel's columns are short, so that the features cannot hide the image in components that
  are too small to survive the tokenizer.

  Args:
    model: the modules.
    kernel: f32[D, pixels of a patch].
    features: [B, 1 + N, D].
    images: uint8[B, H, W, 3].
  """
  kernel = 0.5 * l2_normalize(kernel.T).T
  predicted = jax.nn.standardize(features[:, 1:].astype(jnp.float32)) @ kernel
  patch = model.vit.patch_size
  side = model.image_size // patch
  true = vit.preprocess(images).reshape(-1, side, patch, side, patch, 3).swapaxes(2, 3)
  return jnp.square(predicted - true.reshape(predicted.shape)).mean()


def _object_shares(model: LavitModules, batch: Tree) -> Array:
  """How much of each patch each object covers, f32[B, N, objects].

  Raises:
    UserError: the batch does not have its objects, because it is not composed.
  """
  if 'object_map' not in batch:
    raise UserError('name_weight needs composed images: set data.sources=() or name_weight=0')
  patch = model.vit.patch_size
  side = model.image_size // patch
  object_map = batch['object_map'].reshape(-1, side, patch, side, patch)
  shares = []
  for number in range(1, 1 + batch['object_names'].shape[1]):
    share = (object_map == number).mean((2, 4), dtype=jnp.float32)
    shares.append(share.reshape(-1, side * side))
  return jnp.stack(shares, -1)


def _name_error(kernel: Array, features: Array, shares: Array, names: Array) -> tuple[Array, Array]:
  """The cross-entropy of a linear reader of an object's name, from the mean of its patches.

  Args:
    kernel: f32[D, concepts].
    features: [B, 1 + N, D].
    shares: f32[B, N, objects], of the patches.
    names: i32[B, objects], -1 where there is none.

  Returns:
    The mean over the objects f32[], and the share of right names f32[].
  """
  x = jax.nn.standardize(features[:, 1:].astype(jnp.float32))
  weights = shares / jnp.maximum(shares.sum(1, keepdims=True), 1e-6)
  logits = jnp.einsum('bnd,bno->bod', x, weights) @ kernel
  is_object = names >= 0
  count = jnp.maximum(is_object.sum(), 1)
  log_names = jax.nn.log_softmax(logits)
  target = jnp.maximum(names, 0)
  error = -jnp.take_along_axis(log_names, target[..., None], -1)[..., 0]
  hit = is_object & (logits.argmax(-1) == names)
  return (error * is_object).sum() / count, hit.sum() / count


def _group_error(kernel: Array, features: Array, shares: Array, names: Array) -> Array:
  """The cross-entropy of a linear reader of a patch: the background, or the group of its object.

  An object must cover a third of the patch, or the background 95% of it; others do not count.
  Background and objects have the same weight.

  Args:
    kernel: f32[D, 1 + groups].
    features: [B, 1 + N, D].
    shares: f32[B, N, objects], of the patches.
    names: i32[B, objects], -1 where there is none.
  """
  group_of = jnp.array(_groups_of_concepts())
  largest = shares.argmax(-1)
  name = jnp.maximum(jnp.take_along_axis(names, largest, axis=1), 0)
  is_object = shares.max(-1) >= 1 / 3
  is_background = shares.sum(-1) <= 0.05
  label = jnp.where(is_object, 1 + group_of[name], 0)
  x = jax.nn.standardize(features[:, 1:].astype(jnp.float32))
  error = -jnp.take_along_axis(jax.nn.log_softmax(x @ kernel), label[..., None], -1)[..., 0]
  objects = (error * is_object).sum() / jnp.maximum(is_object.sum(), 1)
  background = (error * is_background).sum() / jnp.maximum(is_background.sum(), 1)
  return (objects + background) / 2


def _groups_of_concepts() -> list[int]:
  groups = splits.concept_groups()
  names = tuple(dict.fromkeys(groups.values()))
  return [names.index(group) for group in groups.values()]


def _place_error(model: LavitModules, kernel: Array, features: Array) -> Array:
  """The mean squared error of a linear prediction of where the patches are, f32[].

  Args:
    model: the modules.
    kernel: f32[D, 2].
    features: [B, 1 + N, D].
  """
  kernel = l2_normalize(kernel.T).T
  predicted = jax.nn.standardize(features[:, 1:].astype(jnp.float32)) @ kernel
  side = jnp.linspace(-1, 1, model.image_size // model.vit.patch_size)
  true = jnp.stack(jnp.meshgrid(side, side, indexing='ij'), -1).reshape(-1, 2)
  return jnp.square(predicted - true).mean()
