"""Counts the operations, memory traffic and network traffic of a compiled program.

The counts come from XLA's text of the program. XLA's own cost analysis counts the body of a loop
once; here it counts as often as it runs, so that scanned layers are complete. All numbers are of
one device.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lavit_jax.compile import hlo
from lavit_jax.compile.hlo import Array, Instruction

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
SLICES = ('dynamic-slice', 'slice', 'gather')
# These move nothing, or the traffic is counted where they start.
FREE = (
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'while',
  'conditional',
  'call',
  'after-all',
  'partition-id',
  'replica-id',
  'iota',
  'opt-barrier',
  'copy-done',
  'async-update',
  'async-done',
)

KernelFlops = Callable[[str, Sequence[tuple[int, ...]]], float]
Instructions = Mapping[str, Instruction]  # by name


class Cost(NamedTuple):
  """The cost of one run.

  Attributes:
    flops: floating-point operations of matrix products, convolutions and kernels.
    bytes: from and to HBM.
    network: kind of collective -> bytes that the device sends.
  """

  flops: float
  bytes: float
  network: Counter[str]

  def plus(self, other: Cost) -> Cost:
    """The cost of both."""
    network = self.network + other.network
    return Cost(self.flops + other.flops, self.bytes + other.bytes, network)

  def times(self, count: int) -> Cost:
    """The cost of several runs; a negative count subtracts in `plus`."""
    network = Counter({kind: count * size for kind, size in self.network.items()})
    return Cost(count * self.flops, count * self.bytes, network)


class Loop(NamedTuple):
  """A loop: how often its body runs, and what one run of the body costs."""

  trip_count: int
  body: Cost


class ProgramCost(NamedTuple):
  """The cost of a program, and its loops that are not inside another one."""

  total: Cost
  loops: list[Loop]


ZERO = Cost(0.0, 0.0, Counter())


def no_kernel_flops(name: str, shapes: Sequence[tuple[int, ...]]) -> float:
  """Counts nothing, for a program without kernels."""
  del name, shapes
  return 0.0


def analyze(text: str, kernel_flops: KernelFlops = no_kernel_flops) -> ProgramCost:
  """Counts what a program costs.

  Args:
    text: as `compiled.as_text()` returns it.
    kernel_flops: (name, shapes of the operands) -> the operations of one call of a kernel, whose
      body is not in the text.
  """
  program = hlo.parse(text)
  counter = _Counter(program.computations, kernel_flops)
  loops = []
  for line in program.computations[program.entry]:
    if line.opcode == 'while':
      loops.append(counter.loop(line))
  return ProgramCost(counter.computation(program.entry), loops)


def total_cost(text: str, kernel_flops: KernelFlops = no_kernel_flops) -> Cost:
  """The total of `analyze`."""
  return analyze(text, kernel_flops).total


class _Counter:
  """Adds up the computations of a program, each of them once.

  Args:
    computations: of the program, by name.
    kernel_flops: as in `analyze`.
  """

  def __init__(self, computations: Mapping[str, list[Instruction]], kernel_flops: KernelFlops):
    self._computations = computations
    self._kernel_flops = kernel_flops
    self.computation = functools.cache(self._computation)

  def _computation(self, name: str) -> Cost:
    """The cost of a computation."""
    lines = self._computations[name]
    by_name = {line.name: line for line in lines}
    total = ZERO
    channels = set()
    for line in lines:
      cost = self._instruction(line, by_name)
      channel = self._channel(line)
      if channel is not None:
        if channel in channels:
          # A piece of a collective that overlaps with other work; each is written as the whole.
          cost = cost._replace(network=Counter())
        channels.add(channel)
      total = total.plus(cost)
    return total

  def loop(self, line: Instruction) -> Loop:
    """The trip count of a `while`, and the cost of its body."""
    return Loop(
      self._trip_count(_called(line, 'condition')), self.computation(_called(line, 'body'))
    )

  def _trip_count(self, condition: str) -> int:
    """How often a loop runs: JAX counts from 0 to a constant in the condition."""
    constants = []
    for line in self._computations[condition]:
      if line.opcode == 'constant' and line.arrays[0].dtype in ('s32', 'u32'):
        constants.append(int(line.attributes))
    return max(constants, default=1)

  def _channel(self, line: Instruction) -> str | None:
    """The channel of the collective that a line is, or that a fusion contains."""
    lines = self._computations[_called(line, 'calls')] if line.opcode == 'fusion' else [line]
    for inner in lines:
      if inner.opcode.removesuffix('-start') in COLLECTIVES:
        match = re.search(r'channel_id=(\d+)', inner.attributes)
        return match[1] if match else None
    return None

  def _instruction(self, line: Instruction, by_name: Instructions) -> Cost:
    """The cost of one line, with the computations that it calls."""
    opcode = line.opcode
    if opcode == 'while':
      loop = self.loop(line)
      return loop.body.times(loop.trip_count)
    if opcode == 'conditional':
      # The expensive branch is the exception, such as k-means at the start of a run.
      branches = [self.computation(name) for name in _branches(line)]
      return min(branches, key=lambda cost: cost.flops)
    if opcode == 'call':
      return self.computation(_called(line, 'to_apply'))
    collective = opcode.removesuffix('-start')
    if collective in COLLECTIVES:
      return _collective_cost(collective, line, by_name)
    if opcode in FREE or opcode.endswith('-done'):
      return ZERO
    if opcode in ('fusion', 'async-start'):
      return self._fusion(line, by_name)
    if opcode == 'custom-call':
      return self._custom_call(line, by_name)
    return Cost(_flops(line, by_name), _bytes_moved(line, by_name), Counter())

  def _fusion(self, line: Instruction, by_name: Instructions) -> Cost:
    """A fusion: the operations in it, and the traffic of its inputs and outputs."""
    called = _called(line, 'calls')
    inner = self.computation(called)
    network = inner.network
    if called.startswith('all-reduce-scatter'):
      # The reduce-scatter of TPUs: a device receives only its share of the sum.
      network = Counter({'reduce-scatter': network.total() / 2})
    return Cost(inner.flops, float(self._fusion_bytes(line)), network)

  def _custom_call(self, line: Instruction, by_name: Instructions) -> Cost:
    if 'custom_call_target="tpu_custom_call"' not in line.attributes:
      return ZERO  # a mark of the compiler
    shapes = [array.shape for array in _operand_arrays(line, by_name)]
    return Cost(self._kernel_flops(line.name, shapes), _all_bytes(line, by_name), Counter())

  def _fusion_bytes(self, line: Instruction) -> int:
    """What a fusion reads and writes.

    Of an array that it only slices, the slices count; of one that it updates in place, the update.
    """
    lines = self._computations[_called(line, 'calls')]
    by_name = {inner.name: inner for inner in lines}
    users: dict[str, list[Instruction]] = {}
    for inner in lines:
      for operand in inner.operands:
        users.setdefault(operand, []).append(inner)
    total = 0
    for inner in lines:
      if inner.opcode == 'parameter':
        total += _bytes_read(inner, _users_behind_bitcasts(inner.name, users))
    root = next(inner for inner in lines if inner.is_root)
    outputs = [by_name[name] for name in root.operands] if root.opcode == 'tuple' else [root]
    for output, array in zip(outputs, line.arrays, strict=False):
      if array.on_chip:
        continue
      while output.opcode == 'bitcast':
        output = by_name[output.operands[0]]
      if output.opcode == 'dynamic-update-slice':
        total += by_name[output.operands[1]].arrays[0].nbytes
      else:
        total += array.nbytes
    return total


# --- Calls ---------------------------------------------------------------------------------------


def _called(line: Instruction, attribute: str) -> str:
  """The computation that an attribute of a line names."""
  match = re.search(rf'{attribute}=%?([\w.\-]+)', line.attributes)
  assert match is not None, f'{line.name} has no {attribute}'
  return match[1]


def _branches(line: Instruction) -> list[str]:
  listed = re.search(r'branch_computations=\{([^}]*)\}', line.attributes)
  if listed:
    return hlo.find_names(listed[1])
  return [_called(line, 'true_computation'), _called(line, 'false_computation')]


def _users_behind_bitcasts(name: str, users: Mapping[str, list[Instruction]]) -> list[Instruction]:
  """The instructions that use a value, or a bitcast of it."""
  found = []
  for user in users.get(name, ()):
    if user.opcode == 'bitcast':
      found.extend(_users_behind_bitcasts(user.name, users))
    else:
      found.append(user)
  return found


# --- Memory traffic ------------------------------------------------------------------------------


def _operand_arrays(line: Instruction, by_name: Instructions) -> list[Array]:
  arrays = []
  for name in line.operands:
    arrays.extend(by_name[name].arrays)
  return arrays


def _all_bytes(line: Instruction, by_name: Instructions) -> float:
  """HBM traffic of a line that reads all its operands and writes all its results once."""
  arrays = (*line.arrays, *_operand_arrays(line, by_name))
  return float(sum(array.hbm_bytes for array in arrays))


def _bytes_moved(line: Instruction, by_name: Instructions) -> float:
  """HBM traffic of a line."""
  if line.opcode == 'dynamic-update-slice':
    update = by_name[line.operands[1]].arrays[0]
    return 2.0 * update.hbm_bytes
  if line.opcode in SLICES:
    return 2.0 * sum(array.hbm_bytes for array in line.arrays)
  if line.opcode == 'copy-start':  # its results are (target, source, a flag)
    return float(sum(array.hbm_bytes for array in line.arrays[:2]))
  if line.opcode.endswith('slice-start'):  # its results are (source, target, a flag)
    source, target = line.arrays[:2]
    return float(sum(target.nbytes for array in (source, target) if not array.on_chip))
  return _all_bytes(line, by_name)


def _bytes_read(parameter: Instruction, users: Sequence[Instruction]) -> int:
  """HBM traffic of an input of a fusion."""
  if users and all(user.opcode in SLICES for user in users):
    if not parameter.arrays[0].hbm_bytes:
      return 0
    total = 0
    for user in users:
      total += sum(array.nbytes for array in user.arrays)
    return total
  is_in_place = [
    user.opcode == 'dynamic-update-slice' and user.arrays == parameter.arrays for user in users
  ]
  if users and all(is_in_place):
    return 0
  return sum(array.hbm_bytes for array in parameter.arrays)


# --- Network traffic -----------------------------------------------------------------------------


def _collective_cost(kind: str, line: Instruction, by_name: Instructions) -> Cost:
  size = sum(array.nbytes for array in _operand_arrays(line, by_name))
  sent = _bytes_sent(kind, size, _group_size(line.attributes))
  return Cost(0.0, 2.0 * size, Counter({kind: sent}))


def _group_size(attributes: str) -> int:
  """The number of devices that take part in one collective."""
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', attributes)
  if listed:
    return len(listed[1].split(','))
  iota = re.search(r'replica_groups=\[(\d+),(\d+)\]', attributes)
  if iota:
    return int(iota[2])
  mesh = re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}', attributes
  )
  if mesh:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
  return 2  # a permutation


def _bytes_sent(kind: str, size: int, group: int) -> float:
  """Bytes that a device sends in the best known algorithm.

  Args:
    kind: of collective.
    size: bytes of the operands.
    group: number of devices.
  """
  share = (group - 1) / group
  return {
    'all-reduce': 2 * share * size,
    'all-gather': (group - 1) * size,
    'reduce-scatter': share * size,
    'all-to-all': share * size,
    'collective-permute': float(size),
  }[kind]


# --- Operations ----------------------------------------------------------------------------------


def _flops(line: Instruction, by_name: Instructions) -> float:
  if line.opcode == 'dot':
    return _dot_flops(line, by_name[line.operands[0]].arrays[0].shape)
  if line.opcode == 'convolution':
    left, right = (by_name[name].arrays[0].shape for name in line.operands[:2])
    return _convolution_flops(line, left, right)
  return 0.0


def _dot_flops(line: Instruction, left: tuple[int, ...]) -> float:
  match = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', line.attributes)
  assert match is not None
  contracted = math.prod(left[int(axis)] for axis in match[1].split(',') if axis)
  return 2.0 * math.prod(line.arrays[0].shape) * contracted


def _convolution_flops(line: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
  """The operations of a convolution that meet neither padding nor holes.

  XLA writes a batch of matrix products as a convolution that mostly meets those.
  """
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', line.attributes)
  assert labels is not None
  left_labels, right_labels, output_labels = labels.groups()
  output = line.arrays[0].shape
  products = (
    left[left_labels.index('b')] * right[right_labels.index('i')] * right[right_labels.index('o')]
  )
  groups = re.search(r'batch_group_count=(\d+)', line.attributes)
  if groups:
    products //= int(groups[1])
  window = _Window(line.attributes)
  for number, axis in enumerate(sorted(set(left_labels) - set('bf'))):
    products *= window.count(
      number, left[left_labels.index(axis)], output[output_labels.index(axis)]
    )
  return 2.0 * products


class _Window:
  """The window of a convolution, whose options list a value for each spatial axis."""

  def __init__(self, attributes: str):
    window = re.search(r'window=\{([^}]*)\}', attributes)
    options = re.findall(r'(\w+)=([\w\-]+)', window[1]) if window else []
    self._options = {key: values.split('x') for key, values in options}

  def count(self, number: int, input_size: int, output_size: int) -> int:
    """How often the window meets an input, on one axis.

    Args:
      number: of the axis.
      input_size: on the axis, without holes.
      output_size: on the axis.
    """
    hole = int(self._get('lhs_dilate', number, '1'))  # the distance of inputs
    padding = int(self._get('pad', number, '0_0').split('_')[0])
    starts = np.arange(output_size) * int(self._get('stride', number, '1'))
    offsets = np.arange(int(self._get('size', number, '1')))
    offsets = offsets * int(self._get('rhs_dilate', number, '1'))
    positions = starts[:, None] + offsets - padding
    inside = (positions >= 0) & (positions < (input_size - 1) * hole + 1)
    return int((inside & (positions % hole == 0)).sum())

  def _get(self, key: str, number: int, default: str) -> str:
    return self._options[key][number] if key in self._options else default
