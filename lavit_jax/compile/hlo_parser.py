"""Parser of the text of compiled XLA programs (HLO)."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_ARRAY = re.compile(r'(?P<dtype>\w+)\[(?P<shape>[\d,]*)\](?:\{(?P<layout>[^}]*)\})?')
_BITS = re.compile(r'(?:bf|[sufc])(\d+)')
_COMPUTATION = re.compile(r'^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$')
_NAME = re.compile(r'%([\w.\-]+)')
_ON_CHIP = re.compile(r'S\([1-9]')


class Array(NamedTuple):
  """An array of the program.

  Attributes:
    dtype: XLA's name of the dtype, such as 'bf16'.
    shape: of the shard on one device.
    on_chip: whether it lies in the chip's own memory (VMEM, SMEM), not in HBM.
  """

  dtype: str
  shape: tuple[int, ...]
  on_chip: bool

  @property
  def num_bytes(self) -> int:
    """The size, in either memory; 0 for tokens and other values without data."""
    return math.prod(self.shape) * _bits(self.dtype) // 8

  @property
  def hbm_bytes(self) -> int:
    """The traffic with HBM if the whole array is read or written once."""
    return 0 if self.on_chip else self.num_bytes


class Instruction(NamedTuple):
  """One instruction.

  Attributes:
    name: unique in the program.
    arrays: the results; a tuple is flattened.
    opcode: such as 'dot'.
    operands: the names of the instructions whose results it reads.
    attributes: the text after the operands.
    literal: the value of a constant, as text; else empty.
    root: whether it is the result of its computation.
  """

  name: str
  arrays: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  literal: str
  root: bool

  @property
  def result_bytes(self) -> int:
    """The size of the results, in either memory."""
    return sum(array.num_bytes for array in self.arrays)

  def called(self, attribute: str) -> str:
    """The name of the computation that an attribute refers to, such as 'body'.

    Raises:
      ValueError: the instruction has no such attribute.
    """
    reference = re.search(rf'{attribute}=%?([\w.\-]+)', self.attributes)
    if reference is None:
      raise ValueError(f'{self.opcode} {self.name} has no attribute {attribute}')
    return reference[1]

  def branches(self) -> list[str]:
    """The names of the computations between which a conditional chooses."""
    listed = re.search(r'branch_computations=\{([^}]*)\}', self.attributes)
    if listed is not None:
      return _NAME.findall(listed[1])
    return [self.called('true_computation'), self.called('false_computation')]


Computation = dict[str, Instruction]  # by name, in the order of the text


class Module(NamedTuple):
  """A program.

  Attributes:
    computations: by name.
    entry: the name of the computation that the program starts with.
  """

  computations: dict[str, Computation]
  entry: str


def parse(text: str) -> Module:
  """Parses a program as `compiled.as_text()` returns it.

  Raises:
    ValueError: the text is no such program.
  """
  computations: dict[str, Computation] = {}
  entry = None
  current = None
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header is not None:
      current = {}
      computations[header['name']] = current
      if header['entry']:
        entry = header['name']
    elif current is not None and line.startswith(' ') and ' = ' in line:
      instruction = _parse_instruction(line)
      current[instruction.name] = instruction
  if entry is None:
    raise ValueError('not the text of a compiled program: it has no ENTRY computation')
  return Module(computations, entry)


def operand_arrays(instruction: Instruction, computation: Computation) -> list[Array]:
  """The arrays that an instruction reads."""
  arrays = []
  for name in instruction.operands:
    arrays.extend(computation[name].arrays)
  return arrays


def _parse_instruction(line: str) -> Instruction:
  """Parses `[ROOT ]%name = type opcode(operands), attributes`."""
  name, expression = line.strip().split(' = ', 1)
  # The type is one array, or a tuple in parentheses.
  type_end = expression.index(' ')
  if expression.startswith('('):
    type_end = _closing_parenthesis(expression, 0) + 1
  operands_start = expression.index('(', type_end)
  operands_end = _closing_parenthesis(expression, operands_start)
  opcode = expression[type_end:operands_start].strip()
  operands = expression[operands_start + 1 : operands_end]
  return Instruction(
    name=name.removeprefix('ROOT ').lstrip('%'),
    arrays=_parse_arrays(expression[:type_end]),
    opcode=opcode,
    operands=tuple(_NAME.findall(operands)),
    attributes=expression[operands_end + 1 :],
    literal=operands if opcode == 'constant' else '',
    root=name.startswith('ROOT '),
  )


def _closing_parenthesis(text: str, start: int) -> int:
  """The index of the parenthesis that closes the one at `start`."""
  depth = 0
  for index in range(start, len(text)):
    if text[index] == '(':
      depth += 1
    elif text[index] == ')':
      depth -= 1
    if depth == 0:
      return index
  raise ValueError(f'unbalanced parentheses: {text[:80]}')


def _parse_arrays(text: str) -> tuple[Array, ...]:
  arrays = []
  for match in _ARRAY.finditer(text):
    shape = tuple(int(size) for size in match['shape'].split(',') if size)
    on_chip = _ON_CHIP.search(match['layout'] or '') is not None
    arrays.append(Array(match['dtype'], shape, on_chip))
  return tuple(arrays)


def _bits(dtype: str) -> int:
  if dtype == 'pred':
    return 8
  match = _BITS.match(dtype)
  return int(match[1]) if match else 0
