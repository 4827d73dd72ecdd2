"""One part of a model on disk: an Orbax checkpoint whose leaves can be written and read a slice at a time.

Orbax lays the folder out, and any Orbax restores it, onto a mesh too. The arrays in it belong to TensorStore and are filled and read
here by rows (indices on axis 0, the layers of a stack), so that a leaf of gigabytes need never be in memory as a whole.

A leaf goes by its '/'-joined path; a part that is one bare array by the name 'value'.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import errno
import functools
import logging
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
import xxhash
from flax.traverse_util import flatten_dict, unflatten_dict

from lavit_jax.weights.store import disk

CHUNK_BYTES = 32 << 20  # the largest piece that a reader of a few rows must read
DIRECT = ts.Context({'file_io_mode': {'mode': 'direct'}})  # past the page cache, as disk.py says
SMALL_BYTES = 1 << 20  # a leaf up to this size is one chunk, written when it is complete


class ParameterSource(NamedTuple):
  """A part that can be read: its leaves, and how to read one of them, or one row of it."""

  structs: dict[str, jax.ShapeDtypeStruct]  # by path
  read: Callable  # (path, row=None, sharding=None) -> a numpy array, or a jax.Array where `sharding` says


class Writer:
  """A new part, whose slices may come in any order.

    with Writer(folder, leaves) as writer: ...

  At the end of the block it is on the disk, whole; ValueError if a slice never came. Of several processes the first one writes.

  Args:
    folder: where; it must not exist, and does not before the end.
    leaves: path -> anything with a shape and a dtype.
    stacked: the leaves that come by rows.
  """

  def __init__(self, folder: pathlib.Path, leaves: Mapping[str, jax.ShapeDtypeStruct], stacked=()):
    if jax.process_index():  # Orbax leaves arrays of the host to process 0
      raise ValueError(f'process 0 writes parts, not process {jax.process_index()}')
    self.sums = dict.fromkeys(leaves, 0)
    self._stacked, self._pending, self._transaction, self._small = set(stacked), 0, None, {}
    self._left = {path: leaves[path].shape[0] if path in self._stacked else 1 for path in leaves}
    blank = {path: np.broadcast_to(np.zeros((), x.dtype), x.shape) for path, x in leaves.items()}
    self._handler = _Handler({id(x): path for path, x in blank.items()})
    save_args = {path: _chunks(x, path in self._stacked) for path, x in blank.items()}
    self._thread, self._flusher, self._flushed = (
      concurrent.futures.ThreadPoolExecutor(1),
      disk.Flusher(),
      set(),
    )
    self._folder = pathlib.Path(folder).absolute()
    self._saved = self._thread.submit(
      _save,
      self._folder,
      self._handler,
      unflatten_dict(blank, sep='/'),
      unflatten_dict(save_args, sep='/'),
    )
    concurrent.futures.wait(
      [self._saved, self._handler.opened], return_when=concurrent.futures.FIRST_COMPLETED
    )
    if self._saved.done():
      self._thread.shutdown()
      self._saved.result()

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    try:
      if error is None:
        self._complete()
        self._handler.filled.set_result(None)
    finally:
      if (
        not self._handler.filled.done()
      ):  # Orbax waits in its thread, and logs at length that it was given up
        logging.getLogger('absl').addFilter(_silent)
        self._handler.filled.set_exception(RuntimeError('given up'))
      self._thread.shutdown()
      logging.getLogger('absl').removeFilter(_silent)
    if error is None:
      self._saved.result()
      self._flusher.flush(filter(pathlib.Path.is_file, self._folder.rglob('*')))
      self._flusher.wait()

  def write(self, path: str, row: int | None, array: np.ndarray) -> None:
    """Writes a whole leaf (row None) or one row of a stacked one."""
    store, array = self._handler.arrays[path], np.asarray(array, order='C')
    self.sums[path] ^= checksum(array) if row is None else checksum(array[None], row)
    self._left[path] -= 1
    size = int(np.prod(store.shape)) * array.itemsize
    if row is not None and size <= SMALL_BYTES:
      whole = self._small.setdefault(path, np.empty(store.shape, array.dtype))
      whole[row] = array
      if self._left[path]:
        return
      row, array = None, self._small.pop(path)
    if self._transaction is None:
      self._transaction = ts.Transaction()
    target = store.with_transaction(self._transaction)
    (target if row is None else target[row]).write(array).result()
    self._pending += array.nbytes
    if self._pending >= disk.FLUSH_BYTES:
      self._commit()

  def _complete(self) -> None:
    if missing := [path for path, left in self._left.items() if left]:
      raise ValueError(f'never written: {", ".join(missing)}')
    self._commit()
    self._flusher.wait()

  def _commit(self) -> None:
    if self._transaction is not None:
      self._transaction.commit_async().result()
      data = self._folder.parent.glob(
        f'{self._folder.name}*/*/d/*'
      )  # under another name, until Orbax is done
      new = {
        file for file in data if not file.suffix
      } - self._flushed  # no locks; each is written once
      self._flusher.flush(new)
      self._flushed |= new
    self._transaction, self._pending = None, 0


def open_leaves(
  folder: pathlib.Path, paths, context: ts.Context | None = None
) -> dict[str, ts.TensorStore]:
  """Path -> array, to be read by `array[row].read().result()` or whole."""
  base = {'driver': 'file', 'path': f'{pathlib.Path(folder).absolute()}/'}

  def spec(path):
    return {
      'driver': 'zarr',
      'kvstore': {'driver': 'ocdbt', 'base': base, 'path': path.replace('/', '.') + '/'},
    }

  waiting = {path: ts.open(spec(path), open=True, context=context) for path in paths}
  return {path: future.result() for path, future in waiting.items()}


def read_sharded(store: ts.TensorStore, like: jax.ShapeDtypeStruct) -> jax.Array:
  """A leaf straight onto the devices that the sharding of `like` names, in its dtype.

  A process reads what its own devices hold, each stretch once. (Orbax would read each device's share apart, in whole chunks, and all
  leaves at once.)
  """
  if not like.shape:
    return jax.device_put(store.read().result().astype(like.dtype), like.sharding)
  places = {
    device: tuple(
      each.indices(size)[:2] for each, size in zip(index, like.shape)
    )  # (start, stop) by axis
    for device, index in like.sharding.addressable_devices_indices_map(like.shape).items()
  }
  shards = {
    index: np.empty([stop - start for start, stop in index], like.dtype)
    for index in set(places.values())
  }
  (top, bottom), *sides = [
    (min(starts), max(stops)) for starts, stops in (zip(*axis) for axis in zip(*shards))
  ]
  step = max(
    CHUNK_BYTES
    // max(math.prod(stop - start for start, stop in sides) * store.dtype.numpy_dtype.itemsize, 1),
    1,
  )

  def stretch(start, stop):
    return (
      start,
      stop,
      store[(slice(start, stop), *(slice(*side) for side in sides))].read().result(),
    )

  for start, stop, block in prefetch(
    functools.partial(stretch, start, min(start + step, bottom))
    for start in range(top, bottom, step)
  ):
    for ((first, last), *rest), shard in shards.items():
      low, high = max(start, first), min(stop, last)
      if low < high:
        inside = [slice(begin - side, end - side) for (begin, end), (side, _) in zip(rest, sides)]
        shard[low - first : high - first] = block[(slice(low - start, high - start), *inside)]
  pieces = [jax.device_put(shards[index], device) for device, index in places.items()]
  return jax.make_array_from_single_device_arrays(
    like.shape, like.sharding, pieces
  ).block_until_ready()


def checksums(folder: pathlib.Path, paths) -> Iterator[tuple[str, int, int]]:
  """(path, checksum, bytes) of pieces of the leaves; those of one leaf, by exclusive or, are its checksum."""

  def piece(path, array, start, stop):
    rows = (array[start:stop] if array.ndim else array).read().result()
    return path, checksum(rows, start), rows.nbytes

  def pieces():
    for path, array in open_leaves(folder, paths, DIRECT).items():
      length, size = (
        array.shape[0] if array.ndim else 1,
        int(np.prod(array.shape)) * array.dtype.numpy_dtype.itemsize,
      )
      step = max(length * CHUNK_BYTES // max(size, 1), 1)
      for start in range(0, length, step):
        yield functools.partial(piece, path, array, start, min(start + step, length))

  return prefetch(pieces())


def prefetch(tasks: Iterable[Callable], depth: int = 3) -> Iterator:
  """The results of the tasks in order, worked at by two threads; at most `depth` wait, so that memory stays bounded."""
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    waiting = collections.deque()
    try:
      for task in tasks:
        waiting.append(pool.submit(task))
        if len(waiting) > depth:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    finally:
      for future in waiting:
        future.cancel()


def checksum(array: np.ndarray, first_row: int = 0) -> int:
  """Of a leaf, or of the rows of it from `first_row` on: XXH3-64 of each row, seeded with its number, and all of them by exclusive or."""
  rows = array if array.ndim else array[None]
  rows = (
    np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
    if rows.size
    else np.zeros((len(rows), 0), np.uint8)
  )
  total = 0
  for number, row in enumerate(rows, first_row):
    total ^= xxhash.xxh3_64_intdigest(row, number)
  return total


def flatten(tree) -> dict:
  """A nested dict by '/'-joined paths; a bare array goes by the name 'value'."""
  return flatten_dict(tree, sep='/') if isinstance(tree, dict) else {'value': tree}


def unflatten(flat: Mapping):
  """The inverse of `flatten`."""
  return flat['value'] if list(flat) == ['value'] else unflatten_dict(flat, sep='/')


def disk_full(error: BaseException | None) -> bool:
  """Whether a full disk is behind an error; TensorStore says so in words only."""
  while error is not None:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or 'No space left on device' in str(error) or 'Disk quota exceeded' in str(error):
      return True
    error = error.__cause__ or error.__context__
  return False


class _Handler(ocp.type_handlers.NumpyHandler):
  """Opens the arrays, hands them out, and lets Orbax finish when they are filled. `names`: id of the blank array -> path."""

  def __init__(self, names: dict[int, str]):
    super().__init__(deepcopy_host_arrays=False)
    self.names, self.arrays, self.context = names, {}, None
    self.opened, self.filled = concurrent.futures.Future(), concurrent.futures.Future()

  async def _open_and_write(self, value, tspec, ts_context):
    if (
      self.context is None
    ):  # the disk gets what is written when it likes; `Writer` waits for it once, at the end
      self.context = ts.Context({'file_io_sync': False}, parent=ts_context)
    self.arrays[self.names[id(value)]] = await ts.open(
      ts.Spec(tspec), create=True, open=True, context=self.context
    )
    if len(self.arrays) == len(self.names):
      self.opened.set_result(None)
    await asyncio.wrap_future(self.filled)


def _silent(_) -> bool:
  return False


def _save(folder: pathlib.Path, handler: _Handler, tree, save_args) -> None:
  """Orbax's own save, by this process alone: it waits for no other."""
  alone = ocp.options.MultiprocessingOptions(
    primary_host=0, active_processes={0}, barrier_sync_key_prefix='lavit'
  )
  registry = ocp.type_handlers.create_type_handler_registry(
    (np.ndarray, handler), (jax.Array, ocp.type_handlers.ArrayHandler())
  )  # it asks for the second, to warn without
  pytrees = ocp.PyTreeCheckpointHandler(
    use_compression=False, type_handler_registry=registry, multiprocessing_options=alone
  )
  with ocp.Checkpointer(pytrees, multiprocessing_options=alone) as checkpointer:
    checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, save_args=save_args))


def _chunks(x: np.ndarray, stacked: bool) -> ocp.SaveArgs:
  if x.size * x.itemsize <= SMALL_BYTES:
    return ocp.SaveArgs()
  return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())
