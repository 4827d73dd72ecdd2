"""What a training is made of, and what every training does with the parts of the model.

Axes: B images, N patches, D width of the features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.errors import UserError
from lavit_jax.models import vit
from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.tokenizer import l2_normalize
from lavit_jax.sharding import constrain_batch

Tree = Any
ROW = '_row'  # of a batch that is a piece of a larger one: i32[B], the rows that it has there


class Mean(NamedTuple):
  """A metric that is a mean: f32[] total of weighted values, and f32[] sum of the weights. Pieces of a batch count by their weights."""

  total: Array
  weight: Array


class Sum(NamedTuple):
  """A metric that is a count or a sum, f32[]: it adds up over the pieces of a batch."""

  total: Array


class Average(NamedTuple):
  """How the moving average of a stage's parameters takes along what of its state must match them.

  join(params, state) -> the tree that is averaged.
  part(average, state) -> (params, state) for evaluation and export.
  settle(average, old state, new state) -> the average, begun anew where the state has jumped and does not move on.
  """

  join: Callable
  part: Callable
  settle: Callable


class Stage(NamedTuple):
  """One training. `parts` are trees of parameters by part name.

  needs: parts of earlier stages that stay as they are; `frozen` below.
  starts: parts of earlier stages that this one goes on with.
  init(key, parts) -> (params, state): `parts` holds `needs`, `starts`, and whatever `init_from` offers.
  loss(params, frozen, state, batch, key, train) -> (loss, (state, metrics)): `train` False leaves one-time events alone. A metric is an
    array f32[], a Mean or a Sum; a Mean `loss` says by what the loss of a piece of a batch counts. What is random is drawn by `row_keys`.
  export(params, state) -> parts.
  draw(params, frozen, state, batch, key) -> rows of pictures, uint8[n, H, W, 3] each; None if there is nothing to see.
  hold: (regex, step) pairs of parameters that stop moving at that step.
  zeros: parts that are zeros where `init_from` does not offer them.
  takes: parts that `init_from` may offer.
  hold_of(parts) -> the pairs in place of `hold`, where they depend on what is offered.
  average: what of the state is averaged with the parameters.
  about(state) -> what an export says of itself besides, JSON.
  """

  needs: tuple[str, ...]
  starts: tuple[str, ...]
  init: Callable
  loss: Callable
  export: Callable
  draw: Callable | None = None
  hold: tuple[tuple[str, int], ...] = ()
  zeros: tuple[str, ...] = ()
  takes: tuple[str, ...] = ()
  hold_of: Callable | None = None
  average: Average | None = None
  about: Callable | None = None


def apply_module(module, params: Tree, *args, **kwargs):
  """`module.apply` on a bare tree of parameters."""
  return module.apply({'params': params}, *args, **kwargs)


def row_keys(key: Array, batch: dict, size: int) -> Array:
  """A key for each of the `size` rows of a batch. They go by the row in the whole batch: pieces draw what the whole draws."""
  rows = constrain_batch(batch.get(ROW, jnp.arange(size, dtype=jnp.int32)))
  return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


def image_features(model: LavitModules, params: Tree, images: Array) -> Array:
  """uint8[B, H, W, 3] of the size that the ViT takes -> its features [B, 1 + N, D].

  Resizing is the loader's, by Pillow as at inference: `jax.image.resize` does not round and clip
  between its passes, and so shows the ViT other edges.
  """
  side = model.image_size
  if images.shape[1:3] != (side, side):
    raise ValueError(f'the ViT takes images of {side} x {side}, not {list(images.shape)}')
  return apply_module(model.vit, params, vit.preprocess(images))


def vit_images(batch: dict) -> Array:
  """The images of a batch at the ViT's size: 'vit_image', or 'image' if that has this size."""
  return batch['vit_image'] if 'vit_image' in batch else batch['image']


def cosine_similarity(x: Array, y: Array) -> Array:
  """[..., D] twice -> f32[...]."""
  return (l2_normalize(x) * l2_normalize(y)).sum(-1)


def initialize_params(params: Tree, parts: dict) -> Tree:
  """`params` with the parts that earlier stages (or `init_from`) offer in place of fresh ones.

  A language model with a smaller vocabulary keeps its rows and gets fresh ones for [IMG], [/IMG] and the codes.

  Raises:
    UserError: a leaf is missing, unknown or of another shape.
  """

  def fit(path, fresh, given):
    if fresh.shape == given.shape:
      return jnp.asarray(given, fresh.dtype)
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if name in ('embedding', 'head') and all(g <= f for g, f in zip(given.shape, fresh.shape)):
      return fresh.at[tuple(slice(n) for n in given.shape)].set(given)
    raise UserError(
      f'{name}: the given weights are {list(given.shape)}, the model wants {list(fresh.shape)}'
    )

  def take(name):
    if name not in parts:
      return params[name]
    if jax.tree.structure(params[name]) != jax.tree.structure(parts[name]):
      ours, theirs = (
        set(
          jax.tree_util.keystr(p, simple=True, separator='/')
          for p, _ in jax.tree_util.tree_leaves_with_path(t)
        )
        for t in (params[name], parts[name])
      )
      raise UserError(
        f'{name}: missing {sorted(ours - theirs)[:5]}, unexpected {sorted(theirs - ours)[:5]} in the given weights'
      )
    return jax.tree_util.tree_map_with_path(fit, params[name], parts[name])

  return {name: take(name) for name in params}


def shade_dropped(images: Array, keep: Array) -> Array:
  """Pictures uint8[B, H, W, 3] with the patches that keep f32[B, N] drops washed out."""
  side = round(keep.shape[1] ** 0.5)
  mask = keep.reshape(-1, side, side, 1)
  mask = mask.repeat(images.shape[1] // side, 1).repeat(images.shape[2] // side, 2)
  return (images * (0.15 + 0.85 * mask) + 217 * (1 - mask)).clip(0, 255).astype(jnp.uint8)


def feature_colors(x: Array, y: Array, size: int) -> list[Array]:
  """Directions of features and of their reconstruction f32[B, N, D] as colours: the first three principal axes of the former,
  uint8[B, size, size, 3] each. The length is left out: the loss does not see it.
  """
  side, x, y = round(x.shape[1] ** 0.5), l2_normalize(x), l2_normalize(y)
  mean = x.mean((0, 1))
  _, _, axes = jnp.linalg.svd((x - mean).reshape(-1, x.shape[-1]), full_matrices=False)
  shown = [(f - mean) @ axes[:3].T for f in (x, y)]
  scale = 2 * shown[0].std((0, 1))
  return [
    (
      (127.5 + 127.5 * (s / scale).clip(-1, 1))
      .astype(jnp.uint8)
      .reshape(-1, side, side, 3)
      .repeat(size // side, 1)
      .repeat(size // side, 2)
    )
    for s in shown
  ]
