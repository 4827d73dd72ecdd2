"""Whether what comes back from a checkpoint is what went in: digests of arrays, and positions in the data, whoever saved them."""

from __future__ import annotations

import dataclasses
import functools
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import xxhash

from lavit_jax.errors import UserError

BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def digests(tree) -> dict[str, int]:
  """'path [shape]' -> 32 bits for each array, made where the arrays are, the same on any mesh.

  Each element's bits are multiplied with an odd number that its place gives, and all are added modulo 2^32: a change of one element
  always shows, any other but once in 2^32 times.
  """
  digest = _program()
  values = [
    int(digest(leaf)) for leaf in jax.tree.leaves(tree)
  ]  # one at a time: on CPU, sums that overtake each other deadlock
  return dict(zip(names(tree), values, strict=True))


def names(tree) -> list[str]:
  """'path [shape]' of each array, or ShapeDtypeStruct, of a tree."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [
    f'{jax.tree_util.keystr(path, simple=True, separator="/")} {list(leaf.shape)}'
    for path, leaf in leaves
  ]


def types(tree) -> dict[str, str]:
  """'path [shape]' -> 'float32' of each array, ShapeDtypeStruct or Orbax's metadata of one."""
  return dict(zip(names(tree), (str(leaf.dtype) for leaf in jax.tree.leaves(tree)), strict=True))


@functools.cache
def _program():
  quick = (
    {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
  )  # compiling costs more than running
  return jax.jit(_digest, compiler_options=quick)


def _digest(x):
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, BITS[x.dtype.itemsize]).astype(jnp.uint32)
  place, stride = jnp.zeros(x.shape, jnp.uint32), 1
  for axis in reversed(range(x.ndim)):
    place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
    stride *= x.shape[axis]
  mixed = (place ^ place >> 16) * jnp.uint32(0x7FEB352D)
  mixed = (mixed ^ mixed >> 15) * jnp.uint32(0x846CA68B)
  return (bits * (mixed | 1)).sum(dtype=jnp.uint32)


def checksum(item) -> str:
  """Of what JSON can hold."""
  return _sum(json.dumps(item, sort_keys=True))


def _sum(text: str) -> str:
  return xxhash.xxh3_64_hexdigest(text.encode())


class PositionHandler(ocp.CheckpointHandler):
  """The state of a data iterator, a file a process: {'state': what `get_state` gave, 'sum': of its text}.

  States of several processes are the same but for 'shards', the positions of those shards of the data that each process runs. All are read,
  so that any processes may go on, whichever shards they run.
  """

  def save(self, directory, args: PositionSave) -> None:
    text = json.dumps(args.item.get_state())
    name = f'process_{jax.process_index()}-of-{jax.process_count()}.json'
    (directory / name).write_text(json.dumps({'state': text, 'sum': _sum(text)}))

  def restore(self, directory, args: PositionRestore):
    files = sorted(directory.glob('process_*-of-*.json'))
    count = int(files[0].stem.rpartition('-')[2]) if files else 1
    if len(files) != count:
      raise ValueError(f'{directory} holds {len(files)} of {count} positions in the data')
    with ThreadPoolExecutor(16) as pool:
      state = merge_positions(list(pool.map(_read_position, files)), f'{directory}: the position')
    try:
      args.item.set_state(state)
    except (
      ValueError,
      KeyError,
    ) as error:  # sound, so it is no damage that an earlier checkpoint could mend
      raise UserError(
        f'{directory}: the position in the data is one in other data than data.sources or data.source name now ({error}); give '
        'what it began with, or begin in another --workdir, with --config.init_from=RUN/export of a finished run'
      ) from error
    return args.item


def merge_positions(states: list[dict], name: str) -> dict:
  """One state of those of all processes.

  Raises:
    ValueError: two of them contradict each other.
    UserError: they are of an earlier version, whose positions belonged to processes.
  """
  if any('tickets' in state for state in states):
    raise UserError(
      f'{name} in data.sources was saved by an earlier version, which dealt them to processes, and cannot be read any more; begin in '
      'another --workdir, with --config.init_from=RUN/export of a finished run'
    )
  shards = {}
  for state in states:
    mine = state.get('shards', {})
    if state | {'shards': {}} != states[0] | {'shards': {}} or any(
      shards.get(shard, mine[shard]) != mine[shard] for shard in mine
    ):
      raise ValueError(f'{name} that one process saved contradicts that of another')
    shards |= mine
  return states[0] | ({'shards': shards} if shards else {})


def _read_position(file) -> dict:
  saved = json.loads(file.read_text())
  if 'next_index' in saved:  # as earlier versions counted, by examples; a step is a batch
    return {'batches': int(file.parent.parent.name)}
  if _sum(saved['state']) != saved['sum']:
    raise ValueError(f'{file.name} is not what was saved')
  return json.loads(saved['state'])


@ocp.args.register_with_handler(PositionHandler, for_save=True)
@dataclasses.dataclass
class PositionSave(ocp.args.CheckpointArgs):
  item: Any


@ocp.args.register_with_handler(PositionHandler, for_restore=True)
@dataclasses.dataclass
class PositionRestore(ocp.args.CheckpointArgs):
  item: Any
