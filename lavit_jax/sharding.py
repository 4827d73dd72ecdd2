"""Where every array lives on the mesh of `data`, `fsdp` and `tensor`.

Parameters follow a table of (regex, PartitionSpec). It is matched against the paths of the train
state, optimizer included: an Adam moment carries the path of its parameter, so one rule shards a
parameter and all that belongs to it. Scanned layers have a leading axis that is never split; the
specs are right-aligned for that reason.

A batch is split over `data` and `fsdp` together. The modules of `models/` keep it so with
`constrain_batch`, and need no other functions of this file but `num_shards` and `per_shard`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lavit_jax.errors import UserError

BATCH_AXES = ('data', 'fsdp')  # the mesh axes that a batch is split over
TENSOR_AXIS = 'tensor'  # the mesh axis that heads and hidden units are split over
AXES = (*BATCH_AXES, TENSOR_AXIS)
BATCH = P(BATCH_AXES)
LARGE = 1 << 20  # elements; a smaller leaf needs no rule, and every device keeps a copy of it

Rules = Sequence[tuple[str, P]]

# Specs of the last axes of a leaf; the first rule that matches counts. A kernel into a block has
# its output split over `tensor`, a kernel out of a block its input.
INTO_BLOCK = r'/(qkv|kv|query|key|value|to_[qkv]|gate|up|fc1|fc_in|proj_in|linear_1)/kernel$'
OUT_OF_BLOCK = r'/(proj|to_out|down|fc2|proj_out|linear_2)/kernel$'
RULES: Rules = (
  (INTO_BLOCK, P('fsdp', 'tensor')),  # [..., D, F]
  (OUT_OF_BLOCK, P('tensor', 'fsdp')),  # [..., F, D]
  (r'/(vit_proj|text_proj|context_proj_\d+|time_emb_proj|head)/kernel$', P('fsdp', 'tensor')),
  (r'/(conv\w*|patch_embed)/kernel$', P('fsdp', 'tensor')),  # [h, w, in, out]
  (r'(^state|/quantizer)/embedding$', P()),  # the codebook, [K, C]
  (r'/(embedding|word_embed)$', P('tensor', 'fsdp')),  # [V, D]
  (r'/head$', P('fsdp', 'tensor')),  # [D, V]
  (r'/lora/a$', P('fsdp', None)),  # [..., I, r], of an adapter
  (r'/lora/b$', P(None, 'fsdp')),  # [..., r, O]
)


# --- The mesh ------------------------------------------------------------------------------------


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh with `sizes` = {data, fsdp, tensor} over all devices.

  Neighbors in the mesh are neighbors in the pod. Over several slices only `data` runs across them:
  it alone can bear the slow network between slices.

  Args:
    sizes: of each axis; -1 (at most once) takes the remaining devices.
    devices: of a described topology; None takes those of this job.

  Raises:
    UserError: the sizes do not multiply to the number of devices, or `data` is not a multiple of
      the number of slices.
  """
  devices = jax.devices() if devices is None else devices
  shape = _mesh_shape(sizes, len(devices))
  slices = _count_slices(devices)
  if shape[0] % slices:
    raise UserError(
      f'mesh: {_format_sizes(sizes)} does not fit {slices} slices; '
      f'data must be a multiple of {slices}'
    )
  if slices > 1:
    within_slice = [shape[0] // slices, *shape[1:]]
    across_slices = [slices, 1, 1]
    array = mesh_utils.create_hybrid_device_mesh(
      within_slice, across_slices, devices, allow_split_physical_axes=True
    )
  else:
    array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _mesh_shape(sizes: Mapping[str, int], num_devices: int) -> list[int]:
  shape = [sizes[axis] for axis in AXES]
  known = math.prod(size for size in shape if size != -1)
  if shape.count(-1) == 1 and known > 0 and num_devices % known == 0:
    shape[shape.index(-1)] = num_devices // known
  if math.prod(shape) != num_devices or min(shape) < 1:
    raise UserError(
      f'mesh: {_format_sizes(sizes)} does not fit {num_devices} device(s); '
      f'the product must be {num_devices} (-1 takes the remaining devices)'
    )
  return shape


def _count_slices(devices: Sequence[Any]) -> int:
  if devices[0].platform != 'tpu':
    return 1
  return len({getattr(device, 'slice_index', None) for device in devices})


def _format_sizes(sizes: Mapping[str, int]) -> str:
  return ', '.join(f'{axis}={sizes[axis]}' for axis in AXES)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
  """The number of pieces that a batch is split into."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


# --- Parameters and optimizer state --------------------------------------------------------------


def path_name(path: Sequence[Any]) -> str:
  """A jax key path as 'params/vit/blocks/attn/qkv/kernel'."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator='/')


def spec(name: str, shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> P:
  """The spec of a leaf by the first rule that matches its name, right-aligned to its axes.

  A mesh axis that does not divide its dimension moves to another dimension of the rule that it
  divides, and is left out if there is none: 1408 is no multiple of 256.

  Args:
    name: the path of the leaf (`path_name`).
    shape: of the leaf.
    mesh: with axes `AXES`.
    rules: (regex, spec) pairs.

  Raises:
    ValueError: a leaf of `LARGE` elements or more that no rule matches.
  """
  rule = _find_rule(name, rules)
  if rule is None:
    if math.prod(shape) >= LARGE:
      raise ValueError(f'{name} {list(shape)} is large, and no rule of sharding.RULES matches it')
    return P()
  width = min(len(rule), len(shape))
  leading = len(shape) - width
  preferred = rule[len(rule) - width :]

  def divides(axis: str, dimension: int) -> bool:
    return mesh.shape[axis] > 1 and shape[leading + dimension] % mesh.shape[axis] == 0

  axes: list[str | None] = [None] * width
  for dimension, axis in enumerate(preferred):
    if axis is not None and divides(axis, dimension):
      axes[dimension] = axis
  for axis in preferred:
    if axis is None or axis in axes:
      continue
    for dimension in range(width):
      if axes[dimension] is None and divides(axis, dimension):
        axes[dimension] = axis
        break
  return P(*[None] * leading, *axes)


def _find_rule(name: str, rules: Rules) -> P | None:
  # The integers of an Int8 matrix lie transposed under the matrix's name (models/int8.py).
  matrix = name.removesuffix('/values')
  for regex, rule in rules:
    if re.search(regex, matrix):
      return rule if matrix == name else P(*reversed(rule))
  return None


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
  """A NamedSharding for every leaf of a tree of arrays, or of a result of `jax.eval_shape`."""

  def leaf_sharding(path, leaf) -> NamedSharding:
    return NamedSharding(mesh, spec(path_name(path), np.shape(leaf), mesh, rules))

  return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


# --- Batches -------------------------------------------------------------------------------------


class ProcessShare(NamedTuple):
  """The part of a global batch that one process reads.

  Attributes:
    rows: i64[n], ascending: the rows of the global batch on the devices of this process.
    index: the number of this share among all different shares.
    count: of different shares.
  """

  rows: np.ndarray
  index: int
  count: int


def process_share(mesh: Mesh, batch_size: int) -> ProcessShare:
  """The rows that this process must read.

  Processes whose devices differ only along `tensor` have the same share.

  Raises:
    UserError: two processes would have some rows in common and others not.
  """
  process_rows: dict[int, set[int]] = {}
  indices = NamedSharding(mesh, BATCH).devices_indices_map((batch_size,))
  for device, (rows,) in indices.items():
    of_process = process_rows.setdefault(device.process_index, set())
    of_process.update(range(*rows.indices(batch_size)))
  shares = sorted({tuple(sorted(rows)) for rows in process_rows.values()})
  disjoint = sum(len(rows) for rows in shares) == batch_size
  equal_lengths = len({len(rows) for rows in shares}) == 1
  if not (disjoint and equal_lengths):
    raise UserError(
      'mesh: the pieces of a batch do not fall evenly to the processes; '
      'tensor must divide their devices, or be a multiple of them'
    )
  own = tuple(sorted(process_rows[jax.process_index()]))
  return ProcessShare(np.array(own), shares.index(own), len(shares))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, share: ProcessShare) -> dict[str, Array]:
  """This process's rows as global arrays, split over `data` and `fsdp`.

  Args:
    batch: arrays [n, ...], n the number of rows in `share`.
    mesh: of the job.
    share: of this process (`process_share`).

  Raises:
    AssertionError: an array with another number of rows.
  """
  num_rows = len(share.rows)
  chex.assert_tree_shape_prefix(dict(batch), (num_rows,))
  batch_size = num_rows * share.count
  sharding = NamedSharding(mesh, BATCH)

  def put(x: np.ndarray) -> Array:
    def device_rows(index: Any) -> np.ndarray:
      start, stop, _ = index[0].indices(batch_size)
      first = int(np.searchsorted(share.rows, start))
      return x[first : first + stop - start]

    return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, device_rows)

  return {key: put(x) for key, x in batch.items()}


# --- Inside the program --------------------------------------------------------------------------


def constrain_batch(x: Array) -> Array:
  """Keeps activations [B, ...] split by rows over `BATCH_AXES`.

  Blocks begin with it. Left to itself, the compiler may split activations by width, as it does the
  weights, and then has to move them. Returns x as it is where the program has no such mesh, or
  where B does not divide.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not _has_axes(mesh, BATCH_AXES) or x.shape[0] % batch_shards(mesh):
    return x
  return jax.lax.with_sharding_constraint(x, P(BATCH_AXES))


def num_shards(num_rows: int) -> int:
  """The number of equal pieces into which the program's mesh splits `num_rows` rows of a batch.

  1 where the program has no such mesh, or where the rows do not divide.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not _has_axes(mesh, BATCH_AXES) or num_rows % batch_shards(mesh):
    return 1
  return batch_shards(mesh)


def per_shard(function: Callable, shards: int, *arrays: Array) -> Any:
  """Applies a function to each of `shards` equal pieces of a batch, and joins its results.

  Over a mesh a piece is what lies on one position of `BATCH_AXES`, and no device sends anything.
  Without a mesh the function is mapped over the pieces.

  Args:
    function: of arrays [B / shards, ...]; returns a tree of arrays [B' / shards, ...].
    shards: number of pieces; over a mesh, `batch_shards(mesh)`.
    arrays: [B, ...].

  Returns:
    The tree with arrays [B', ...].
  """
  if _has_axes(jax.sharding.get_abstract_mesh(), BATCH_AXES):
    split = jax.shard_map(
      function,
      in_specs=P(BATCH_AXES),
      out_specs=P(BATCH_AXES),
      axis_names=set(BATCH_AXES),
      check_vma=False,
    )
    return split(*arrays)
  pieces = [x.reshape(shards, -1, *x.shape[1:]) for x in arrays]
  results = jax.vmap(function)(*pieces)
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def _has_axes(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> bool:
  return set(axes) <= set(mesh.axis_names)
