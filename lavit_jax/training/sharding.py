"""Where every array lives: a table of (regex, PartitionSpec) over the mesh axes `data`, `fsdp`, `tensor`.

The models know nothing of it. The table is matched against the paths of the train state, optimizer included (an Adam moment
carries the path of its parameter), so one row shards a parameter and all that belongs to it. Scanned layers have a leading
axis that is never split; the specs below are right-aligned for that reason. A batch is split over `data` and `fsdp` together.
"""

from __future__ import annotations

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from lavit_jax.errors import UserError
from lavit_jax.models.layers import BATCH_AXES

AXES = ('data', 'fsdp', 'tensor')
BATCH = P(BATCH_AXES)
LARGE = 1 << 20  # elements; a leaf below this may go without a row, and every device keeps a copy

# The last axes of a leaf. Into a block: the output is split over `tensor`; out of a block: the input is.
RULES = (
    (r'/(qkv|query|key|value|to_[qkv]|gate|up|fc1|fc_in|proj_in|linear_1)/kernel$', P('fsdp', 'tensor')),  # [.., D, F]
    (r'/(proj|to_out|down|fc2|proj_out|linear_2)/kernel$', P('tensor', 'fsdp')),                           # [.., F, D]
    (r'/(vit_proj|text_proj|context_proj_\d+|time_emb_proj|head)/kernel$', P('fsdp', 'tensor')),
    (r'/(conv\w*|patch_embed)/kernel$', P('fsdp', 'tensor')),                                             # [h, w, in, out]
    (r'(^state|/quantizer)/embedding$', P()),                                                             # the codebook, [K, C]
    (r'/embedding$', P('tensor', 'fsdp')),                                                                # [V, D]
    (r'/head$', P('fsdp', 'tensor')),                                                                     # [D, V]
)


def path_name(path) -> str:
  """A jax key path as 'params/vit/blocks/attn/qkv/kernel'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def make_mesh(sizes) -> Mesh:
  """A mesh with `sizes` = {data, fsdp, tensor} over all devices; -1 (at most once) takes what is left.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  shape, count = [sizes[axis] for axis in AXES], jax.device_count()
  known = math.prod(n for n in shape if n != -1)
  if shape.count(-1) == 1 and known > 0 and count % known == 0:
    shape[shape.index(-1)] = count // known
  if math.prod(shape) != count or min(shape) < 1:
    asked = ', '.join(f'{axis}={sizes[axis]}' for axis in AXES)
    raise UserError(f'mesh: {asked} does not fit {count} device(s); the product must be {count} (-1 takes what is left)')
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_shards(mesh: Mesh) -> int:
  """Into how many pieces a batch is split."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def spec(name: str, shape: tuple[int, ...], mesh: Mesh, rules=RULES) -> P:
  """The first rule that names the leaf, right-aligned to its axes; an axis that does not divide its dimension is left out.

  Raises:
    ValueError: a leaf of `LARGE` elements or more that no rule names.
  """
  rule = next((rule for regex, rule in rules if re.search(regex, name)), None)
  if rule is None:
    if math.prod(shape) >= LARGE:
      raise ValueError(f'{name} {list(shape)} is large, and no row of sharding.RULES names it')
    return P()
  axes = (None,) * max(len(shape) - len(rule), 0) + tuple(rule)[max(len(rule) - len(shape), 0):]
  return P(*(axis if axis and n % mesh.shape[axis] == 0 else None for axis, n in zip(axes, shape)))


def shardings(tree, mesh: Mesh, rules=RULES):
  """A NamedSharding for every leaf of a tree of arrays or of `jax.eval_shape`'s result."""

  def place(path, leaf):
    return NamedSharding(mesh, spec(path_name(path), np.shape(leaf), mesh, rules))

  return jax.tree_util.tree_map_with_path(place, tree)


def put_batch(batch: dict, mesh: Mesh) -> dict:
  """This process's rows (numpy) as global arrays, split over `data` and `fsdp`."""
  return {key: jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), x) for key, x in batch.items()}
