"""TPU pods that are not attached: their chips, and what a program that is compiled for them needs.

libtpu compiles on any CPU host, for any topology. The result is the program that the pod would run:
its memory to the byte, and its operations and traffic, from which a roofline gives bounds of the
times. Nothing is timed.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import time
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from lavit_jax.accelerators import TPUS, Chip
from lavit_jax.compile import hlo_cost
from lavit_jax.errors import UserError
from lavit_jax.models.attention_kernels import kernel_flops

GIB = 1 << 30
SPARE = 0.1  # the share of memory that a program must leave free
# JAX runs on these chips with their two cores as one device. Without it, v4 chips are two devices.
MEGACORE = {'v4': dict(chip_config_name='megacore'), 'v5p': dict(chip_config_name='megacore')}
ALIASES = {'v7x': 'tpu7x'}  # libtpu knows only the longer name
HOST_BOUNDS = (2, 2, 1)  # the chips of a host, as libtpu assumes


class Roofline(NamedTuple):
  """Seconds that a program takes at least, by each of three limits."""

  compute: float
  memory: float
  network: float


class Program(NamedTuple):
  """What a compiled program needs of one device: a chip, or half of a tpu7x chip.

  Attributes:
    hbm_bytes: memory of arguments, results, intermediate values and code.
    cost: of one run.
    loops: its loops (hlo_cost.py).
    compile_seconds: how long the compiler ran.
  """

  hbm_bytes: int
  cost: hlo_cost.Cost
  loops: list[hlo_cost.Loop]
  compile_seconds: float

  def fits(self, chip: Chip) -> bool:
    """Whether the memory of a device suffices, with `SPARE` left."""
    return self.hbm_bytes <= (1 - SPARE) * chip.hbm_gib * GIB


class MemoryReport(Protocol):
  """What a report says about the memory of a device."""

  @property
  def hbm_per_chip_gib(self) -> float:
    """What the program needs."""
    ...

  @property
  def hbm_limit_gib(self) -> float:
    """What the device has."""
    ...

  @property
  def fits(self) -> bool:
    """Whether that suffices, with `SPARE` left."""
    ...


def bytes_sent(cost: hlo_cost.Cost) -> float:
  """Bytes to other chips."""
  return sum(cost.network.values())


def roofline(cost: hlo_cost.Cost, chip: Chip) -> Roofline:
  """Seconds of compute, memory and network, each as if there were no other limit."""
  return Roofline(
    compute=cost.flops / (chip.tflops * 1e12),
    memory=cost.bytes / (chip.hbm_tbps * 1e12),
    network=bytes_sent(cost) / (chip.ici_gbps * 1e9 / 8),
  )


def pod_devices(topology: str, slices: int = 1) -> tuple[Chip, list[Any]]:
  """Describes the devices of pods.

  Args:
    topology: CHIP:SHAPE, such as 'v5e:16x16'.
    slices: the number of such pods.

  Returns:
    The figures of one device, which is a chip (or half of one for tpu7x), and all devices.

  Raises:
    UserError: the chip or topology does not exist, or libtpu is missing.
  """
  kind, name, options = libtpu_topology(topology, slices)
  # Otherwise libtpu asks the metadata server for the pod that it runs on.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  # No chip is used, so that several processes may compile at once.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  if importlib.util.find_spec('libtpu') is None and 'TPU_LIBRARY_PATH' not in os.environ:
    raise UserError(
      f"--topology {topology}: libtpu is missing; pip install -e '.[tpu]' -c launch/constraints.txt"
    )
  try:
    description = topologies.get_topology_desc(platform='tpu', topology_name=name, **options)
  except Exception as error:  # libtpu raises errors of several classes
    reason = ' '.join(str(error).split())[:300]
    raise UserError(
      f'--topology {topology}: libtpu refuses it ({reason}); choose a shape that such chips come in'
    ) from error
  return TPUS[kind].device(), description.devices


def libtpu_topology(topology: str, slices: int = 1) -> tuple[str, str, dict[str, Any]]:
  """Translates a topology for libtpu.

  Args:
    topology: CHIP:SHAPE, such as 'v7x:2x2x1'.
    slices: the number of such pods.

  Returns:
    (key of TPUS, libtpu's name of the topology, the options that libtpu needs).

  Raises:
    UserError: the chip is unknown, or the form is not CHIP:SHAPE.
  """
  kind, _, shape = topology.partition(':')
  kind = ALIASES.get(kind, kind)
  if kind not in TPUS or not re.fullmatch(r'[1-9]\d*(x[1-9]\d*){1,2}', shape):
    raise UserError(
      f'--topology {topology}: write CHIP:SHAPE such as v5e:16x16; known chips: {", ".join(TPUS)}'
    )
  options: dict[str, Any] = dict(MEGACORE.get(kind, {}))
  if slices > 1:
    options['num_slices'] = slices
  sides = [int(side) for side in shape.split('x')]
  sides += [1] * (len(HOST_BOUNDS) - len(sides))
  bounds = tuple(min(limit, side) for limit, side in zip(HOST_BOUNDS, sides, strict=True))
  if bounds != HOST_BOUNDS:
    # Part of a host, such as 1x1, which libtpu would not divide into complete ones.
    options['chips_per_host_bounds'] = bounds
  return kind, f'{kind}:{shape}', options


def compile_on(topology: str, mesh: Mesh, function: Any, *inputs: Any) -> Program:
  """Compiles a function for a pod.

  Args:
    topology: of the pod, for messages.
    mesh: of its devices.
    function: a jitted one.
    *inputs: its arguments, as ShapeDtypeStructs with shardings.

  Raises:
    UserError: the compiler refuses it, for example since it does not fit into memory.
  """
  start = time.monotonic()
  try:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      compiled = function.trace(*inputs).lower(lowering_platforms=('tpu',)).compile()
  except jax.errors.JaxRuntimeError as error:
    reason = ' '.join(str(error).split())
    raise UserError(f'{topology}: the compiler reports: {reason}') from error
  seconds = time.monotonic() - start
  memory = compiled.memory_analysis()
  hbm_bytes = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
  cost = hlo_cost.analyze(compiled.as_text(), kernel_flops)
  return Program(hbm_bytes, cost.total, cost.loops, seconds)


def bytes_per_chip(tree: Any) -> int:
  """Bytes of one device's shards of a tree of ShapeDtypeStructs; random keys are not counted."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      shard = leaf.sharding.shard_shape(leaf.shape)
      total += math.prod(shard) * np.dtype(leaf.dtype).itemsize
  return total


def memory_limit_note(report: MemoryReport) -> str:
  """How much memory a program needs and a device has, and whether that suffices."""
  note = 'fits' if report.fits else 'does not fit with a tenth to spare'
  return f'{report.hbm_per_chip_gib:.2f} of {report.hbm_limit_gib:g}: {note}'


def devices_per_chip(topology: str) -> int:
  """The number of JAX devices on a chip of a topology."""
  kind, _, _ = libtpu_topology(topology)
  return TPUS[kind].devices


def format_count(devices: int, per_chip: int) -> str:
  """'64 chips', or '128 devices, 2 a chip'."""
  return f'{devices} chips' if per_chip == 1 else f'{devices} devices, {per_chip} a chip'
