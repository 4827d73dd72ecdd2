"""Reads the leaves of one module from an Orbax checkpoint, whole, by layers or by shards.

Orbax writes the folder (writer.py) and can restore it. The arrays in it are TensorStore arrays,
which this module reads by slices on axis 0 (the layers of a stack), so that a leaf of gigabytes is
never in memory as a whole.

A leaf is identified by its '/'-joined path; a module that is one bare array has the path 'value'.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
import tensorstore as ts
from flax.traverse_util import flatten_dict, unflatten_dict

CHUNK_BYTES = 32 << 20  # of a stored chunk at most, and of one read
DIRECT = ts.Context({'file_io_mode': {'mode': 'direct'}})  # past the page cache (disk.py)

Bounds = tuple[int, int]  # (start, stop) on one axis
Box = tuple[Bounds, ...]  # a part of an array, by axis
T = TypeVar('T')


class LeafReader(Protocol):
  """A function that reads a leaf."""

  def __call__(
    self, path: str, index: int | None = None, /, sharding: jax.sharding.Sharding | None = None
  ) -> np.ndarray | jax.Array:
    """Reads a leaf, or one index on axis 0 of it.

    Returns:
      An array on the host; with a sharding, on its devices.
    """
    ...


class ParameterSource(NamedTuple):
  """A module whose parameters can be read leaf by leaf.

  Attributes:
    structs: path -> shape and dtype of the leaf.
    read: reads a leaf.
  """

  structs: dict[str, jax.ShapeDtypeStruct]
  read: LeafReader


# --- Trees and paths -----------------------------------------------------------------------------


def flatten(tree: Any) -> dict[str, Any]:
  """{'/'-joined path: leaf} of a nested dict; a bare array has the path 'value'."""
  return flatten_dict(tree, sep='/') if isinstance(tree, dict) else {'value': tree}


def unflatten(flat: Mapping[str, Any]) -> Any:
  """The inverse of `flatten`."""
  return flat['value'] if list(flat) == ['value'] else unflatten_dict(flat, sep='/')


# --- Reading -------------------------------------------------------------------------------------


def open_leaves(
  folder: pathlib.Path, paths: Iterable[str], context: ts.Context | None = None
) -> dict[str, ts.TensorStore]:
  """Opens leaves of a module, all at once.

  Args:
    folder: of the module.
    paths: of the leaves.
    context: of TensorStore, such as DIRECT.

  Returns:
    path -> array, which is read by `array[index].read().result()`, or whole.

  Raises:
    ValueError: a leaf is missing or damaged.
  """
  base = {'driver': 'file', 'path': f'{pathlib.Path(folder).absolute()}/'}
  futures = {}
  for path in paths:
    kvstore = {'driver': 'ocdbt', 'base': base, 'path': path.replace('/', '.') + '/'}
    futures[path] = ts.open({'driver': 'zarr', 'kvstore': kvstore}, open=True, context=context)
  return {path: future.result() for path, future in futures.items()}


def read_module(source: ParameterSource, shardings: Any = None) -> Any:
  """Reads all leaves of a module, one after the other.

  Args:
    source: the module.
    shardings: a tree of the sharding of each leaf; None gives arrays on the host.

  Returns:
    The tree of arrays, or the one bare array.
  """
  leaf_shardings = {} if shardings is None else flatten(shardings)
  return unflatten(
    {path: source.read(path, sharding=leaf_shardings.get(path)) for path in source.structs}
  )


def read_sharded(store: ts.TensorStore, like: jax.ShapeDtypeStruct) -> jax.Array:
  """Reads a leaf onto the devices of a sharding.

  A process reads what its own devices need, each range once, in blocks of about CHUNK_BYTES.
  (Orbax would read the shard of each device separately, in whole chunks, and all leaves at once.)

  Args:
    store: the leaf.
    like: the shape, dtype and sharding of the result.
  """
  assert like.sharding is not None
  if not like.shape:
    return jax.device_put(store.read().result().astype(like.dtype), like.sharding)
  boxes = {}  # device -> the part that it holds
  for device, index in like.sharding.addressable_devices_indices_map(like.shape).items():
    assert index is not None
    boxes[device] = tuple(
      axis.indices(size)[:2] for axis, size in zip(index, like.shape, strict=True)
    )
  shards = {box: np.empty(_box_shape(box), like.dtype) for box in set(boxes.values())}
  hull = _hull(shards)
  for start, block in _read_blocks(store, hull):
    block_box = ((start, start + len(block)), *hull[1:])
    for box, shard in shards.items():
      _copy_overlap(block_box, block, box, shard)
  pieces = [jax.device_put(shards[box], device) for device, box in boxes.items()]
  array = jax.make_array_from_single_device_arrays(like.shape, like.sharding, pieces)
  return array.block_until_ready()


def _box_shape(box: Box) -> list[int]:
  return [stop - start for start, stop in box]


def _hull(boxes: Iterable[Box]) -> Box:
  """The smallest box around all boxes."""
  hull = []
  for axis in zip(*boxes, strict=True):
    hull.append((min(start for start, _ in axis), max(stop for _, stop in axis)))
  return tuple(hull)


def _read_blocks(store: ts.TensorStore, box: Box) -> Iterator[tuple[int, np.ndarray]]:
  """Reads a box in blocks along axis 0; yields (first index, block)."""
  (top, bottom), *sides = box
  slice_bytes = math.prod(_box_shape(tuple(sides))) * store.dtype.numpy_dtype.itemsize
  step = max(CHUNK_BYTES // max(slice_bytes, 1), 1)
  side_slices = [slice(*side) for side in sides]

  def read(start: int) -> tuple[int, np.ndarray]:
    stop = min(start + step, bottom)
    return start, store[(slice(start, stop), *side_slices)].read().result()

  yield from prefetch(functools.partial(read, start) for start in range(top, bottom, step))


def _copy_overlap(block_box: Box, block: np.ndarray, box: Box, shard: np.ndarray) -> None:
  """Copies from a block into a shard what both have; the block contains the sides of the shard."""
  source, target = [], []
  for (block_start, block_stop), (start, stop) in zip(block_box, box, strict=True):
    low = max(block_start, start)
    high = min(block_stop, stop)
    if low >= high:
      return
    source.append(slice(low - block_start, high - block_start))
    target.append(slice(low - start, high - start))
  shard[tuple(target)] = block[tuple(source)]


def prefetch(tasks: Iterable[Callable[[], T]], depth: int = 3) -> Iterator[T]:
  """Runs tasks ahead in two threads and yields their results in order.

  Args:
    tasks: what to run.
    depth: results that are waiting at most, which bounds memory.
  """
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    futures: collections.deque[concurrent.futures.Future[T]] = collections.deque()
    try:
      for task in tasks:
        futures.append(pool.submit(task))
        if len(futures) > depth:
          yield futures.popleft().result()
      while futures:
        yield futures.popleft().result()
    finally:
      for future in futures:
        future.cancel()
