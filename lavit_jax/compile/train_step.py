"""`lavit compile --config`: the train step of a config, compiled for a TPU pod."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from lavit_jax import sharding
from lavit_jax.compile.program import (
  GIB,
  bytes_per_device,
  compile_for,
  format_memory,
  roofline_times,
  with_shardings,
)
from lavit_jax.compile.topology import (
  devices_per_chip,
  format_device,
  format_device_count,
  pod_devices,
)
from lavit_jax.training import flops
from lavit_jax.training.run import Run, resolve_abstract
from lavit_jax.training.run_config import read_mesh
from lavit_jax.training.stages.base import frozen_params
from lavit_jax.training.train_step import abstract_inputs, make_init, make_train_step


class Report(NamedTuple):
  """The cost of a train step. The fields are the keys of the JSON output.

  "Chip" means a JAX device, which is half a chip where `devices_per_chip` is 2. Memory is in GiB,
  times are in seconds.

  Attributes:
    slices: the number of pods of the topology, connected by the network of the data center.
    tokens_per_step: of all chips: slots of packed rows, or patches.
    packed_share: the share of these slots that is expected to hold a token.
    hbm_activations_gib: activations, gradients and all else but parameters and optimizer.
    fits: whether the program leaves `program.SPARE_MEMORY` free.
    flops_per_chip: operations of the program.
    model_flops_per_chip: operations that the model requires.
    collectives: {kind of collective: bytes that a chip sends}.
    network_seconds: as if all traffic stayed within a slice; traffic between slices takes longer.
    mfu_bound: the model FLOP/s utilization, if the longest of the times were the time of a step.
  """

  config: str
  topology: str
  slices: int
  chips: int
  devices_per_chip: int
  mesh: dict[str, int]
  tokens_per_step: int
  packed_share: float
  hbm_parameters_gib: float
  hbm_optimizer_gib: float
  hbm_activations_gib: float
  hbm_per_chip_gib: float
  hbm_limit_gib: float
  fits: bool
  flops_per_chip: float
  model_flops_per_chip: float
  hbm_bytes_per_chip: float
  collective_bytes_per_chip: float
  collectives: dict[str, float]
  compute_seconds: float
  memory_seconds: float
  network_seconds: float
  mfu_bound: float
  compile_seconds: float


def run(config: ConfigDict, name: str, topology: str, slices: int, as_json: bool) -> None:
  """Compiles the step and prints the report as a JSON object or as a table."""
  report = compile_step(config, name, topology, slices)
  if as_json:
    print(json.dumps(report._asdict()))
    return
  devices = format_device_count(report.chips, report.devices_per_chip)
  title = f'{name} on {slices} x {topology}: {devices}, mesh {report.mesh}'
  table = Table('', format_device(report.devices_per_chip), title=title)
  for cells in table_rows(report):
    table.add_row(*cells)
  Console().print(table)


def table_rows(report: Report) -> list[tuple[str, str]]:
  """The rows of the printed table: (label, formatted value)."""
  memory = format_memory(report.hbm_per_chip_gib, report.hbm_limit_gib, report.fits)
  tokens = (
    f'{report.tokens_per_step:,}, of which {report.packed_share:.1%} are expected to be filled'
  )
  network = f'{report.network_seconds:.3f}'
  if report.slices > 1:
    network += ', more where it crosses slices'
  collectives = [
    (f'GB of {kind}', f'{size / 1e9:,.2f}') for kind, size in sorted(report.collectives.items())
  ]
  return [
    ('parameters, GiB', f'{report.hbm_parameters_gib:.2f}'),
    ('optimizer, GiB', f'{report.hbm_optimizer_gib:.2f}'),
    ('activations and gradients, GiB', f'{report.hbm_activations_gib:.2f}'),
    ('memory, GiB', memory),
    ('tokens a step, all chips', tokens),
    ('TFLOP of the program', f'{report.flops_per_chip / 1e12:,.1f}'),
    ('TFLOP of the model', f'{report.model_flops_per_chip / 1e12:,.1f}'),
    ('GB to and from HBM', f'{report.hbm_bytes_per_chip / 1e9:,.1f}'),
    *collectives,
    ('seconds of compute', f'{report.compute_seconds:.3f}'),
    ('seconds of memory', f'{report.memory_seconds:.3f}'),
    ('seconds of network', network),
    ('bound of the MFU', f'{report.mfu_bound:.1%}'),
    ('compiled in, s', f'{report.compile_seconds:.0f}'),
  ]


def compile_step(config: ConfigDict, name: str, topology: str, slices: int = 1) -> Report:
  """Compiles the train step of a config.

  Args:
    config: as the files in `configs/` define it.
    name: of the config, for the report.
    topology: CHIP:SHAPE, such as 'v5e:16x16'.
    slices: the number of pods of that topology.

  Raises:
    UserError: as in `pod_devices` and `compile_for`, or the config is invalid.
  """
  chip, devices = pod_devices(topology, slices)
  mesh = sharding.make_mesh(dataclasses.asdict(read_mesh(config)), devices)
  run = resolve_abstract(config, mesh)
  step, inputs = abstract_step(run)
  program = compile_for(topology, mesh, step, *inputs)

  state, frozen, _ = inputs
  parameter_bytes = bytes_per_device((state.params, state.ema, state.state, frozen))
  optimizer_bytes = bytes_per_device(state.opt_state)
  packed_share = flops.expected_share(run)
  model_flops = flops.step_flops(run).at(packed_share) / mesh.size
  times = roofline_times(program.cost, chip)
  return Report(
    config=name,
    topology=topology,
    slices=slices,
    chips=mesh.size,
    devices_per_chip=devices_per_chip(topology),
    mesh=dict(mesh.shape),
    tokens_per_step=run.tokens_per_step,
    packed_share=packed_share,
    hbm_parameters_gib=parameter_bytes / GIB,
    hbm_optimizer_gib=optimizer_bytes / GIB,
    hbm_activations_gib=(program.hbm_bytes - parameter_bytes - optimizer_bytes) / GIB,
    hbm_per_chip_gib=program.hbm_bytes / GIB,
    hbm_limit_gib=chip.hbm_gib,
    fits=program.fits(chip),
    flops_per_chip=program.cost.flops,
    model_flops_per_chip=model_flops,
    hbm_bytes_per_chip=program.cost.hbm_bytes,
    collective_bytes_per_chip=program.cost.sent_bytes,
    collectives=program.cost.collective_bytes,
    compute_seconds=times.compute,
    memory_seconds=times.memory,
    network_seconds=times.network,
    mfu_bound=model_flops / (chip.tflops * 1e12 * max(times)),
    compile_seconds=program.compile_seconds,
  )


def abstract_step(run: Run) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """The train step of a run for devices that the machine may not have.

  Returns:
    (the step, its inputs as ShapeDtypeStructs with their shardings).
  """
  loaded, batch = abstract_inputs(run)
  init, tx = make_init(run, loaded)
  state = jax.eval_shape(init, jax.random.key(0), loaded)
  shardings = sharding.shardings(state, run.mesh)
  frozen = frozen_params(run.stage, loaded)
  batch_sharding = NamedSharding(run.mesh, sharding.BATCH)
  inputs = (
    with_shardings(state, shardings),
    with_shardings(frozen, sharding.shardings(frozen, run.mesh)),
    with_shardings(batch, dict.fromkeys(batch, batch_sharding)),
  )
  return make_train_step(run, tx, shardings), inputs
