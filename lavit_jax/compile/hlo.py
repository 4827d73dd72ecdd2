"""Parses the text of a compiled XLA program (HLO)."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

DTYPE_BITS = {
  'pred': 8,
  **{f'{kind}{bits}': bits for kind in 'suf' for bits in (2, 4, 8, 16, 32, 64)},
  'bf16': 16,
  'c64': 64,
  'c128': 128,
}

_ARRAY = re.compile(r'(\w+)\[([\d,]*)\](?:\{([^}]*)\})?')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_NAME = re.compile(r'%([\w.\-]+)')
_ON_CHIP = re.compile(r'S\([1-9]')  # a memory space other than HBM, in a layout


class Array(NamedTuple):
  """An array of the program.

  Attributes:
    dtype: as HLO writes it, such as 'bf16'.
    shape: its sizes.
    on_chip: whether it is in the memory of the chip itself (VMEM, SMEM), not in HBM.
  """

  dtype: str
  shape: tuple[int, ...]
  on_chip: bool

  @property
  def nbytes(self) -> int:
    """Its size in bytes; 0 for what is no array of numbers, such as a token."""
    bits = 8 if self.dtype.startswith('f8') else DTYPE_BITS.get(self.dtype, 0)
    return math.prod(self.shape) * bits // 8

  @property
  def hbm_bytes(self) -> int:
    """Bytes of HBM traffic when it is read or written once."""
    return 0 if self.on_chip else self.nbytes


class Instruction(NamedTuple):
  """One line of a program.

  Attributes:
    name: of the result.
    arrays: the arrays of the result.
    opcode: what the line does.
    operands: the names of the inputs.
    attributes: the rest of the line; of a constant, its value.
    is_root: whether the result is that of the computation.
  """

  name: str
  arrays: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool


class Program(NamedTuple):
  """The computations of a program by name, and the name of the one that it starts with."""

  computations: dict[str, list[Instruction]]
  entry: str


def parse(text: str) -> Program:
  """Parses a program.

  Args:
    text: as `compiled.as_text()` returns it.

  Raises:
    ValueError: the text is not a program.
  """
  computations: dict[str, list[Instruction]] = {}
  entry = None
  current = None
  for line in text.splitlines():
    header = _COMPUTATION.match(line)
    if header:
      is_entry, name = header.groups()
      current = computations[name] = []
      if is_entry:
        entry = name
    elif ' = ' in line and line.startswith(' ') and current is not None:
      current.append(_parse_instruction(line))
  if entry is None:
    raise ValueError('this is not a program: it has no ENTRY')
  return Program(computations, entry)


def find_names(text: str) -> list[str]:
  """The names in a text, without their '%'."""
  return _NAME.findall(text)


def _parse_instruction(line: str) -> Instruction:
  left, right = line.strip().split(' = ', 1)
  type_end = _closing_parenthesis(right) + 1 if right.startswith('(') else right.index(' ')
  opcode, rest = right[type_end:].strip().split('(', 1)
  operands_end = _closing_parenthesis(f'({rest}') - 1
  operands = rest[:operands_end]
  return Instruction(
    name=left.removeprefix('ROOT ').lstrip('%'),
    arrays=_parse_arrays(right[:type_end]),
    opcode=opcode,
    operands=tuple(find_names(operands)),
    attributes=operands if opcode == 'constant' else rest[operands_end + 1 :],
    is_root=left.startswith('ROOT '),
  )


def _closing_parenthesis(text: str) -> int:
  """The position of the parenthesis that closes the first one."""
  depth = 0
  for position, character in enumerate(text):
    if character == '(':
      depth += 1
    elif character == ')':
      depth -= 1
    if depth == 0:
      return position
  raise ValueError(f'unbalanced parentheses: {text[:80]}')


def _parse_arrays(text: str) -> tuple[Array, ...]:
  arrays = []
  for dtype, sizes, layout in _ARRAY.findall(text):
    shape = tuple(int(size) for size in sizes.split(',') if size)
    arrays.append(Array(dtype, shape, bool(_ON_CHIP.search(layout))))
  return tuple(arrays)
