"""Programs compiled for a TPU pod: what one device needs to run them.

The memory is exact to the byte. Operations and traffic give the times of a roofline model. These
are lower bounds: nothing is timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lavit_jax.accelerators import Chip
from lavit_jax.compile import hlo
from lavit_jax.errors import UserError
from lavit_jax.models.attention_kernels import kernel_flops

GIB = 1 << 30
SPARE_MEMORY = 0.1  # the share of a device's memory that a program must leave free


class RooflineTimes(NamedTuple):
  """Seconds that each resource of a device is busy, if nothing else delays it."""

  compute: float
  memory: float
  network: float


def roofline_times(cost: hlo.Cost, chip: Chip) -> RooflineTimes:
  """The time of a program or a part of it on one device."""
  return RooflineTimes(
    compute=cost.flops / (chip.tflops * 1e12),
    memory=cost.hbm_bytes / (chip.hbm_tbps * 1e12),
    network=cost.sent_bytes / (chip.ici_gbps * 1e9 / 8),
  )


class Program(NamedTuple):
  """What a compiled program needs of one device.

  Attributes:
    hbm_bytes: arguments, results, intermediate values and code together.
    cost: of one run.
    loops: the loops of the program.
    compile_seconds: the time that compilation took on this machine.
  """

  hbm_bytes: int
  cost: hlo.Cost
  loops: list[hlo.Loop]
  compile_seconds: float

  def fits(self, chip: Chip) -> bool:
    """Whether the program fits with SPARE_MEMORY to spare."""
    return self.hbm_bytes <= (1 - SPARE_MEMORY) * chip.hbm_gib * GIB


def compile_for(topology: str, mesh: Mesh, function: Callable[..., Any], *inputs: Any) -> Program:
  """Compiles a function for a pod.

  Args:
    topology: the name of the pod, for errors.
    mesh: of the pod's devices.
    function: jitted.
    inputs: trees of ShapeDtypeStructs with shardings on the mesh.

  Raises:
    UserError: the compiler refuses the program, for example because it needs too much memory.
  """
  jitted: Any = function
  start = time.monotonic()
  try:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      compiled = jitted.trace(*inputs).lower(lowering_platforms=('tpu',)).compile()
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f'{topology}: the compiler says: {" ".join(str(error).split())}') from error
  compile_seconds = time.monotonic() - start
  memory = compiled.memory_analysis()
  hbm_bytes = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
  analysis = hlo.analyze(compiled.as_text(), kernel_flops)
  return Program(hbm_bytes, analysis.cost, analysis.loops, compile_seconds)


def with_shardings(tree: Any, shardings: Any) -> Any:
  """A tree of arrays or shapes as ShapeDtypeStructs with the shardings of an equal tree."""
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings
  )


def bytes_per_device(tree: Any) -> int:
  """The size of a tree of arrays with shardings on one device; keys of `jax.random` count 0."""
  total = 0
  for x in jax.tree.leaves(tree):
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      total += math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
  return total


def format_memory(used_gib: float, limit_gib: float, fits: bool) -> str:
  """A device's memory that a program uses, and whether it fits."""
  verdict = 'fits' if fits else 'does not fit with a tenth to spare'
  return f'{used_gib:.2f} of {limit_gib:g}: {verdict}'
