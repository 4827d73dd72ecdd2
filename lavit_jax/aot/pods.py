"""A TPU pod that is not here: its chips, and what a program compiled for them would need.

libtpu compiles on any CPU host for a topology that it is told. What comes back is the program that the pod would run: its memory to
the byte, and its operations and traffic, from which the times of a roofline follow. Nothing is timed: they are bounds.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from lavit_jax.aot import hlo
from lavit_jax.chips import TPUS, Chip
from lavit_jax.errors import UserError
from lavit_jax.models.splash import kernel_flops

GIB = 1 << 30
SPARE = 0.1  # of the memory, which a program must leave
# As JAX runs on these chips, whose two cores are one device. Without it a v4 chip is two devices.
MEGACORE = {'v4': dict(chip_config_name='megacore'), 'v5p': dict(chip_config_name='megacore')}
ALIASES = {'v7x': 'tpu7x'}  # libtpu knows this chip by the longer name alone
HOST = (2, 2, 1)  # the chips of a host, as libtpu takes them to be


class Program(NamedTuple):
  """What a compiled program needs of one device: a chip, or half of a tpu7x chip."""

  hbm_bytes: int  # arguments, results, what lives in between, and the code
  cost: hlo.Cost
  loops: list[tuple[int, hlo.Cost]]  # as `hlo.costs` has them
  compile_seconds: float

  @property
  def sent(self) -> float:
    """Bytes to other chips."""
    return sum(self.cost.network.values())

  def times(self, chip: Chip) -> tuple[float, float, float]:
    """Seconds of compute, of memory and of network, if nothing else held it up."""
    return self.cost.flops / (chip.tflops * 1e12), self.cost.bytes / (chip.hbm_tbps * 1e12), self.sent / (chip.ici_gbps * 1e9 / 8)

  def fits(self, chip: Chip) -> bool:
    return self.hbm_bytes <= (1 - SPARE) * chip.hbm_gib * GIB


def pod(topology: str, slices: int = 1) -> tuple[Chip, list]:
  """The figures of one device of a topology CHIP:SHAPE such as 'v5e:16x16', and its devices, of
  `slices` such pods.

  A device is a chip, but for tpu7x, where it is half of one.

  Raises:
    UserError: no such chip or topology, or libtpu is missing.
  """
  kind, name, options = libtpu_topology(topology, slices)
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # else libtpu looks for the pod it runs on
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # no chip is taken: several may compile
  if importlib.util.find_spec('libtpu') is None and 'TPU_LIBRARY_PATH' not in os.environ:
    raise UserError(f'--topology {topology}: libtpu is missing; '
                    "pip install -e '.[tpu]' -c launch/constraints.txt")
  try:
    described = topologies.get_topology_desc(platform='tpu', topology_name=name, **options)
  except Exception as error:  # libtpu's own, of whatever kind
    reason = ' '.join(str(error).split())[:300]
    raise UserError(f'--topology {topology}: libtpu refuses it ({reason}); '
                    'choose a shape that such chips come in') from error
  return TPUS[kind].device(), described.devices


def libtpu_topology(topology: str, slices: int = 1) -> tuple[str, str, dict]:
  """'v7x:2x2x1' -> (a key of TPUS, what libtpu calls the topology, the options that it needs).

  Raises:
    UserError: no such chip, or not of the form CHIP:SHAPE.
  """
  kind, _, shape = topology.partition(':')
  kind = ALIASES.get(kind, kind)
  if kind not in TPUS or not re.fullmatch(r'[1-9]\d*(x[1-9]\d*){1,2}', shape):
    raise UserError(f'--topology {topology}: write CHIP:SHAPE such as v5e:16x16; '
                    f'known chips: {", ".join(TPUS)}')
  options = dict(MEGACORE.get(kind, {}))
  if slices > 1:
    options['num_slices'] = slices
  sides = [int(side) for side in shape.split('x')]
  bounds = tuple(min(most, side) for most, side in zip(HOST, [*sides, 1]))
  if bounds != HOST:  # a part of a host, such as 1x1, which libtpu would not divide into whole ones
    options['chips_per_host_bounds'] = bounds
  return kind, f'{kind}:{shape}', options


def compile_on(topology: str, mesh: Mesh, function, *inputs) -> Program:
  """Compiles a jitted function of ShapeDtypeStructs that carry their shardings.

  Raises:
    UserError: the compiler refuses it, as when it does not fit into memory.
  """
  start = time.monotonic()
  try:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      compiled = function.trace(*inputs).lower(lowering_platforms=('tpu',)).compile()
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f'{topology}: the compiler says: {" ".join(str(error).split())}') from error
  seconds, memory = time.monotonic() - start, compiled.memory_analysis()
  total = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
           + memory.generated_code_size_in_bytes)
  return Program(total, *hlo.costs(compiled.as_text(), kernel_flops), seconds)


def bytes_a_chip(tree) -> int:
  """Of the arrays of a tree with shardings."""
  arrays = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in arrays)


def limit(report) -> str:
  """How much of a chip's memory a report says is taken, and whether that is well."""
  fits = 'fits' if report.fits else 'does not fit with a tenth to spare'
  return f'{report.hbm_per_chip_gib:.2f} of {report.hbm_limit_gib:g}: {fits}'


def devices_per_chip(topology: str) -> int:
  """Of the chips of a topology that `pod` knows."""
  return TPUS[libtpu_topology(topology)[0]].devices


def count(devices: int, per_chip: int) -> str:
  """'64 chips', or '128 devices, 2 a chip'."""
  return f'{devices} chips' if per_chip == 1 else f'{devices} devices, {per_chip} a chip'
