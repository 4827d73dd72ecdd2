"""What a compiled program does: operations, bytes of memory and bytes over the network, read from XLA's own text of it.

XLA's cost analysis counts the body of a loop once; here it counts as often as it runs, so that scanned layers are whole. Everything
is of one chip.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
SILENT = (
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
)  # they move nothing, or their partner counts
BITS = {
  'pred': 8,
  'bf16': 16,
  **{f'{kind}{n}': n for kind in 'suf' for n in (2, 4, 8, 16, 32, 64)},
  'c64': 64,
  'c128': 128,
}

ARRAY = re.compile(r'(\w+)\[([\d,]*)\](?:\{([^}]*)\})?')
HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
NAME = re.compile(r'%([\w.\-]+)')


class Array(NamedTuple):
  """An array of the program; `fast` if it lies in the chip's own memory (VMEM, SMEM), not in HBM."""

  dtype: str
  shape: tuple[int, ...]
  fast: bool

  @property
  def nbytes(self) -> int:
    return (
      math.prod(self.shape) * BITS.get(self.dtype, 8 if self.dtype.startswith('f8') else 0) // 8
    )

  @property
  def traffic(self) -> int:
    return 0 if self.fast else self.nbytes


class Instruction(NamedTuple):
  """One line: what it makes, of what, and its attributes as text; of a constant, its value."""

  name: str
  arrays: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  root: bool


class Cost(NamedTuple):
  """Of one run: floating-point operations of products, convolutions and kernels, bytes to and from HBM, bytes a chip sends by kind of
  collective.
  """

  flops: float
  bytes: float
  network: Counter

  def __add__(self, other: Cost) -> Cost:
    return Cost(self.flops + other.flops, self.bytes + other.bytes, self.network + other.network)

  def times(self, n: int) -> Cost:
    return Cost(
      n * self.flops,
      n * self.bytes,
      Counter({kind: n * size for kind, size in self.network.items()}),
    )


NOTHING = Cost(0.0, 0.0, Counter())


def cost(
  text: str,
  kernel_flops: Callable[[str, Sequence[tuple[int, ...]]], float] = lambda name, shapes: 0.0,
) -> Cost:
  """Of a program as `compiled.as_text()` gives it.

  Args:
    kernel_flops: operations of one call of a kernel, whose inside the text does not show, by its name and the shapes of its operands.
  """
  return costs(text, kernel_flops)[0]


def costs(
  text: str, kernel_flops: Callable = lambda name, shapes: 0.0
) -> tuple[Cost, list[tuple[int, Cost]]]:
  """As `cost`, and of each loop that is no part of another: its rounds, and what one of them costs."""
  computations, entry = parse(text)
  walk = _Walk(computations, kernel_flops)
  return walk.of(entry), [walk.loop(line) for line in computations[entry] if line.opcode == 'while']


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Computations by name, and the name of the one that the program begins with."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if header := HEADER.match(line):
      current = computations[header[2]] = []
      entry = header[2] if header[1] else entry
    elif ' = ' in line and line.startswith(' ') and current is not None:
      current.append(_instruction(line))
  if entry is None:
    raise ValueError('this is no program: it has no ENTRY')
  return computations, entry


def _instruction(line: str) -> Instruction:
  left, right = line.strip().split(' = ', 1)
  end = _closing(right, 0) + 1 if right.startswith('(') else right.index(' ')
  opcode, rest = right[end:].strip().split('(', 1)
  close = _closing('(' + rest, 0) - 1
  return Instruction(
    left.removeprefix('ROOT ').lstrip('%'),
    _arrays(right[:end]),
    opcode,
    tuple(NAME.findall(rest[:close])),
    rest[:close] if opcode == 'constant' else rest[close + 1 :],
    left.startswith('ROOT '),
  )


def _closing(text: str, start: int) -> int:
  depth = 0
  for at in range(start, len(text)):
    depth += (text[at] == '(') - (text[at] == ')')
    if depth == 0:
      return at
  raise ValueError(f'unbalanced: {text[:80]}')


def _arrays(text: str) -> tuple[Array, ...]:
  return tuple(
    Array(dtype, tuple(int(n) for n in shape.split(',') if n), bool(re.search(r'S\([1-9]', layout)))
    for dtype, shape, layout in ARRAY.findall(text)
  )


class _Walk:
  """Adds up a program, each computation once."""

  def __init__(self, computations, kernel_flops):
    self.computations, self.kernel_flops = computations, kernel_flops
    self.of = functools.cache(self._of)

  def _of(self, name: str) -> Cost:
    lines = self.computations[name]
    made = {line.name: line for line in lines}
    total, seen = NOTHING, set()
    for line in lines:
      cost = self._cost(line, made)
      channel = self._channel(line)
      if (
        channel in seen
      ):  # the pieces of one collective that runs beside other work, each written as the whole of it
        cost = cost._replace(network=Counter())
      seen |= {channel} - {None}
      total += cost
    return total

  def loop(self, line: Instruction) -> tuple[int, Cost]:
    """How often a loop runs, and what it costs each time."""
    return self._rounds(_called(line, 'condition')), self.of(_called(line, 'body'))

  def _channel(self, line: Instruction) -> str | None:
    """Which collective a line is, or a fusion holds."""
    lines = self.computations[_called(line, 'calls')] if line.opcode == 'fusion' else [line]
    channels = [
      re.search(r'channel_id=(\d+)', each.attributes)
      for each in lines
      if each.opcode.removesuffix('-start') in COLLECTIVES
    ]
    return channels[0][1] if channels and channels[0] else None

  def _cost(self, line: Instruction, made: dict[str, Instruction]) -> Cost:
    if line.opcode == 'while':
      rounds, cost = self.loop(line)
      return cost.times(rounds)
    if (
      line.opcode == 'conditional'
    ):  # the dear branch is the exception, such as k-means at the start
      return min((self.of(name) for name in _branches(line)), key=lambda cost: cost.flops)
    if line.opcode == 'call':
      return self.of(_called(line, 'to_apply'))
    kind = line.opcode.removesuffix('-start')
    if kind in COLLECTIVES:
      size, group = (
        sum(x.nbytes for name in line.operands for x in made[name].arrays),
        _group(line.attributes),
      )
      return Cost(0.0, 2.0 * size, Counter({kind: _sent(kind, size, group)}))
    if line.opcode in SILENT or line.opcode.endswith('-done'):
      return NOTHING
    if line.opcode == 'fusion' or line.opcode == 'async-start':
      called = _called(line, 'calls')
      inner = self.of(called)
      if called.startswith(
        'all-reduce-scatter'
      ):  # TPUs' reduce-scatter: of the sum a chip is sent its share only
        inner = inner._replace(network=Counter({'reduce-scatter': sum(inner.network.values()) / 2}))
      return Cost(inner.flops, float(self._fusion_bytes(line, made)), inner.network)
    if line.opcode == 'custom-call':
      if 'custom_call_target="tpu_custom_call"' not in line.attributes:
        return NOTHING  # the compiler's own marks
      shapes = [x.shape for name in line.operands for x in made[name].arrays]
      return Cost(self.kernel_flops(line.name, shapes), _moved(line, made), Counter())
    moved = _moved(line, made)
    if line.opcode == 'dynamic-update-slice':
      moved = 2.0 * made[line.operands[1]].arrays[0].traffic
    elif line.opcode in ('dynamic-slice', 'slice', 'gather'):
      moved = 2.0 * sum(x.traffic for x in line.arrays)
    elif line.opcode == 'copy-start':  # its result is (there, here, a flag)
      moved = float(sum(x.traffic for x in line.arrays[:2]))
    elif line.opcode.endswith('slice-start'):  # (here, there, a flag), of which there is the slice
      here, there = line.arrays[:2]
      moved = float(there.nbytes * ((not here.fast) + (not there.fast)))
    return Cost(_flops(line, made), moved, Counter())

  def _fusion_bytes(self, line: Instruction, made: dict[str, Instruction]) -> int:
    """What a fusion reads and writes: of an array that it only takes slices of, the slices; of one that it updates in place, the update."""
    lines = self.computations[_called(line, 'calls')]
    inner = {each.name: each for each in lines}
    users = {}
    for each in lines:
      for operand in each.operands:
        users.setdefault(operand, []).append(each)
    total = 0
    for each in lines:
      if each.opcode != 'parameter':
        continue
      uses = _through(each.name, users)
      if uses and all(use.opcode in ('dynamic-slice', 'slice', 'gather') for use in uses):
        total += sum(x.nbytes for use in uses for x in use.arrays) if each.arrays[0].traffic else 0
      elif not (
        uses
        and all(use.opcode == 'dynamic-update-slice' and use.arrays == each.arrays for use in uses)
      ):
        total += sum(x.traffic for x in each.arrays)
    root = next(each for each in lines if each.root)
    outputs = [inner[name] for name in root.operands] if root.opcode == 'tuple' else [root]
    for output, array in zip(outputs, line.arrays):
      while output.opcode == 'bitcast':
        output = inner[output.operands[0]]
      update = (
        inner[output.operands[1]].arrays[0].nbytes
        if output.opcode == 'dynamic-update-slice'
        else array.nbytes
      )
      total += update if array.traffic else 0
    return total

  def _rounds(self, condition: str) -> int:
    """How often a loop runs: JAX counts from 0 to a constant that the condition holds."""
    return max(
      (
        int(line.attributes)
        for line in self.computations[condition]
        if line.opcode == 'constant' and line.arrays[0].dtype in ('s32', 'u32')
      ),
      default=1,
    )


def _moved(line: Instruction, made: dict[str, Instruction]) -> float:
  """Bytes of what a line reads and writes."""
  return float(
    sum(x.traffic for x in line.arrays)
    + sum(x.traffic for name in line.operands for x in made[name].arrays)
  )


def _called(line: Instruction, attribute: str) -> str:
  return re.search(rf'{attribute}=%?([\w.\-]+)', line.attributes)[1]


def _branches(line: Instruction) -> list[str]:
  if listed := re.search(r'branch_computations=\{([^}]*)\}', line.attributes):
    return NAME.findall(listed[1])
  return [_called(line, 'true_computation'), _called(line, 'false_computation')]


def _through(name: str, users: dict[str, list[Instruction]]) -> list[Instruction]:
  """Who uses a value, seen through bitcasts."""
  return [
    last
    for use in users.get(name, ())
    for last in (_through(use.name, users) if use.opcode == 'bitcast' else [use])
  ]


def _group(attributes: str) -> int:
  """How many chips take part in one collective."""
  if listed := re.search(r'replica_groups=\{\{([\d,]*)\}', attributes):
    return len(listed[1].split(','))
  if iota := re.search(r'replica_groups=\[(\d+),(\d+)\]', attributes):
    return int(iota[2])
  if mesh := re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}]*)\}', attributes
  ):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
  return 2  # a permutation


def _sent(kind: str, size: int, group: int) -> float:
  """Bytes that a chip sends, in the best known algorithm; `size`: of its operands."""
  share = (group - 1) / group
  return {
    'all-reduce': 2 * share * size,
    'all-gather': (group - 1) * size,
    'reduce-scatter': share * size,
    'all-to-all': share * size,
    'collective-permute': float(size),
  }[kind]


def _flops(line: Instruction, made: dict[str, Instruction]) -> float:
  if line.opcode == 'dot':
    left = made[line.operands[0]].arrays[0].shape
    contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', line.attributes)[1]
    return (
      2.0
      * math.prod(line.arrays[0].shape)
      * math.prod(left[int(n)] for n in contracted.split(',') if n)
    )
  if line.opcode == 'convolution':
    return _convolution(line, *(made[name].arrays[0].shape for name in line.operands[:2]))
  return 0.0


def _convolution(line: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
  """Products that count: XLA writes a batch of products as a convolution that mostly meets padding and holes."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', line.attributes)
  window = dict(
    re.findall(
      r'(\w+)=([\w\-]+)', (re.search(r'window=\{([^}]*)\}', line.attributes) or ['', ''])[1]
    )
  )
  spatial = sorted(set(labels[1]) - set('bf'))

  def option(key, default):
    return window[key].split('x') if key in window else [default] * len(spatial)

  output = line.arrays[0].shape
  products = left[labels[1].index('b')] * right[labels[2].index('i')] * right[labels[2].index('o')]
  if groups := re.search(r'batch_group_count=(\d+)', line.attributes):
    products //= int(groups[1])
  for n, (axis, size, stride, pad, hole, spread) in enumerate(
    zip(
      spatial,
      option('size', '1'),
      option('stride', '1'),
      option('pad', '0_0'),
      option('lhs_dilate', '1'),
      option('rhs_dilate', '1'),
    )
  ):
    whole = (left[labels[1].index(axis)] - 1) * int(hole) + 1
    at = (
      np.arange(output[labels[3].index(axis)])[:, None] * int(stride)
      + np.arange(int(size)) * int(spread)
      - int(pad.split('_')[0])
    )
    products *= int(((at >= 0) & (at < whole) & (at % int(hole) == 0)).sum())
  return 2.0 * products
