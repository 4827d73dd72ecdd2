"""`lavit compile`: the exact train step, compiled for a TPU pod that is not there.

libtpu compiles on any CPU host for a topology that it is told. What comes back is the program that the pod would run: its memory to
the byte, and its operations and traffic, from which the times of a roofline follow. Nothing is timed: they are bounds.
"""

from __future__ import annotations

import json
import math
import os
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding
from rich.console import Console
from rich.table import Table

from lavit_jax import sharding
from lavit_jax.aot import hlo
from lavit_jax.chips import TPUS
from lavit_jax.errors import UserError
from lavit_jax.models import lavit
from lavit_jax.models.packed_attention import kernel_flops
from lavit_jax.training import flops, loop, stages

GIB = 1 << 30
SPARE = 0.1  # of the memory, which a program must leave
ONE_DEVICE_A_CHIP = {'v4': dict(chip_config_name='megacore'), 'v5p': dict(chip_config_name='megacore')}  # their chips have two cores


class Report(NamedTuple):
  """What the compiled step needs, of one chip unless it says otherwise; times in seconds, memory in GiB."""

  config: str
  topology: str
  chips: int
  mesh: dict[str, int]
  tokens_per_step: int  # of all chips: slots of packed rows, or patches
  hbm_parameters_gib: float
  hbm_optimizer_gib: float
  hbm_activations_gib: float  # and gradients: all that is neither of the above
  hbm_per_chip_gib: float
  hbm_limit_gib: float
  fits: bool  # with `SPARE` to spare
  flops_per_chip: float
  model_flops_per_chip: float
  hbm_bytes_per_chip: float
  collective_bytes_per_chip: float
  collectives: dict[str, float]  # bytes sent, by kind
  compute_seconds: float
  memory_seconds: float
  network_seconds: float
  mfu_bound: float
  compile_seconds: float


def run(config, page: str, topology: str, slices: int, as_json: bool) -> None:
  """Compiles and prints, as one JSON object or as a table."""
  report = compile_step(config, page, topology, slices)
  if as_json:
    print(json.dumps(report._asdict()))
    return
  table = Table('', 'a chip', title=f'{report.config} on {report.topology}: {report.chips} chips, mesh {report.mesh}')
  for row in rows(report):
    table.add_row(*row)
  Console().print(table)


def rows(report: Report) -> list[tuple[str, str]]:
  """The lines of the table, (what, how much)."""
  limit = f'{report.hbm_per_chip_gib:.2f} of {report.hbm_limit_gib:g}: ' + ('fits' if report.fits else 'does not fit with a tenth to spare')
  return [
      ('parameters, GiB', f'{report.hbm_parameters_gib:.2f}'), ('optimizer, GiB', f'{report.hbm_optimizer_gib:.2f}'),
      ('activations and gradients, GiB', f'{report.hbm_activations_gib:.2f}'), ('memory, GiB', limit),
      ('tokens a step, all chips', f'{report.tokens_per_step:,}'),
      ('TFLOP of the program', f'{report.flops_per_chip / 1e12:,.1f}'), ('TFLOP of the model', f'{report.model_flops_per_chip / 1e12:,.1f}'),
      ('GB to and from HBM', f'{report.hbm_bytes_per_chip / 1e9:,.1f}'),
      *((f'GB of {kind}', f'{size / 1e9:,.2f}') for kind, size in sorted(report.collectives.items())),
      ('seconds of compute', f'{report.compute_seconds:.3f}'), ('seconds of memory', f'{report.memory_seconds:.3f}'),
      ('seconds of network', f'{report.network_seconds:.3f}'), ('bound of the MFU', f'{report.mfu_bound:.1%}'),
      ('compiled in, s', f'{report.compile_seconds:.0f}')]


def compile_step(config, page: str, topology: str, slices: int = 1) -> Report:
  """Compiles the train step of a config.

  Args:
    page: what the report calls the config.
    topology: CHIP:SHAPE, such as 'v5e:16x16'.
    slices: how many of them, joined by the data centre's network, whose slower pace the times leave out.
  Raises:
    UserError: no such chip or topology, libtpu is missing, or the config does not fit it.
  """
  kind, _, shape = topology.partition(':')
  if kind not in TPUS or not shape:
    raise UserError(f'--topology {topology}: write CHIP:SHAPE such as v5e:16x16; known chips: {", ".join(TPUS)}')
  chip = TPUS[kind]
  mesh = sharding.make_mesh(config.mesh, _devices(topology, slices))
  step, inputs = abstract_step(config, mesh)
  start = time.monotonic()
  try:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      compiled = step.trace(*inputs).lower(lowering_platforms=('tpu',)).compile()
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f'{topology}: the compiler says: {" ".join(str(error).split())}') from error
  seconds = time.monotonic() - start

  state, frozen, _ = inputs
  memory, cost = compiled.memory_analysis(), hlo.cost(compiled.as_text(), kernel_flops)
  total = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
           + memory.generated_code_size_in_bytes)
  parameters = _bytes_a_chip((state.params, state.ema, state.state, frozen))
  optimizer = _bytes_a_chip(state.opt_state)
  model_flops = flops.model_flops(config) / mesh.size
  sent = sum(cost.network.values())
  times = cost.flops / (chip.tflops * 1e12), cost.bytes / (chip.hbm_tbps * 1e12), sent / (chip.ici_gbps * 1e9 / 8)
  return Report(
      page, topology if slices == 1 else f'{slices} x {topology}', mesh.size, dict(mesh.shape), stages.tokens(config), parameters / GIB,
      optimizer / GIB, (total - parameters - optimizer) / GIB, total / GIB, chip.hbm_gib, total <= (1 - SPARE) * chip.hbm_gib * GIB,
      cost.flops, model_flops, cost.bytes, sent, dict(cost.network), *times, model_flops / (chip.tflops * 1e12 * max(times)), seconds)


def abstract_step(config, mesh):
  """(the train step, its inputs as ShapeDtypeStructs with their shardings) on a mesh whose devices need not be here."""
  loop.check_options(config, mesh)
  model = lavit.build(config.variant, config.dtype, config.remat)
  stage = stages.build(config, model, sharding.batch_shards(mesh))
  parts, batch = stages.abstract_inputs(config, model, stage)
  init, tx = loop.initialiser(config, stage, parts)
  state = jax.eval_shape(init, jax.random.key(config.seed), parts)
  places = sharding.shardings(state, mesh)

  def put(tree, places):
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)

  frozen = {name: parts[name] for name in stage.needs}
  inputs = put(state, places), put(frozen, sharding.shardings(frozen, mesh)), put(batch, dict.fromkeys(batch, NamedSharding(mesh, sharding.BATCH)))
  return loop.make_train_step(config, stage, tx, places, mesh), inputs


def _devices(topology: str, slices: int) -> list:
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # else libtpu looks for the pod it runs on
  options = ONE_DEVICE_A_CHIP.get(topology.split(':')[0], {}) | (dict(num_slices=slices) if slices > 1 else {})
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=topology, **options).devices
  except Exception as error:  # libtpu's own, of whatever kind
    reason = ' '.join(str(error).split())[:300]
    raise UserError(f"--topology {topology}: {reason}; libtpu comes with pip install -e '.[tpu]' -c launch/constraints.txt") from error


def _bytes_a_chip(tree) -> int:
  arrays = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in arrays)
