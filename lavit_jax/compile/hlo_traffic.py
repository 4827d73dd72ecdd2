"""Bytes that the instructions of a compiled program move: to and from HBM, and between chips."""

from __future__ import annotations

import math
import re

from lavit_jax.compile.hlo_parser import Computation, Instruction, operand_arrays

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
_SLICES = ('dynamic-slice', 'slice', 'gather')

# --- Memory --------------------------------------------------------------------------------------


def instruction_bytes(instruction: Instruction, computation: Computation) -> float:
  """HBM traffic of an instruction that calls no other computation.

  It reads its operands and writes its results; slices and updates touch only a part of them.
  """
  results = instruction.arrays
  if instruction.opcode == 'dynamic-update-slice':
    update = computation[instruction.operands[1]].arrays[0]
    return 2.0 * update.hbm_bytes
  if instruction.opcode in _SLICES:
    return 2.0 * sum(array.hbm_bytes for array in results)
  if instruction.opcode == 'copy-start':  # its results are (destination, source, context)
    return float(sum(array.hbm_bytes for array in results[:2]))
  if instruction.opcode.endswith('slice-start'):
    # Its results are (source, destination, context). Of the source it reads the slice alone.
    source, destination = results[:2]
    num_in_hbm = [source.on_chip, destination.on_chip].count(False)
    return float(destination.num_bytes * num_in_hbm)
  arrays = [*results, *operand_arrays(instruction, computation)]
  return float(sum(array.hbm_bytes for array in arrays))


def fusion_bytes(fusion: Instruction, fused: Computation) -> float:
  """HBM traffic of a fusion, whose intermediate values never reach HBM.

  Of an operand that it only takes slices of, the slices count; of a result that it updates in
  place, the update.

  Args:
    fusion: the instruction.
    fused: the computation that it calls.
  """
  users = _users(fused)
  total = 0
  for instruction in fused.values():
    if instruction.opcode == 'parameter':
      total += _parameter_bytes(instruction, _uses(instruction.name, users))
  return float(total + _result_bytes(fusion, fused))


def _parameter_bytes(parameter: Instruction, uses: list[Instruction]) -> int:
  """Bytes that a fusion reads of one operand."""
  if uses and all(use.opcode in _SLICES for use in uses):
    if parameter.arrays[0].on_chip:
      return 0
    return sum(use.result_bytes for use in uses)
  if uses and all(_updates(use, parameter) for use in uses):
    return 0
  return sum(array.hbm_bytes for array in parameter.arrays)


def _updates(use: Instruction, parameter: Instruction) -> bool:
  """Whether a use writes a slice of the parameter in place, without reading the rest."""
  return use.opcode == 'dynamic-update-slice' and use.arrays == parameter.arrays


def _result_bytes(fusion: Instruction, fused: Computation) -> int:
  """Bytes that a fusion writes."""
  root = next(instruction for instruction in fused.values() if instruction.root)
  outputs = [root]
  if root.opcode == 'tuple':
    outputs = [fused[name] for name in root.operands]
  total = 0
  for output, array in zip(outputs, fusion.arrays, strict=False):
    if array.on_chip:
      continue
    while output.opcode == 'bitcast':
      output = fused[output.operands[0]]
    if output.opcode == 'dynamic-update-slice':
      total += fused[output.operands[1]].arrays[0].num_bytes
    else:
      total += array.num_bytes
  return total


def _users(computation: Computation) -> dict[str, list[Instruction]]:
  """{name: the instructions that read its results}."""
  users: dict[str, list[Instruction]] = {}
  for instruction in computation.values():
    for operand in instruction.operands:
      users.setdefault(operand, []).append(instruction)
  return users


def _uses(name: str, users: dict[str, list[Instruction]]) -> list[Instruction]:
  """The instructions that read a value, directly or through bitcasts."""
  uses = []
  for user in users.get(name, ()):
    if user.opcode == 'bitcast':
      uses.extend(_uses(user.name, users))
    else:
      uses.append(user)
  return uses


# --- Network -------------------------------------------------------------------------------------


def collective_kind(instruction: Instruction) -> str | None:
  """The one of COLLECTIVES that an instruction is or starts; None for all other instructions."""
  kind = instruction.opcode.removesuffix('-start')
  return kind if kind in COLLECTIVES else None


def channel_id(instruction: Instruction) -> str | None:
  """The number of the collective that an instruction belongs to; None if it has none."""
  channel = re.search(r'channel_id=(\d+)', instruction.attributes)
  return channel[1] if channel else None


def sent_bytes(kind: str, operand_bytes: int, group_size: int) -> float:
  """Bytes that a chip sends in a collective, in the best known algorithm.

  Args:
    kind: one of COLLECTIVES.
    operand_bytes: the size of the operands on one chip.
    group_size: the number of chips that take part.
  """
  share = (group_size - 1) / group_size
  return {
    'all-reduce': 2 * share * operand_bytes,
    'all-gather': (group_size - 1) * operand_bytes,
    'reduce-scatter': share * operand_bytes,
    'all-to-all': share * operand_bytes,
    'collective-permute': float(operand_bytes),
  }[kind]


def group_size(attributes: str) -> int:
  """The number of chips that take part in one collective; 2 for a permutation."""
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', attributes)
  if listed is not None:
    return len(listed[1].split(','))
  iota = re.search(r'replica_groups=\[\d+,(\d+)\]', attributes)
  if iota is not None:
    return int(iota[1])
  mesh = re.search(
    r'replica_groups=mesh\[(?P<sizes>[^\]]*)\](?:, device_ids=\([^{]*\))? \{(?P<axes>[^}]*)\}',
    attributes,
  )
  if mesh is not None:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh['sizes']))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh['axes']))
  return 2
