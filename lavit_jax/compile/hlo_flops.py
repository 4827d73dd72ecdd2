"""Floating-point operations of the products and convolutions of a compiled program."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import numpy as np

from lavit_jax.compile.hlo_parser import Computation, Instruction

Shape = tuple[int, ...]


def instruction_flops(instruction: Instruction, computation: Computation) -> float:
  """Operations of a product or a convolution; a multiplication with its addition counts as two.

  Args:
    instruction: of any kind.
    computation: which contains the instruction and its operands.

  Returns:
    0 for other instructions, which need few operations in comparison.

  Raises:
    ValueError: an attribute is missing.
  """
  if instruction.opcode not in ('dot', 'convolution'):
    return 0.0
  left, right = [computation[name].arrays[0].shape for name in instruction.operands[:2]]
  if instruction.opcode == 'dot':
    return _dot_flops(instruction, left)
  return _convolution_flops(instruction, left, right)


def _dot_flops(instruction: Instruction, left: Shape) -> float:
  dimensions = _search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction)[1]
  contracted = math.prod(left[int(axis)] for axis in dimensions.split(',') if axis)
  return 2.0 * math.prod(instruction.arrays[0].shape) * contracted


class _WindowDimension(NamedTuple):
  """One spatial dimension of a window; a dilation of n puts n - 1 zeros between elements."""

  size: int
  stride: int
  low_padding: int
  input_dilation: int
  kernel_dilation: int

  def num_products(self, input_size: int, output_size: int) -> int:
    """The number of (output, kernel) positions that meet an element of the input."""
    dilated_size = (input_size - 1) * self.input_dilation + 1
    outputs = np.arange(output_size)[:, None] * self.stride
    positions = outputs + np.arange(self.size) * self.kernel_dilation - self.low_padding
    inside = (positions >= 0) & (positions < dilated_size)
    return int((inside & (positions % self.input_dilation == 0)).sum())


def _convolution_flops(instruction: Instruction, left: Shape, right: Shape) -> float:
  """Operations without those on padding and on the zeros of a dilated input.

  XLA writes batched products as convolutions that meet mostly such zeros.
  """
  # One character per dimension: b(atch), f(eature), i(nput), o(utput), or a spatial digit.
  labels = _search(r'dim_labels=(?P<left>\w+)_(?P<right>\w+)->(?P<output>\w+)', instruction)
  spatial = sorted(set(labels['left']) - set('bf'))
  batch_size = left[labels['left'].index('b')]
  in_features = right[labels['right'].index('i')]
  out_features = right[labels['right'].index('o')]
  products = batch_size * in_features * out_features
  groups = re.search(r'batch_group_count=(\d+)', instruction.attributes)
  if groups is not None:
    products //= int(groups[1])
  for axis, window in zip(spatial, _window(instruction, len(spatial)), strict=True):
    input_size = left[labels['left'].index(axis)]
    output_size = instruction.arrays[0].shape[labels['output'].index(axis)]
    products *= window.num_products(input_size, output_size)
  return 2.0 * products


def _window(instruction: Instruction, num_dimensions: int) -> list[_WindowDimension]:
  """The window of a convolution; options that the text leaves out have their defaults."""
  text = re.search(r'window=\{([^}]*)\}', instruction.attributes)
  options = dict(re.findall(r'(\w+)=([\w\-]+)', text[1])) if text else {}

  def option(key: str, default: str) -> list[str]:
    return options[key].split('x') if key in options else [default] * num_dimensions

  pads = [pad.split('_')[0] for pad in option('pad', '0_0')]
  columns = zip(
    option('size', '1'),
    option('stride', '1'),
    pads,
    option('lhs_dilate', '1'),
    option('rhs_dilate', '1'),
    strict=True,
  )
  return [_WindowDimension(*map(int, values)) for values in columns]


def _search(pattern: str, instruction: Instruction) -> re.Match[str]:
  match = re.search(pattern, instruction.attributes)
  if match is None:
    raise ValueError(f'{instruction.opcode} {instruction.name} has no {pattern}')
  return match
