"""PyTorch state dicts <-> parameter trees, in both directions, from one table of rules.

A rule pairs a torch name with a leaf: `NameRule('blocks.{i}.attn.proj.weight',
'blocks/attn/proj/kernel', 'linear')`. `{i}` counts layers, which the leaf stacks on axis 0. Nothing
is skipped silently: a rule must claim every torch name and fill every leaf, or `PortingError` lists
all that is wrong before any array is read.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from numpy.typing import DTypeLike

from lavit_jax.errors import UserError
from lavit_jax.weights.torch.name_rules import (
  NameRule,
  Slot,
  contiguous,
  leaves_by_path,
  zeros_view,
)
from lavit_jax.weights.torch.tensors import ArraySpec

MAX_HINTS = 20  # names for which a nearest one is looked up, which takes milliseconds
MAX_LISTED = 6  # names of each kind in a message; the others are counted


# --- Errors ----------------------------------------------------------------------------------


class PortingError(UserError):
  """A checkpoint and a model that do not fit.

  The message lists the first names of each kind, and counts the others.

  Attributes:
    problems: all of them, each 'kind: what is wrong' or 'module: kind: what is wrong'.
  """

  def __init__(self, text: str, problems: Iterable[str] = ()):
    self.problems = list(problems)
    if self.problems:
      heading = f'{text} ({len(self.problems)} problems):'
      text = '\n  '.join([heading, *shorten(self.problems)])
    super().__init__(text)


def shorten(problems: Iterable[str]) -> list[str]:
  """The first MAX_LISTED problems of each kind and module, and the number of the others."""
  by_kind: dict[str, list[str]] = {}
  for problem in problems:
    kind = re.match(r'(\w+: )?(unmapped|unexpected|missing|duplicate|wrong \w+)', problem)
    by_kind.setdefault(kind[0] if kind else '', []).append(problem)
  lines = []
  for kind, alike in by_kind.items():
    lines += alike[:MAX_LISTED]
    if len(alike) > MAX_LISTED:
      lines.append(f'{kind}: and {len(alike) - MAX_LISTED} more')
  return lines


def _raise_if_any(problems: Sequence[str]) -> None:
  if problems:
    raise PortingError('checkpoint and model do not fit', problems)


# --- Plans -----------------------------------------------------------------------------------


class MappingPlan(NamedTuple):
  """How the tensors of a file become leaves.

  Attributes:
    slots: torch name -> slot.
    leaves: path -> shape and dtype of each leaf.
    stacked: the leaves that stack layers.
  """

  slots: dict[str, Slot]
  leaves: dict[str, jax.ShapeDtypeStruct]
  stacked: frozenset[str]


def make_plan(
  rules: Iterable[NameRule],
  state: Mapping[str, ArraySpec],
  like: Mapping,
  allow_missing: str = '',
  mixed: bool = False,
) -> MappingPlan:
  """Matches a file with a model, without reading any array.

  Args:
    rules: the table.
    state: torch name -> anything with a shape and a dtype.
    like: tree of arrays or structs, which gives the number of layers and the shapes. The dtypes
      are the file's.
    allow_missing: regex of torch names that may be missing; a leaf is then absent, if all of it is
      missing.
    mixed: layers of one leaf may have several floating types; the leaf then has the widest.

  Raises:
    PortingError: a name is unmapped (no rule has it), unexpected (the model has no such layer or
      leaf) or missing, a name or leaf is claimed twice, a shape is wrong, or a dtype (integers for
      floating numbers, or several in one stack).
  """
  rules = [NameRule(*rule) for rule in rules]
  leaves = leaves_by_path(like)
  slots, problems = _expand(rules, leaves)
  absent = _absent_leaves(slots, state, allow_missing)
  required = {name: slot for name, slot in slots.items() if slot.leaf not in absent}
  problems += _unknown_names(rules, slots, state)
  problems += _missing_names(required, slots, state)
  dtypes, mismatches = _leaf_dtypes(required, state, leaves, mixed)
  problems += mismatches
  if not required:
    problems.append('the file fills no leaf at all')
  _raise_if_any(problems)
  return MappingPlan(
    required,
    {leaf: jax.ShapeDtypeStruct(leaves[leaf].shape, dtype) for leaf, dtype in dtypes.items()},
    frozenset(slot.leaf for slot in required.values() if slot.layer is not None),
  )


def slots_for(rules: Iterable[NameRule], leaves: Mapping[str, ArraySpec]) -> dict[str, Slot]:
  """By torch name: the slot, for exactly these leaves.

  Args:
    rules: the table.
    leaves: path -> anything with a shape.

  Raises:
    PortingError: a leaf has no rule, a rule that is not optional has no leaf, or something is
      claimed twice.
  """
  slots, problems = _expand([NameRule(*rule) for rule in rules], leaves)
  _raise_if_any(problems)
  return slots


def torch_shapes(rules: Iterable[NameRule], like: Mapping) -> dict[str, tuple[int, ...]]:
  """By torch name: the shapes of a tree of arrays or structs; nothing is computed.

  Raises:
    PortingError: as `slots_for`.
  """
  blank = {path: zeros_view(leaf) for path, leaf in leaves_by_path(like).items()}
  slots = slots_for(rules, blank)
  return {name: slot.tensor_from(blank).shape for name, slot in slots.items()}


# --- Whole trees -----------------------------------------------------------------------------


def from_state_dict(
  rules: Iterable[NameRule],
  state: Mapping[str, Any],
  like: Mapping,
  transform_leaf: Callable[[str, np.ndarray], Any] | None = None,
) -> dict:
  """Torch arrays -> parameter tree of numpy arrays, in the dtypes of `like`.

  Args:
    rules: the table.
    state: torch name -> array; `np.asarray` reads each in its turn.
    like: tree of arrays or structs with the shapes and dtypes of the result.
    transform_leaf: (path, array) -> what the tree has in its place; one leaf at a time is in
      memory.

  Returns:
    A tree like `like`, less the leaves of optional rules that the file lacks.

  Raises:
    PortingError: as `make_plan`.
  """
  plan = make_plan(rules, state, like)
  specs = leaves_by_path(like)
  names_of: dict[str, list[str]] = {}
  for name, slot in plan.slots.items():
    names_of.setdefault(slot.leaf, []).append(name)
  tree = {}
  for leaf in plan.leaves:
    array = np.empty(specs[leaf].shape, specs[leaf].dtype)
    for name in names_of[leaf]:
      slot = plan.slots[name]
      index = ... if slot.layer is None else slot.layer
      array[index] = contiguous(slot.to_leaf(np.asarray(state[name])))
    tree[leaf] = array if transform_leaf is None else transform_leaf(leaf, array)
  return unflatten_dict(tree, sep='/')


def to_torch(rules: Iterable[NameRule], params: Mapping) -> dict[str, np.ndarray]:
  """Parameter tree -> torch name -> contiguous array; the inverse of `from_state_dict`.

  Raises:
    PortingError: as `slots_for`.
  """
  leaves = {path: np.asarray(leaf) for path, leaf in leaves_by_path(params).items()}
  slots = slots_for(rules, leaves)
  return {name: contiguous(slot.tensor_from(leaves)) for name, slot in slots.items()}


# --- Steps of `make_plan` --------------------------------------------------------------------


def _expand(
  rules: list[NameRule], leaves: Mapping[str, ArraySpec]
) -> tuple[dict[str, Slot], list[str]]:
  """Expands the rules over the layers of the leaves: torch name -> slot, and the problems."""
  slots: dict[str, Slot] = {}
  claimed: dict[str, str] = {}  # leaf -> torch name
  problems = []
  for rule in rules:
    if rule.leaf is None:
      continue
    if rule.leaf in claimed:
      problems.append(
        f'duplicate: leaf {rule.leaf} is claimed by {claimed[rule.leaf]} and {rule.name}'
      )
      continue
    claimed[rule.leaf] = rule.name
    if rule.leaf not in leaves:
      if not rule.optional:
        problems.append(
          f'unexpected: {rule.name} belongs to leaf {rule.leaf}, which the model does not have'
        )
      continue
    for layer in range(leaves[rule.leaf].shape[0]) if rule.is_stack else (None,):
      name = rule.name if layer is None else rule.layer_name(layer)
      if name in slots:
        problems.append(
          f'duplicate: {name} is claimed by leaves {slots[name].leaf} and {rule.leaf}'
        )
      slots[name] = Slot(rule.leaf, layer, rule)
  problems += [f'unmapped: no rule names leaf {leaf}' for leaf in leaves if leaf not in claimed]
  return slots, problems


def _absent_leaves(
  slots: Mapping[str, Slot], state: Collection[str], allow_missing: str
) -> set[str]:
  """The leaves that may be absent and of which the file has no layer."""
  try:
    allowed = re.compile(allow_missing) if allow_missing else None
  except re.error as error:
    raise PortingError(f'{allow_missing!r} is not a regular expression ({error})') from None
  absent = set()
  present = set()
  for name, slot in slots.items():
    if name in state:
      present.add(slot.leaf)
    elif slot.rule.optional or (allowed is not None and allowed.search(name)):
      absent.add(slot.leaf)
  return absent - present


def _leaf_dtypes(
  slots: Mapping[str, Slot],
  state: Mapping[str, ArraySpec],
  leaves: Mapping[str, ArraySpec],
  mixed: bool,
) -> tuple[dict[str, np.dtype], list[str]]:
  """The dtype of each leaf, and the tensors whose shape or dtype is wrong."""
  blank = {path: zeros_view(leaf) for path, leaf in leaves.items()}
  dtypes: dict[str, np.dtype] = {}
  problems = []
  for name, tensor in state.items():
    if name not in slots:
      continue
    leaf = slots[name].leaf
    shape = tuple(tensor.shape)
    expected = slots[name].tensor_from(blank).shape
    if shape != expected:
      problems.append(f'wrong shape: {name} is {list(shape)}, the model expects {list(expected)}')
    dtype = np.dtype(tensor.dtype)
    model_dtype = np.dtype(leaves[leaf].dtype)
    if _is_floating(dtype) != _is_floating(model_dtype):
      problems.append(f'wrong dtype: {name} is {dtype}, the model expects {model_dtype}')
      continue
    leaf_dtype = dtypes.setdefault(leaf, dtype)
    if mixed:
      dtypes[leaf] = _widest(leaf_dtype, dtype)
    elif leaf_dtype != dtype:
      problems.append(
        f'wrong dtype: {name} is {dtype}, other layers of it are {leaf_dtype}; choose one dtype '
        f'for all of them by --dtype {_widest(dtype, leaf_dtype)}, or dtype= in Python'
      )
  return dtypes, problems


def _unknown_names(
  rules: list[NameRule], slots: Mapping[str, Slot], state: Iterable[str]
) -> list[str]:
  """Names in the file without a slot.

  They belong to leaves or layers that the model lacks (unexpected), or to no rule (unmapped).
  """
  of_rules = _pattern(rules)
  of_other_modules = _pattern([rule for rule in rules if rule.leaf is None])
  problems = []
  hints = 0
  for name in state:
    if name in slots or of_other_modules.fullmatch(name):
      continue
    if of_rules.fullmatch(name):
      problems.append(f'unexpected: the model has no place for {name} (fewer layers?)')
      continue
    hint = _nearest(name, slots) if hints < MAX_HINTS else ''
    hints += 1
    problems.append(f'unmapped: no rule names {name}{hint}')
  return problems


def _missing_names(
  required: Iterable[str], slots: Collection[str], state: Collection[str]
) -> list[str]:
  """Names that a leaf needs; a name of the file without a slot may be their misspelling."""
  unused = [name for name in state if name not in slots]
  problems = []
  for name in required:
    if name not in state:
      hint = _nearest(name, unused) if len(problems) < MAX_HINTS else ''
      problems.append(f'missing: {name}{hint}')
  return problems


def _pattern(rules: Iterable[NameRule]) -> re.Pattern[str]:
  """Matches every torch name of the rules, in any layer."""
  return re.compile('|'.join(rule.pattern for rule in rules))


def _nearest(name: str, candidates: Iterable[str]) -> str:
  near = difflib.get_close_matches(name, list(candidates), 1)
  return f' (nearest known: {near[0]})' if near else ''


def _widest(*dtypes: DTypeLike) -> np.dtype:
  """The type that holds the numbers of all of them."""
  return np.dtype(functools.reduce(jnp.promote_types, dtypes))


def _is_floating(dtype: np.dtype) -> bool:
  return dtype.kind in 'fV'  # V: bfloat16
