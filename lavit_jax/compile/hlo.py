"""Cost of a compiled program: operations, memory traffic and network traffic of one chip.

All figures come from XLA's text of the program. XLA's own cost analysis counts the body of a loop
once. Here it counts as often as the loop runs, so scanned layers count in full.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lavit_jax.compile.hlo_flops import instruction_flops
from lavit_jax.compile.hlo_parser import Computation, Instruction, Module, operand_arrays, parse
from lavit_jax.compile.hlo_traffic import (
  channel_id,
  collective_kind,
  fusion_bytes,
  group_size,
  instruction_bytes,
  sent_bytes,
)

# (name of a kernel, shapes of its operands) -> floating-point operations of one call
KernelFlops = Callable[[str, Sequence[tuple[int, ...]]], float]

# Opcodes that move no data, or whose data count at the other instruction of a pair.
_FREE = frozenset(
  (
    'parameter',
    'constant',
    'tuple',
    'get-tuple-element',
    'bitcast',
    'after-all',
    'partition-id',
    'replica-id',
    'iota',
    'opt-barrier',
    'async-update',
  )
)


@dataclasses.dataclass(frozen=True)
class Cost:
  """The cost of one run, on one chip.

  Attributes:
    flops: floating-point operations of products, convolutions and kernels.
    hbm_bytes: bytes read from HBM and written to it.
    collective_bytes: {kind of collective: bytes that the chip sends}; kinds that send nothing may
      be left out.
  """

  flops: float = 0.0
  hbm_bytes: float = 0.0
  collective_bytes: dict[str, float] = dataclasses.field(default_factory=dict)

  @property
  def sent_bytes(self) -> float:
    """Bytes that the chip sends in all collectives."""
    return sum(self.collective_bytes.values())

  def __add__(self, other: Cost) -> Cost:
    collective_bytes = {}
    for kind in {**self.collective_bytes, **other.collective_bytes}:
      size = self.collective_bytes.get(kind, 0) + other.collective_bytes.get(kind, 0)
      if size > 0:
        collective_bytes[kind] = size
    return Cost(self.flops + other.flops, self.hbm_bytes + other.hbm_bytes, collective_bytes)

  def __sub__(self, other: Cost) -> Cost:
    return self + other * -1

  def __mul__(self, count: int) -> Cost:
    collective_bytes = {kind: count * size for kind, size in self.collective_bytes.items()}
    return Cost(count * self.flops, count * self.hbm_bytes, collective_bytes)


ZERO = Cost()


class Loop(NamedTuple):
  """A loop of a program.

  Attributes:
    trip_count: the number of iterations.
    cost: of one iteration.
  """

  trip_count: int
  cost: Cost


class Analysis(NamedTuple):
  """The cost of a program.

  Attributes:
    cost: of the whole program.
    loops: those outside other loops.
  """

  cost: Cost
  loops: list[Loop]


def _no_kernel_flops(name: str, shapes: Sequence[tuple[int, ...]]) -> float:
  return 0.0


def cost(text: str, kernel_flops: KernelFlops = _no_kernel_flops) -> Cost:
  """The cost of a program.

  Args:
    text: the program, as `compiled.as_text()` returns it.
    kernel_flops: operations of a call of a kernel, which the text does not show.

  Raises:
    ValueError: the text is no compiled program.
  """
  return analyze(text, kernel_flops).cost


def analyze(text: str, kernel_flops: KernelFlops = _no_kernel_flops) -> Analysis:
  """The cost of a program and of its loops; arguments and errors as in `cost`."""
  module = parse(text)
  analyzer = _Analyzer(module, kernel_flops)
  entry = module.computations[module.entry].values()
  loops = [analyzer.loop(instruction) for instruction in entry if instruction.opcode == 'while']
  return Analysis(analyzer.computation_cost(module.entry), loops)


class _Analyzer:
  """Adds up the costs of the instructions of a program; visits each computation once."""

  def __init__(self, module: Module, kernel_flops: KernelFlops):
    self._computations = module.computations
    self._kernel_flops = kernel_flops
    self._costs: dict[str, Cost] = {}

  def computation_cost(self, name: str) -> Cost:
    """The cost of a computation with all that it calls."""
    if name not in self._costs:
      self._costs[name] = self._sum(self._computations[name])
    return self._costs[name]

  def loop(self, instruction: Instruction) -> Loop:
    """The trip count and the cost of a `while`."""
    condition = self._computations[instruction.called('condition')]
    return Loop(_trip_count(condition), self.computation_cost(instruction.called('body')))

  def _sum(self, computation: Computation) -> Cost:
    total = ZERO
    counted_channels = set()
    for instruction in computation.values():
      cost = self._instruction_cost(instruction, computation)
      # A collective that runs beside other work is written in several pieces with one channel,
      # each of which has the size of the whole.
      channel = self._channel(instruction)
      if channel in counted_channels:
        cost = dataclasses.replace(cost, collective_bytes={})
      if channel is not None:
        counted_channels.add(channel)
      total += cost
    return total

  def _channel(self, instruction: Instruction) -> str | None:
    """The channel of a collective, or of the first one that a fusion contains."""
    candidates = [instruction]
    if instruction.opcode == 'fusion':
      candidates = self._computations[instruction.called('calls')].values()
    for candidate in candidates:
      if collective_kind(candidate) is not None:
        return channel_id(candidate)
    return None

  def _instruction_cost(self, instruction: Instruction, computation: Computation) -> Cost:
    opcode = instruction.opcode
    if opcode == 'while':
      loop = self.loop(instruction)
      return loop.cost * loop.trip_count
    if opcode == 'conditional':
      # The expensive branch is the exception, such as k-means at the start of training.
      branches = [self.computation_cost(name) for name in instruction.branches()]
      return min(branches, key=lambda branch: branch.flops)
    if opcode == 'call':
      return self.computation_cost(instruction.called('to_apply'))
    kind = collective_kind(instruction)
    if kind is not None:
      return _collective_cost(kind, instruction, computation)
    if opcode in _FREE or opcode.endswith('-done'):
      return ZERO
    if opcode in ('fusion', 'async-start'):
      return self._fusion_cost(instruction)
    if opcode == 'custom-call':
      return self._kernel_cost(instruction, computation)
    flops = instruction_flops(instruction, computation)
    return Cost(flops, instruction_bytes(instruction, computation))

  def _fusion_cost(self, fusion: Instruction) -> Cost:
    name = fusion.called('calls')
    fused = self.computation_cost(name)
    collective_bytes = fused.collective_bytes
    if name.startswith('all-reduce-scatter'):
      # A reduce-scatter of TPUs contains an all-reduce, but a chip receives its share of the sum
      # alone, which is half of the traffic.
      collective_bytes = {'reduce-scatter': fused.sent_bytes / 2}
    hbm_bytes = fusion_bytes(fusion, self._computations[name])
    return Cost(fused.flops, hbm_bytes, collective_bytes)

  def _kernel_cost(self, call: Instruction, computation: Computation) -> Cost:
    if 'custom_call_target="tpu_custom_call"' not in call.attributes:
      return ZERO  # the compiler's own annotations
    shapes = [array.shape for array in operand_arrays(call, computation)]
    return Cost(self._kernel_flops(call.name, shapes), instruction_bytes(call, computation))


def _collective_cost(kind: str, instruction: Instruction, computation: Computation) -> Cost:
  """The cost of a collective, which reads its operands once and writes as many bytes."""
  operand_bytes = sum(array.num_bytes for array in operand_arrays(instruction, computation))
  sent = sent_bytes(kind, operand_bytes, group_size(instruction.attributes))
  return Cost(0.0, 2.0 * operand_bytes, {kind: sent})


def _trip_count(condition: Computation) -> int:
  """The number of iterations: JAX counts from 0 to a constant of the loop's condition."""
  limits = []
  for instruction in condition.values():
    if instruction.opcode == 'constant' and instruction.arrays[0].dtype in ('s32', 'u32'):
      limits.append(int(instruction.literal))
  return max(limits, default=1)
