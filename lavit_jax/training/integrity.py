"""Whether a restored checkpoint is what was saved: digests of arrays, positions in the data."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import xxhash
from etils import epath
from jax import Array

from lavit_jax import accelerators
from lavit_jax.errors import UserError

BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by the bytes of a number
READERS = 16  # threads
REMEDY = 'begin in another --workdir, with --config.init_from=RUN/export of a finished run'


# --- Arrays --------------------------------------------------------------------------------------


def digests(tree: Any) -> dict[str, int]:
  """'path [shape]' -> 32 bits of each array, computed where the arrays are, the same on any mesh.

  Each element's bits are multiplied by an odd number that its index gives, and all are added modulo
  2^32: a change of one element always shows, any other but once in 2^32 times.
  """
  digest = _digest_program()
  values = []
  for leaf in jax.tree.leaves(tree):
    # One at a time: on CPU, sums that overtake each other deadlock.
    values.append(int(digest(leaf)))
  return dict(zip(names(tree), values, strict=True))


def names(tree: Any) -> list[str]:
  """'path [shape]' of each array, or ShapeDtypeStruct, of a tree."""
  texts = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    texts.append(f'{name} {list(leaf.shape)}')
  return texts


def types(tree: Any) -> dict[str, str]:
  """'path [shape]' -> 'float32' of each array, ShapeDtypeStruct or Orbax's metadata of one."""
  dtypes = [str(leaf.dtype) for leaf in jax.tree.leaves(tree)]
  return dict(zip(names(tree), dtypes, strict=True))


@functools.cache
def _digest_program():
  return jax.jit(_digest, compiler_options=accelerators.run_once_compiler_options())


def _digest(x: Array) -> Array:
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, BITS[x.dtype.itemsize]).astype(jnp.uint32)
  index = jnp.zeros(x.shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(x.ndim)):
    index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
    stride *= x.shape[axis]
  mixed = (index ^ index >> 16) * jnp.uint32(0x7FEB352D)
  mixed = (mixed ^ mixed >> 15) * jnp.uint32(0x846CA68B)
  return (bits * (mixed | 1)).sum(dtype=jnp.uint32)


def checksum(item: Any) -> str:
  """The checksum of a JSON value."""
  return _text_checksum(json.dumps(item, sort_keys=True))


def _text_checksum(text: str) -> str:
  return xxhash.xxh3_64_hexdigest(text.encode())


# --- Positions in the data -----------------------------------------------------------------------


class PositionHandler(ocp.CheckpointHandler):
  """The state of a data iterator, a file for each process.

  A file is {'state': the JSON of `get_state`, 'sum': the checksum of that text}. The states of
  several processes are the same but for 'shards', the positions of those shards of the data that
  each process reads. All files are read, so that any processes may continue, whichever shards they
  read.
  """

  def save(self, directory, args: PositionSave) -> None:
    """Writes the file of this process."""
    text = json.dumps(args.item.get_state())
    name = f'process_{jax.process_index()}-of-{jax.process_count()}.json'
    (directory / name).write_text(json.dumps({'state': text, 'sum': _text_checksum(text)}))

  def restore(self, directory, args: PositionRestore) -> Any:
    """Moves the iterator to the position of all files.

    Raises:
      ValueError: a file is missing or damaged.
      UserError: the position is one in other data.
    """
    files = sorted(directory.glob('process_*-of-*.json'))
    count = int(files[0].stem.rpartition('-')[2]) if files else 1
    if len(files) != count:
      raise ValueError(f'{directory} holds {len(files)} of {count} positions in the data')
    with ThreadPoolExecutor(READERS) as pool:
      states = list(pool.map(_read_position, files))
    state = merge_positions(states, f'{directory}: the position')
    try:
      args.item.set_state(state)
    except (ValueError, KeyError) as error:  # no damage that an earlier checkpoint could mend
      raise UserError(
        f'{directory}: the position in the data is one in other data than data.sources or '
        f'data.source name now ({error}); give what it began with, or {REMEDY}'
      ) from error
    return args.item


def merge_positions(states: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
  """One state of those of all processes.

  Args:
    states: of the processes.
    name: of the position, for messages.

  Raises:
    ValueError: two of them contradict each other.
    UserError: they are of an earlier version, whose positions belonged to processes.
  """
  if any('tickets' in state for state in states):
    raise UserError(
      f'{name} in data.sources was saved by an earlier version, which dealt them to processes, and '
      f'cannot be read any more; {REMEDY}'
    )
  shared = {**states[0], 'shards': {}}
  shards = {}
  for state in states:
    own = state.get('shards', {})
    agrees = all(shards.get(shard, position) == position for shard, position in own.items())
    if {**state, 'shards': {}} != shared or not agrees:
      raise ValueError(f'{name} that one process saved contradicts that of another')
    shards |= own
  return {**states[0], 'shards': shards} if shards else states[0]


def _read_position(file: epath.Path) -> dict[str, Any]:
  saved = json.loads(file.read_text())
  if 'next_index' in saved:  # earlier versions counted examples; a step is a batch
    return {'batches': int(file.parent.parent.name)}
  if _text_checksum(saved['state']) != saved['sum']:
    raise ValueError(f'{file.name} is not what was saved')
  return json.loads(saved['state'])


@ocp.args.register_with_handler(PositionHandler, for_save=True)
@dataclasses.dataclass
class PositionSave(ocp.args.CheckpointArgs):
  """What `PositionHandler.save` takes: a data iterator."""

  item: Any


@ocp.args.register_with_handler(PositionHandler, for_restore=True)
@dataclasses.dataclass
class PositionRestore(ocp.args.CheckpointArgs):
  """What `PositionHandler.restore` takes: a data iterator."""

  item: Any
