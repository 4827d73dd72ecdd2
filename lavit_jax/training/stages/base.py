"""What a training stage is made of, and what all stages do with modules and batches.

Axes: B images, N patches, D width of the features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lavit_jax.errors import UserError
from lavit_jax.models import vit
from lavit_jax.models.lavit import LavitModules
from lavit_jax.models.quantizer import l2_normalize
from lavit_jax.sharding import constrain_batch
from lavit_jax.training.optimizer import Hold

if TYPE_CHECKING:
  from lavit_jax.training.lora import BaseWeights

Tree = Any
ROW = '_row'  # key in a piece of a batch: i32[B], the indices of its rows in the whole batch


# --- Parts of a stage ----------------------------------------------------------------------------


class Mean(NamedTuple):
  """A metric that is a mean, f32[] each; pieces of a batch count by their weights."""

  total: Array  # the weighted values, summed
  weight: Array  # the weights, summed


class Sum(NamedTuple):
  """A metric that is a count or a sum, f32[]; it adds up over the pieces of a batch."""

  total: Array


class Average(NamedTuple):
  """How the moving average of a stage's parameters includes state that must match them."""

  join: Callable[[Tree, Any], Tree]
  """(params, state) -> the tree that is averaged."""
  split: Callable[[Tree, Any], tuple[Tree, Any]]
  """(average, state) -> (params, state) for evaluation and export."""
  restart: Callable[[Tree, Any, Any], Tree]
  """(average, old state, new state) -> the average, restarted where the state has jumped."""


class ModuleNames(NamedTuple):
  """The modules whose parameters a stage reads from folders."""

  needs: tuple[str, ...] = ()  # of earlier stages; frozen
  starts: tuple[str, ...] = ()  # of earlier stages; this one continues to train them
  takes: tuple[str, ...] = ()  # those that `init_from` may initialize
  zeros: tuple[str, ...] = ()  # zeros where `init_from` does not provide them

  @property
  def required(self) -> tuple[str, ...]:
    """Those without which the stage cannot begin."""
    return self.needs + self.starts


@dataclasses.dataclass(frozen=True)
class BatchLayout:
  """The sizes of a training batch."""

  batch_size: int
  image_size: int  # side of the images in pixels
  text_length: int = 0  # tokens that a text may have; 0 without texts
  max_images: int = 1  # images of an example, with an axis of their own if there are several
  shards: int = 1  # data-parallel shards: the mesh splits a batch over them
  accumulate: int = 1  # microbatches (gradient accumulation): a step computes them in turn

  @property
  def pieces(self) -> int:
    """The parts of a batch that are computed apart: the microbatches of all shards."""
    return self.shards * self.accumulate


class Stage(NamedTuple):
  """One training, as pure functions. `params` is {module name: tree} throughout.

  `frozen` below is the parameters of `modules.needs`. What is random about an example is drawn by
  `row_keys`, so that it does not depend on the piece of the batch that it is in.
  """

  modules: ModuleNames
  init: Callable[[Array, Mapping[str, Tree]], tuple[Tree, Any]]
  """(key, loaded params) -> (params, state)."""
  loss: Callable[..., tuple[Array, tuple[Any, dict]]]
  """(params, frozen, state, batch, key, train) -> (loss, (state, metrics)).

  Without `train`, as in evaluation, one-time events such as k-means do not happen. A metric is an
  array f32[], a `Mean` or a `Sum`. A `Mean` named 'loss' gives the weight with which the loss of a
  microbatch counts.
  """
  export: Callable[[Tree, Any], dict[str, Tree]]
  """(params, state) -> the params of the modules that the stage has made."""
  draw: Callable[..., list[Array]] | None = None
  """(params, frozen, state, batch, key) -> rows of images, uint8[n, H, W, 3] each."""
  hold: Callable[[Mapping[str, Tree]], tuple[Hold, ...]] | None = None
  """loaded params -> parameters that do not move in some of the steps."""
  average: Average | None = None
  export_metadata: Callable[[Any], dict[str, Any]] | None = None
  """state -> what the export's metadata says besides, as JSON."""
  base: BaseWeights | None = None
  """The dtypes of the frozen weights beside which adapters train (training/lora.py)."""
  warnings: Callable[[Mapping[str, Tree], int], list[str]] | None = None
  """(loaded params, number of steps) -> a line for each option without the expected effect."""


def frozen_params(stage: Stage, loaded: Mapping[str, Tree]) -> dict[str, Tree]:
  """The params of `modules.needs`, less those leaves that a stage with adapters trains."""
  needed = {name: loaded[name] for name in stage.modules.needs}
  return needed if stage.base is None else stage.base.without_trained(needed)


# --- Modules and batches -------------------------------------------------------------------------


def apply_module(module: Any, params: Tree, *args: Any, **kwargs: Any) -> Any:
  """`module.apply` on a bare tree of parameters."""
  return module.apply({'params': params}, *args, **kwargs)


def row_keys(key: Array, batch: Mapping[str, Array], size: int, count: int = 1) -> Array:
  """A key for each row of a batch, by its row in the whole batch.

  So the pieces of a batch draw what the whole batch draws.

  Args:
    key: of the step.
    batch: a batch, or a piece of one, which has its rows under `ROW`.
    size: the number of its rows.
    count: keys of a row, such as one for each of its images.

  Returns:
    Typed keys [size * count].
  """
  rows = constrain_batch(batch.get(ROW, jnp.arange(size, dtype=jnp.int32)))
  if count > 1:
    rows = (rows[:, None] * count + jnp.arange(count, dtype=jnp.int32)).reshape(-1)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


def image_features(model: LavitModules, params: Tree, images: Array) -> Array:
  """The ViT's features of images.

  The loader resizes, by Pillow as at inference: `jax.image.resize` does not round and clip between
  its passes, and so shows the ViT other edges.

  Args:
    model: the modules.
    params: of the ViT.
    images: uint8[B, H, W, 3] of the size that the ViT takes.

  Returns:
    Features [B, 1 + N, D]; the first is the class token's.

  Raises:
    ValueError: the images have another size.
  """
  side = model.image_size
  if images.shape[1:3] != (side, side):
    raise ValueError(f'the ViT takes images of {side} x {side}, not {list(images.shape)}')
  return apply_module(model.vit, params, vit.preprocess(images))


def vit_images(batch: Mapping[str, Array]) -> Array:
  """The images of a batch at the ViT's size: 'vit_image', or 'image' if that has this size.

  uint8[B, V, V, 3], or uint8[B * K, V, V, 3] if a row has K images.
  """
  return flat_images(batch['vit_image'] if 'vit_image' in batch else batch['image'])


def flat_images(images: Array) -> Array:
  """uint8[B, K, H, W, 3], or uint8[B, H, W, 3], as uint8[B * K, H, W, 3]."""
  return images.reshape(-1, *images.shape[-3:])


def cosine_similarity(x: Array, y: Array) -> Array:
  """[..., D] and [..., D] -> f32[...]."""
  return (l2_normalize(x) * l2_normalize(y)).sum(-1)


def initialize_params(fresh: Mapping[str, Tree], loaded: Mapping[str, Tree]) -> dict[str, Tree]:
  """`fresh` params, with those of loaded modules in place of the fresh ones.

  A language model with a smaller vocabulary keeps its embeddings and gets fresh ones for [IMG],
  [/IMG] and the codes.

  Raises:
    UserError: an array is missing, unknown or of another shape.
  """
  params = {}
  for name, tree in fresh.items():
    params[name] = _replace_params(name, tree, loaded[name]) if name in loaded else tree
  return params


def _replace_params(module: str, fresh: Tree, loaded: Tree) -> Tree:
  if jax.tree.structure(fresh) != jax.tree.structure(loaded):
    expected = _array_names(fresh)
    present = _array_names(loaded)
    raise UserError(
      f'{module}: missing {sorted(expected - present)[:5]}, '
      f'unexpected {sorted(present - expected)[:5]} in the weights of init_from; give a checkpoint '
      'with the variant and settings of this run'
    )
  return jax.tree_util.tree_map_with_path(_replace_array, fresh, loaded)


def _replace_array(path, fresh: Array, loaded: Array) -> Array:
  if fresh.shape == loaded.shape:
    return jnp.asarray(loaded, fresh.dtype)
  name = jax.tree_util.keystr(path, simple=True, separator='/')
  grows = loaded.ndim == fresh.ndim and all(
    small <= large for small, large in zip(loaded.shape, fresh.shape, strict=True)
  )
  if grows and name in ('embedding', 'head'):
    return fresh.at[tuple(slice(size) for size in loaded.shape)].set(loaded)
  raise UserError(
    f'{name}: the weights of init_from are {list(loaded.shape)}, the model of this run has '
    f'{list(fresh.shape)}; give a checkpoint of the same variant'
  )


def _array_names(tree: Tree) -> set[str]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in leaves}
