"""Shards of the data, and the tickets of stores: endless sequences that stop and go on anywhere.

A source is divided into `data.shards` shards, whatever the processes: shard v of V fills the rows
v * B / V to (v + 1) * B / V - 1 of every global batch of B. A process reads the shards whose rows
its devices have, so the global batches are the same on any number of processes and any mesh. The
state of a shard is a few integers per source.

A `Ticket` is a promise of a record: the images of stores are read where they are decoded, in
parallel. streams.py has the tickets of streams.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from lavit_jax.data.record import Record, Skip
from lavit_jax.data.skips import SourceInfo
from lavit_jax.errors import UserError

GOLDEN = (5**0.5 - 1) / 2  # its multiples are spread evenly, modulo 1


class Ticket(NamedTuple):
  """A record to come.

  Attributes:
    key: the same in every run, whatever the number of processes; it seeds what is random about
      the example.
    use: of the source.
    read: returns the record.
    epoch: how many times the record has come before.
    unit: the unit of a stream that the record is in; 0 of a store.
    position: where the record is in the unit, or its index in the store.
  """

  key: tuple[int, ...]
  use: str
  read: Callable[[], Record | Skip]
  epoch: int = 0
  unit: int = 0
  position: int | None = None


def shards_of(rows: Sequence[int], batch_size: int, shards: int) -> list[int]:
  """The shards that fill these `rows` of a global batch, ascending.

  Raises:
    UserError: the shards do not divide the batch, or `rows` has only a part of some shard's rows.
  """
  if shards < 1 or batch_size % shards:
    raise UserError(f'batch_size={batch_size} must be a multiple of data.shards={shards}')
  rows_per_shard = batch_size // shards
  local_shards = sorted({int(row) // rows_per_shard for row in rows})
  if len(local_shards) * rows_per_shard != len(rows):
    raise UserError(
      f'data.shards={shards} cannot be dealt to processes that hold {len(rows)} of {batch_size} '
      'rows in this order; data.shards must be a multiple of the pieces that the mesh makes of a '
      'batch (data x fsdp), or start fewer processes'
    )
  return local_shards


class ShardSource(Protocol):
  """The part of one source that a shard reads: an endless iterator of tickets with a state."""

  def begin(self) -> None:
    """Begins to read, and does not wait for it."""
    ...

  def __next__(self) -> Ticket: ...

  def get_state(self) -> Any:
    """The position, as JSON."""
    ...

  def set_state(self, state: Any) -> None:
    """Goes to a position."""
    ...


class Shard:
  """One shard: its part of each source, and the source that each of its rows is of.

  The source of a row follows multiples of the golden ratio, which spread the sources evenly over
  the shard's rows. Each shard starts at another phase, so that every batch has its part of every
  source.

  Args:
    number: of the shard.
    count: of all shards.
    sources: the shard's part of each source.
    weights: of the sources.
    infos: the sources, for messages.
  """

  def __init__(
    self,
    number: int,
    count: int,
    sources: Sequence[ShardSource],
    weights: Sequence[float],
    infos: Sequence[SourceInfo],
  ):
    self.sources = sources
    self.infos = infos
    self._bounds = np.cumsum(weights) / sum(weights)
    self._bounds[-1] = 1.0
    self._phase = number / count
    self._rows = 0  # at the state that was set

  def begin(self) -> None:
    """Begins to read, and does not wait for it."""
    for source in self.sources:
      source.begin()

  def source_of(self, row: int) -> int:
    """The number of the source of a row, which is counted within the shard."""
    return int(np.searchsorted(self._bounds, (row * GOLDEN + self._phase) % 1, side='right'))

  def get_state(self) -> dict[str, Any]:
    """The state that was set, or the first one."""
    return {'taken': self._rows, 'sources': [source.get_state() for source in self.sources]}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a state."""
    self._rows = state['taken']
    for source, source_state in zip(self.sources, state['sources'], strict=True):
      source.set_state(source_state)


def rotate_index(index: int, count: int) -> int:
  """The receiver, of `count`, of item `index`, where each round starts at another receiver.

  With a fixed start, eight records in eight shards would give each shard the same record for ever,
  and a shard whose only record is bad would have none.
  """
  turn, place = divmod(index, count)
  return (place + int(turn * GOLDEN % 1 * count)) % count


class StoreShard:
  """A shard's tickets of a store: one of every `count` tickets, in the order of `open_stored`.

  Args:
    tickets: of the whole store, endless.
    number: of the shard.
    count: of all shards.
  """

  def __init__(self, tickets: grain.MapDataset, number: int, count: int):
    self._tickets = tickets
    self._number = number
    self._count = count
    self._taken = 0

  def begin(self) -> None:
    """Nothing: the threads that decode an image read it."""

  def __next__(self) -> Ticket:
    first = self._taken * self._count
    self._taken += 1
    ticket = self._tickets[first + rotate_index(first + self._number, self._count)]
    assert ticket is not None  # grain: a filtered element
    return ticket

  def get_state(self) -> int:
    """The number of tickets taken."""
    return self._taken

  def set_state(self, state: int) -> None:
    """Goes to a number of tickets."""
    self._taken = state


def open_stored(records: Any, number: int, use: str, seed: int | None) -> grain.MapDataset:
  """The tickets of a store, endless, in a new order each epoch.

  Args:
    records: the store (stores.py).
    number: of the source.
    use: of the source.
    seed: of the run; None: in order.
  """

  def make_ticket(position: int, index: int) -> Ticket:
    return Ticket(
      key=(number, position),
      use=use,
      read=functools.partial(records.read, index),
      epoch=position // len(records),
      position=index,
    )

  indices = grain.MapDataset.range(len(records))
  if seed is not None:
    indices = indices.shuffle(_store_seed(seed, number))
  return indices.repeat().map_with_index(make_ticket)


def _store_seed(seed: int, number: int) -> int:
  """The seed of a store's order; the first source has the run's.

  Two sources of equal length need different orders, or an image meets itself in a batch.
  """
  if not number:
    return seed
  return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
