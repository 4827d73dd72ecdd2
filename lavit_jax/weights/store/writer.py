"""Writes the leaves of one module to an Orbax checkpoint, slice by slice."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import pathlib
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import unflatten_dict

from lavit_jax.weights.store import disk
from lavit_jax.weights.store.arrays import CHUNK_BYTES
from lavit_jax.weights.store.checksums import checksum

SMALL_BYTES = 1 << 20  # a leaf of at most this size is one chunk, written when it is complete


class ModuleWriter:
  """Writes a module, whose slices may arrive in any order.

      with ModuleWriter(folder, structs, stacked) as writer:
        writer.write(path, layer, array)

  The folder appears, complete and on the disk, at the end of the block. Orbax saves a tree of
  placeholders in a thread of its own; `_Handler` opens the TensorStore arrays for it and keeps it
  waiting until this class has filled them.

  Args:
    folder: of the module; it must not exist.
    structs: path -> anything with a shape and a dtype.
    stacked: the leaves that arrive by slices on axis 0.

  Attributes:
    sums: path -> checksum of what has been written (checksums.py).

  Raises:
    ValueError: this is not process 0, which alone may write; or, at the end, a slice is missing.
  """

  def __init__(
    self, folder: pathlib.Path, structs: Mapping[str, Any], stacked: Collection[str] = ()
  ):
    if jax.process_index():  # Orbax writes host arrays in process 0 only
      raise ValueError(f'process 0 writes modules, not process {jax.process_index()}')
    self.sums = dict.fromkeys(structs, 0)
    self._remaining = {path: x.shape[0] if path in stacked else 1 for path, x in structs.items()}
    self._small: dict[str, np.ndarray] = {}  # incomplete leaves of at most SMALL_BYTES
    self._transaction: ts.Transaction | None = None
    self._pending_bytes = 0  # in the transaction
    self._flusher = disk.Flusher()
    self._flushed: set[pathlib.Path] = set()
    self._folder = pathlib.Path(folder).absolute()
    self._thread = concurrent.futures.ThreadPoolExecutor(1)

    placeholders = {}
    save_args = {}
    for path, struct in structs.items():
      # One number in memory, whatever the shape.
      placeholders[path] = np.broadcast_to(np.zeros((), struct.dtype), struct.shape)
      save_args[path] = _save_args(placeholders[path], path in stacked)
    self._handler = _Handler({id(array): path for path, array in placeholders.items()})
    self._saved = self._thread.submit(
      _save,
      self._folder,
      self._handler,
      unflatten_dict(placeholders, sep='/'),
      unflatten_dict(save_args, sep='/'),
    )
    concurrent.futures.wait(
      [self._saved, self._handler.opened], return_when=concurrent.futures.FIRST_COMPLETED
    )
    if self._saved.done():  # it failed before the arrays were open
      self._thread.shutdown()
      self._saved.result()

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    try:
      if error is None:
        self._complete()
        self._handler.filled.set_result(None)
    finally:
      if not self._handler.filled.done():
        self._cancel()
      self._thread.shutdown()
      logging.getLogger('absl').removeFilter(_drop_record)
    if error is None:
      self._saved.result()
      self._flusher.flush(filter(pathlib.Path.is_file, self._folder.rglob('*')))
      self._flusher.wait()

  def write(self, path: str, index: int | None, array: np.ndarray) -> None:
    """Writes a whole leaf, or one slice of a stacked one.

    Args:
      path: of the leaf.
      index: of the slice on axis 0; None for a whole leaf.
      array: its content.
    """
    array = np.asarray(array, order='C')
    store = self._handler.arrays[path]
    self.sums[path] ^= checksum(array) if index is None else checksum(array[None], index)
    self._remaining[path] -= 1
    if index is not None and math.prod(store.shape) * array.itemsize <= SMALL_BYTES:
      leaf = self._small.setdefault(path, np.empty(store.shape, array.dtype))
      leaf[index] = array
      if self._remaining[path]:
        return
      index = None
      array = self._small.pop(path)
    if self._transaction is None:
      self._transaction = ts.Transaction()
    target = store.with_transaction(self._transaction)
    if index is not None:
      target = target[index]
    target.write(array).result()
    self._pending_bytes += array.nbytes
    if self._pending_bytes >= disk.FLUSH_BYTES:
      self._commit()

  def _complete(self) -> None:
    missing = [path for path, count in self._remaining.items() if count]
    if missing:
      raise ValueError(f'never written: {", ".join(missing)}')
    self._commit()
    self._flusher.wait()

  def _cancel(self) -> None:
    """Ends Orbax's thread, and silences its long messages about that."""
    logging.getLogger('absl').addFilter(_drop_record)
    self._handler.filled.set_exception(RuntimeError('the module was not completed'))

  def _commit(self) -> None:
    """Ends the transaction and starts to flush its files."""
    if self._transaction is not None:
      self._transaction.commit_async().result()
      # The folder has a temporary name until Orbax is done. Lock files have a suffix.
      files = self._folder.parent.glob(f'{self._folder.name}*/*/d/*')
      new = {file for file in files if not file.suffix} - self._flushed
      self._flusher.flush(new)
      self._flushed |= new
    self._transaction = None
    self._pending_bytes = 0


class _Handler(ocp.type_handlers.NumpyHandler):
  """Opens the arrays for Orbax, and lets it finish when they are filled.

  Args:
    paths: id of a placeholder array -> path of the leaf.

  Attributes:
    arrays: path -> array to write to, complete when `opened` is done.
    filled: the caller sets its result when the arrays are written.
  """

  def __init__(self, paths: dict[int, str]):
    super().__init__(deepcopy_host_arrays=False)
    self.arrays: dict[str, ts.TensorStore] = {}
    self.opened: concurrent.futures.Future[None] = concurrent.futures.Future()
    self.filled: concurrent.futures.Future[None] = concurrent.futures.Future()
    self._paths = paths
    self._context: ts.Context | None = None

  async def _open_and_write(self, value, tspec, ts_context):  # overrides NumpyHandler's
    if self._context is None:
      # Files are not synced one by one; `ModuleWriter` waits for all of them at the end.
      self._context = ts.Context({'file_io_sync': False}, parent=ts_context)
    array = await ts.open(ts.Spec(tspec), create=True, open=True, context=self._context)
    self.arrays[self._paths[id(value)]] = array
    if len(self.arrays) == len(self._paths):
      self.opened.set_result(None)
    await asyncio.wrap_future(self.filled)


def _drop_record(_: logging.LogRecord) -> bool:
  return False


def _save(folder: pathlib.Path, handler: _Handler, tree: dict, save_args: dict) -> None:
  """Runs Orbax's own save in this process alone, without barriers between processes."""
  one_process = ocp.options.MultiprocessingOptions(
    primary_host=0, active_processes={0}, barrier_sync_key_prefix='lavit'
  )
  # Orbax warns if there is no handler for jax.Array, though the tree has none.
  registry = ocp.type_handlers.create_type_handler_registry(
    (np.ndarray, handler), (jax.Array, ocp.type_handlers.ArrayHandler())
  )
  pytrees = ocp.PyTreeCheckpointHandler(
    use_compression=False, type_handler_registry=registry, multiprocessing_options=one_process
  )
  with ocp.Checkpointer(pytrees, multiprocessing_options=one_process) as checkpointer:
    checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, save_args=save_args))


def _save_args(leaf: np.ndarray, stacked: bool) -> ocp.SaveArgs:
  """How a leaf is divided into chunks: along axis 0 if it is stacked."""
  if leaf.size * leaf.itemsize <= SMALL_BYTES:
    return ocp.SaveArgs()
  return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())
