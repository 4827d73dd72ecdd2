"""Checkpoints of the PyTorch family <-> parameter trees, both directions from one table of rows.

A row pairs a torch name with a leaf: `Row('blocks.{i}.attn.proj.weight', 'blocks/attn/proj/kernel', 'linear')`. `{i}` counts
layers, which the leaf stacks on axis 0. Nothing is skipped in silence: every torch name must be claimed by a row and every
leaf filled, or `PortingError` lists all that is wrong before any array is touched.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lavit_jax.errors import UserError

STRIP = 16  # columns; a few cache lines of the source
MAX_HINTS = 20  # a foreign file may have a thousand strange names; looking up a nearest one takes milliseconds


MAX_LISTED = 6  # offending names of each kind in a message; the others are counted


class PortingError(UserError):
  """A checkpoint and a model that do not fit; the message lists the first offending names of each kind, and counts the others.

  Attributes:
    problems: all of them, each 'kind: what is wrong' or 'part: kind: what is wrong'.
  """

  def __init__(self, text: str, problems: Iterable[str] = ()):
    self.problems = list(problems)
    super().__init__('\n  '.join([f'{text} ({len(self.problems)} problems):', *shortened(self.problems)]) if self.problems else text)


def shortened(problems: list[str]) -> list[str]:
  """The first MAX_LISTED problems of each kind and part, and the number of the others."""
  kinds = {}
  for problem in problems:
    kind = re.match(r'(\w+: )?(unmapped|unexpected|missing|duplicate|wrong \w+)', problem)
    kinds.setdefault(kind[0] if kind else '', []).append(problem)
  lines = []
  for kind, alike in kinds.items():
    lines += alike[:MAX_LISTED]
    if alike[MAX_LISTED:]:
      lines.append(f'{kind}: and {len(alike) - MAX_LISTED} more')
  return lines


class Row(NamedTuple):
  """One line of a table: a torch name is a leaf, seen through a transform.

  An `optional` row may be absent from the file, as a whole; its leaf is then absent from the tree. A row whose `leaf` is
  None names what the file may hold for another part of the model.
  """

  name: str
  leaf: str | None
  transform: str = 'copy'
  optional: bool = False


class Transform(NamedTuple):
  """A bijection between the torch array of one layer and the leaf of one layer."""

  to_flax: Callable[[np.ndarray], np.ndarray]
  to_torch: Callable[[np.ndarray], np.ndarray]


TRANSFORMS = {
    'copy': Transform(lambda x: x, lambda x: x),
    'linear': Transform(lambda x: x.T, lambda x: x.T),  # [out, in] <-> [in, out]
    'conv': Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),  # OIHW <-> HWIO
    'conv1x1_to_linear': Transform(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]),
    'qkv': Transform(  # [3 * out, in] <-> [3, in, out]
        lambda x: x.reshape(3, -1, x.shape[1]).swapaxes(1, 2), lambda x: x.swapaxes(1, 2).reshape(-1, x.shape[1])
    ),
    'qkv_bias': Transform(lambda x: x.reshape(3, -1), lambda x: x.reshape(-1)),
    'unbatch': Transform(lambda x: x[0], lambda x: x[None]),  # [1, ...] <-> [...]
}


def contiguous(view: np.ndarray) -> np.ndarray:
  """The array as it lies in C order; a transposed view is copied in strips, which takes a seventh of numpy's time on large matrices."""
  if view.flags.c_contiguous or view.ndim < 2:
    return view
  out = np.empty(view.shape, view.dtype)
  for start in range(0, view.shape[-1], STRIP):
    out[..., start:start + STRIP] = view[..., start:start + STRIP]
  return out


class Slot(NamedTuple):
  """Where one torch array belongs: a leaf, the layer of it (None: not stacked), and the row that says so."""

  leaf: str
  layer: int | None
  row: Row

  def array(self, leaves: Mapping) -> np.ndarray:
    """The torch array, made of the leaves; a view where that is possible."""
    leaf = leaves[self.leaf]
    return self.tensor_of(leaf if self.layer is None else leaf[self.layer])

  def tensor_of(self, array: np.ndarray) -> np.ndarray:
    """The torch array that the leaf, or the layer of it, is; a view where that is possible."""
    return TRANSFORMS[self.row.transform].to_torch(array)

  def row_of(self, array: np.ndarray) -> np.ndarray:
    """The leaf, or the layer of it, that the torch array is."""
    return TRANSFORMS[self.row.transform].to_flax(array)


class Plan(NamedTuple):
  """What becomes of a file: torch name -> slot, path -> shape and dtype of each leaf, and the leaves that are stacks."""

  slots: dict[str, Slot]
  leaves: dict[str, jax.ShapeDtypeStruct]
  stacked: frozenset[str]


def plan(rows: Iterable[Row], state: Mapping, like: Mapping, allow_missing: str = '', mixed: bool = False) -> Plan:
  """Matches a file with a model, without touching any array.

  Args:
    rows: the table.
    state: torch name -> anything with a shape and a dtype. Overlay one file on another by merging their dicts.
    like: the tree wanted, of arrays or `jax.eval_shape`'s structs; gives number of layers and shapes. The types are the file's.
    allow_missing: regex of torch names that may be missing; a leaf is then absent, if it is missing as a whole.
    mixed: layers of one leaf may be of several floating types; the leaf then has the widest of them.

  Raises:
    PortingError: a name is unmapped (no row knows it), unexpected (the model has no such layer or leaf) or missing, a name or
      leaf is claimed twice, a shape is wrong, or a type (integers for numbers, or several types in one stack).
  """
  rows, like = [Row(*row) for row in rows], flatten_dict(like, sep='/')
  slots, problems = _slots(rows, like)
  try:
    allowed = re.compile(allow_missing) if allow_missing else None
  except re.error as error:
    raise PortingError(f'{allow_missing!r} is not a regular expression ({error})') from None
  absent = {s.leaf for name, s in slots.items() if name not in state and (s.row.optional or allowed and allowed.search(name))}
  absent -= {s.leaf for name, s in slots.items() if name in state}  # a stack is there as a whole or not at all
  wanted = {name: slot for name, slot in slots.items() if slot.leaf not in absent}
  problems += _strangers(rows, slots, state) + _missing(wanted, slots, state)
  blank = {path: np.broadcast_to(np.zeros((), x.dtype), x.shape) for path, x in like.items()}  # shapes without memory
  dtypes = {}
  for name in [name for name in state if name in wanted]:
    shape, expected = tuple(state[name].shape), wanted[name].array(blank).shape
    leaf, dtype = wanted[name].leaf, np.dtype(state[name].dtype)
    if shape != expected:
      problems.append(f'wrong shape: {name} is {list(shape)}, the model wants {list(expected)}')
    if _floating(dtype) != _floating(like[leaf].dtype):
      problems.append(f'wrong dtype: {name} is {dtype}, the model wants {np.dtype(like[leaf].dtype)}')
    elif dtypes.setdefault(leaf, dtype) != dtype and not mixed:
      problems.append(f'wrong dtype: {name} is {dtype}, other layers of it are {dtypes[leaf]}; choose one type for all of them, as --dtype '
                      f'{_widest(dtype, dtypes[leaf])} does, or dtype= in Python')
    elif mixed:
      dtypes[leaf] = _widest(dtypes[leaf], dtype)
  if not wanted:
    problems.append('the file fills no leaf at all')
  _check(problems)
  return Plan(wanted, {leaf: jax.ShapeDtypeStruct(like[leaf].shape, dtype) for leaf, dtype in dtypes.items()},
              frozenset(slot.leaf for slot in wanted.values() if slot.layer is not None))


def from_torch(rows: Iterable[Row], state: Mapping, like: Mapping, place: Callable | None = None) -> dict:
  """Torch arrays -> parameter tree of numpy arrays, in the types of `like`.

  Args:
    rows, state, like: as for `plan`; `np.asarray` reads the arrays of `state`, when their turn comes.
    place: (path, array) -> what to put in the tree; one leaf at a time is in memory.

  Returns:
    A tree like `like`, less the leaves of optional rows that the file lacks.

  Raises:
    PortingError: as `plan`.
  """
  slots, leaves, _ = plan(rows, state, like)
  like, tree = flatten_dict(like, sep='/'), {}
  for leaf in leaves:
    array = np.empty(like[leaf].shape, like[leaf].dtype)
    for name, slot in slots.items():
      if slot.leaf == leaf:
        array[... if slot.layer is None else slot.layer] = contiguous(slot.row_of(np.asarray(state[name])))
    tree[leaf] = array if place is None else place(leaf, array)
  return unflatten_dict(tree, sep='/')


def to_torch(rows: Iterable[Row], params: Mapping) -> dict[str, np.ndarray]:
  """Parameter tree -> torch name -> contiguous array; the inverse of `from_torch`.

  Raises:
    PortingError: a leaf has no row, a row that is not optional has no leaf, or something is claimed twice.
  """
  leaves = {path: np.asarray(x) for path, x in flatten_dict(params, sep='/').items()}
  slots = slots_of(rows, leaves)
  return {name: contiguous(slot.array(leaves)) for name, slot in slots.items()}


def slots_of(rows: Iterable[Row], leaves: Mapping) -> dict[str, Slot]:
  """torch name -> slot, for these leaves (path -> anything with a shape) and no others.

  Raises:
    PortingError: as `to_torch`.
  """
  slots, problems = _slots([Row(*row) for row in rows], leaves)
  _check(problems)
  return slots


def torch_shapes(rows: Iterable[Row], like: Mapping) -> dict[str, tuple[int, ...]]:
  """The torch name and shape of everything in a tree of arrays or structs, without computing on any."""
  blank = {path: np.broadcast_to(np.float32(0), x.shape) for path, x in flatten_dict(like, sep='/').items()}
  slots = slots_of(rows, blank)
  return {name: slot.array(blank).shape for name, slot in slots.items()}


def _slots(rows: list[Row], leaves: Mapping) -> tuple[dict[str, Slot], list[str]]:
  """Expands the rows over the layers of the leaves: torch name -> slot, and what is wrong with the table."""
  slots, claimed, problems = {}, {}, []
  for row in rows:
    if row.leaf is None:
      continue
    if row.leaf in claimed:
      problems.append(f'duplicate: leaf {row.leaf} is claimed by {claimed[row.leaf]} and {row.name}')
      continue
    claimed[row.leaf] = row.name
    if row.leaf not in leaves:
      if not row.optional:
        problems.append(f'unexpected: {row.name} belongs to leaf {row.leaf}, which the model does not have')
      continue
    for layer in range(leaves[row.leaf].shape[0]) if '{i}' in row.name else (None,):
      name = row.name if layer is None else row.name.replace('{i}', str(layer))
      if name in slots:
        problems.append(f'duplicate: {name} is claimed by leaves {slots[name].leaf} and {row.leaf}')
      slots[name] = Slot(row.leaf, layer, row)
  problems += [f'unmapped: no row names leaf {path}' for path in leaves if path not in claimed]
  return slots, problems


def _strangers(rows: list[Row], slots: Mapping, state: Mapping) -> list[str]:
  """Names in the file that nothing takes: of leaves or layers the model lacks (unexpected), or of no row (unmapped)."""
  table, elsewhere = _pattern(rows), _pattern([row for row in rows if row.leaf is None])
  problems, hints = [], 0
  for name in state:
    if name in slots or elsewhere.fullmatch(name):
      continue
    if table.fullmatch(name):
      problems.append(f'unexpected: the model has no place for {name} (fewer layers?)')
    else:
      hints += 1
      problems.append(f'unmapped: no row names {name}' + (_nearest(name, slots) if hints <= MAX_HINTS else ''))
  return problems


def _pattern(rows: list[Row]) -> re.Pattern:
  """Matches every torch name that the rows know, of whatever layer."""
  return re.compile('|'.join(re.escape(row.name).replace(re.escape('{i}'), r'\d+') for row in rows))


def _missing(wanted: Mapping, slots: Mapping, state: Mapping) -> list[str]:
  """Names that a leaf waits for; the nearest of the file's names that nothing takes may be a misspelling."""
  names, free = [name for name in wanted if name not in state], [name for name in state if name not in slots]
  return [f'missing: {name}' + (_nearest(name, free) if n < MAX_HINTS else '') for n, name in enumerate(names)]


def _nearest(name: str, known: Iterable[str]) -> str:
  near = difflib.get_close_matches(name, known, 1)
  return f' (nearest known: {near[0]})' if near else ''


def _widest(*dtypes) -> np.dtype:
  """The type that holds the numbers of all of them."""
  return functools.reduce(jnp.promote_types, dtypes)


def _floating(dtype) -> bool:
  return np.dtype(dtype).kind in 'fV'


def _check(problems: list[str]) -> None:
  if problems:
    raise PortingError('checkpoint and model do not fit', problems)
