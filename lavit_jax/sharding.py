"""Where every array lives: a table of (regex, PartitionSpec) over the mesh axes `data`, `fsdp`, `tensor`.

The models know nothing of it. The table is matched against the paths of the train state, optimizer included (an Adam moment
carries the path of its parameter), so one row shards a parameter and all that belongs to it. Scanned layers have a leading
axis that is never split; the specs below are right-aligned for that reason. A batch is split over `data` and `fsdp` together.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lavit_jax.errors import UserError
from lavit_jax.models.layers import BATCH_AXES, TENSOR_AXIS

AXES = (*BATCH_AXES, TENSOR_AXIS)
BATCH = P(BATCH_AXES)
LARGE = 1 << 20  # elements; a leaf below this may go without a row, and every device keeps a copy

# The last axes of a leaf. Into a block: the output is split over `tensor`; out of a block: the input is.
RULES = (
  (
    r'/(qkv|query|key|value|to_[qkv]|gate|up|fc1|fc_in|proj_in|linear_1)/kernel$',
    P('fsdp', 'tensor'),
  ),  # [.., D, F]
  (r'/(proj|to_out|down|fc2|proj_out|linear_2)/kernel$', P('tensor', 'fsdp')),  # [.., F, D]
  (r'/(vit_proj|text_proj|context_proj_\d+|time_emb_proj|head)/kernel$', P('fsdp', 'tensor')),
  (r'/(conv\w*|patch_embed)/kernel$', P('fsdp', 'tensor')),  # [h, w, in, out]
  (r'(^state|/quantizer)/embedding$', P()),  # the codebook, [K, C]
  (r'/embedding$', P('tensor', 'fsdp')),  # [V, D]
  (r'/head$', P('fsdp', 'tensor')),  # [D, V]
)


def path_name(path) -> str:
  """A jax key path as 'params/vit/blocks/attn/qkv/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def make_mesh(sizes, devices=None) -> Mesh:
  """A mesh with `sizes` = {data, fsdp, tensor} over all devices; -1 (at most once) takes what is left.

  Neighbours in the mesh are neighbours in the pod. Over several slices, `data` runs across them: it alone can bear the slow network between.

  Args:
    devices: those of a pod that is not here; None takes this machine's (or job's).

  Raises:
    UserError: the sizes do not multiply to the number of devices, or `data` not to that of slices.
  """
  devices = jax.devices() if devices is None else devices
  shape, count = [sizes[axis] for axis in AXES], len(devices)
  known = math.prod(n for n in shape if n != -1)
  if shape.count(-1) == 1 and known > 0 and count % known == 0:
    shape[shape.index(-1)] = count // known
  asked = ', '.join(f'{axis}={sizes[axis]}' for axis in AXES)
  if math.prod(shape) != count or min(shape) < 1:
    raise UserError(
      f'mesh: {asked} does not fit {count} device(s); the product must be {count} (-1 takes what is left)'
    )
  slices = (
    len({getattr(device, 'slice_index', None) for device in devices})
    if devices[0].platform == 'tpu'
    else 1
  )
  if shape[0] % slices:
    raise UserError(
      f'mesh: {asked} does not fit {slices} slices; data must be a multiple of {slices}'
    )
  if slices > 1:
    across = (slices, 1, 1)
    array = mesh_utils.create_hybrid_device_mesh(
      [n // s for n, s in zip(shape, across)], across, devices, allow_split_physical_axes=True
    )
  else:
    array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
  """Into how many pieces a batch is split."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def spec(name: str, shape: tuple[int, ...], mesh: Mesh, rules=RULES) -> P:
  """The first rule that names the leaf, right-aligned to its axes.

  A mesh axis that does not divide its dimension goes to another one of the rule's that it divides, and is left out if there is none:
  1408 is no multiple of 256.

  Raises:
    ValueError: a leaf of `LARGE` elements or more that no rule names.
  """
  matrix = name.removesuffix('/values')  # of Int8, which keeps it the other way round
  rule = next((rule for regex, rule in rules if re.search(regex, matrix)), None)
  if rule is not None and matrix != name:
    rule = P(*reversed(rule))
  if rule is None:
    if math.prod(shape) >= LARGE:
      raise ValueError(f'{name} {list(shape)} is large, and no row of sharding.RULES names it')
    return P()
  width = min(len(rule), len(shape))
  sizes, wanted, axes = shape[len(shape) - width :], rule[len(rule) - width :], [None] * width

  def divides(axis, n):
    return axis and mesh.shape[axis] > 1 and sizes[n] % mesh.shape[axis] == 0

  for n, axis in enumerate(wanted):
    axes[n] = axis if divides(axis, n) else None
  for axis in wanted:
    if axis not in axes and (
      free := [n for n in range(width) if axes[n] is None and divides(axis, n)]
    ):
      axes[free[0]] = axis
  return P(*(None,) * (len(shape) - width), *axes)


def shardings(tree, mesh: Mesh, rules=RULES):
  """A NamedSharding for every leaf of a tree of arrays or of `jax.eval_shape`'s result."""

  def place(path, leaf):
    return NamedSharding(mesh, spec(path_name(path), np.shape(leaf), mesh, rules))

  return jax.tree_util.tree_map_with_path(place, tree)


class ProcessShare(NamedTuple):
  """`rows` of a global batch that the devices of one process hold, ascending; of all shares this is number `index` of `count`."""

  rows: np.ndarray
  index: int
  count: int


def process_share(mesh: Mesh, batch_size: int) -> ProcessShare:
  """What this process must read. Processes whose devices differ along `tensor` alone have the same share.

  Raises:
    UserError: two processes would hold some rows in common and others not.
  """
  held = {}
  for device, (rows,) in NamedSharding(mesh, BATCH).devices_indices_map((batch_size,)).items():
    held.setdefault(device.process_index, set()).update(range(*rows.indices(batch_size)))
  shares = sorted({tuple(sorted(rows)) for rows in held.values()})
  if sum(map(len, shares)) != batch_size or len({len(rows) for rows in shares}) != 1:
    raise UserError(
      'mesh: the pieces of a batch do not fall evenly to the processes; tensor must divide their devices, or be a multiple of them'
    )
  mine = tuple(sorted(held[jax.process_index()]))
  return ProcessShare(np.array(mine), shares.index(mine), len(shares))


def put_batch(batch: dict, mesh: Mesh, share: ProcessShare) -> dict:
  """This process's rows (numpy) as global arrays, split over `data` and `fsdp`."""
  batch_size = len(share.rows) * share.count

  def put(x):
    def piece(index):
      start, stop, _ = index[0].indices(batch_size)
      first = int(np.searchsorted(share.rows, start))
      return x[first : first + stop - start]

    return jax.make_array_from_callback(
      (batch_size, *x.shape[1:]), NamedSharding(mesh, BATCH), piece
    )

  return {key: put(x) for key, x in batch.items()}
