"""`lavit compile`: the exact train step of a page, compiled for an absent TPU pod (topology.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from lavit_jax import sharding
from lavit_jax.compile import topology
from lavit_jax.compile.topology import GIB
from lavit_jax.training import flops
from lavit_jax.training.run import Run, check_values, resolve_abstract
from lavit_jax.training.train_step import abstract_inputs, make_init, make_train_step


class Report(NamedTuple):
  """What the compiled step needs of one chip; seconds and GiB.

  Of chips that are two devices each (`devices_per_chip`), "chip" means a device throughout, which
  has half of the memory.

  Attributes:
    config: the page.
    topology: CHIP:SHAPE.
    slices: pods of that topology, which the network of the data center connects.
    chips: all of them.
    devices_per_chip: 1 or 2.
    mesh: axis -> size.
    tokens_per_step: of all chips: slots of packed rows, or patches.
    packed_share: the expected share of them that hold a token.
    hbm_parameters_gib: of the parameters, trained or not, and their averages.
    hbm_optimizer_gib: of the optimizer's state.
    hbm_activations_gib: of everything else, such as activations and gradients.
    hbm_per_chip_gib: of the whole program.
    hbm_limit_gib: of the chip.
    fits: whether that suffices, with `topology.SPARE` left.
    flops_per_chip: operations of the program.
    model_flops_per_chip: operations of the model, without what is computed twice or for padding.
    hbm_bytes_per_chip: traffic of the memory.
    collective_bytes_per_chip: bytes that are sent to other chips.
    collectives: kind -> those bytes.
    compute_seconds: lower bound by operations.
    memory_seconds: lower bound by memory traffic.
    network_seconds: lower bound by network traffic, as if all of it stayed within a slice.
    mfu_bound: upper bound of the model FLOP/s utilization.
    compile_seconds: of the compiler.
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


def run(config: ConfigDict, page: str, topology_name: str, slices: int, as_json: bool) -> None:
  """Compiles the train step and prints what it needs.

  Args:
    config: as in `compile_step`.
    page: as in `compile_step`.
    topology_name: as in `compile_step`.
    slices: as in `compile_step`.
    as_json: one JSON object; otherwise a table.

  Raises:
    UserError: as `compile_step`.
  """
  report = compile_step(config, page, topology_name, slices)
  if as_json:
    print(json.dumps(report._asdict()))
    return
  chips = topology.format_count(report.chips, report.devices_per_chip)
  unit = 'a chip' if report.devices_per_chip == 1 else 'a device'
  pods = f'{report.slices} x {report.topology}'
  table = Table('', unit, title=f'{report.config} on {pods}: {chips}, mesh {report.mesh}')
  for name, value in _table_rows(report):
    table.add_row(name, value)
  Console().print(table)


def _table_rows(report: Report) -> list[tuple[str, str]]:
  """The rows of the table: (quantity, value)."""
  collectives = []
  for kind, size in sorted(report.collectives.items()):
    collectives.append((f'GB of {kind}', f'{size / 1e9:,.2f}'))
  network = f'{report.network_seconds:.3f}'
  if report.slices > 1:
    network += ', more where it crosses slices'
  return [
    ('parameters, GiB', f'{report.hbm_parameters_gib:.2f}'),
    ('optimizer, GiB', f'{report.hbm_optimizer_gib:.2f}'),
    ('activations and gradients, GiB', f'{report.hbm_activations_gib:.2f}'),
    ('memory, GiB', topology.memory_limit_note(report)),
    (
      'tokens a step, all chips',
      f'{report.tokens_per_step:,}, of which {report.packed_share:.1%} are expected to be filled',
    ),
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


def compile_step(config: ConfigDict, page: str, topology_name: str, slices: int = 1) -> Report:
  """Compiles the train step of a config.

  Args:
    config: a page of `configs/`.
    page: its name, for the report.
    topology_name: CHIP:SHAPE, such as 'v5e:16x16'.
    slices: the number of such pods.

  Raises:
    UserError: the chip or topology does not exist, libtpu is missing, or the config does not fit.
  """
  chip, devices = topology.pod_devices(topology_name, slices)
  check_values(config)
  mesh = sharding.make_mesh(config.to_dict()['mesh'], devices)
  run = resolve_abstract(config, mesh)
  step, inputs = abstract_step(run)
  program = topology.compile_on(topology_name, mesh, step, *inputs)

  state, frozen, _ = inputs
  parameters = topology.bytes_per_chip((state.params, state.ema, state.state, frozen))
  optimizer = topology.bytes_per_chip(state.opt_state)
  packed_share = flops.expected_share(run)
  model_flops = flops.step_flops(run).at(packed_share) / mesh.size
  bounds = topology.roofline(program.cost, chip)
  return Report(
    config=page,
    topology=topology_name,
    slices=slices,
    chips=mesh.size,
    devices_per_chip=topology.devices_per_chip(topology_name),
    mesh=dict(mesh.shape),
    tokens_per_step=run.tokens_per_step,
    packed_share=packed_share,
    hbm_parameters_gib=parameters / GIB,
    hbm_optimizer_gib=optimizer / GIB,
    hbm_activations_gib=(program.hbm_bytes - parameters - optimizer) / GIB,
    hbm_per_chip_gib=program.hbm_bytes / GIB,
    hbm_limit_gib=chip.hbm_gib,
    fits=program.fits(chip),
    flops_per_chip=program.cost.flops,
    model_flops_per_chip=model_flops,
    hbm_bytes_per_chip=program.cost.bytes,
    collective_bytes_per_chip=topology.bytes_sent(program.cost),
    collectives=dict(program.cost.network),
    compute_seconds=bounds.compute,
    memory_seconds=bounds.memory,
    network_seconds=bounds.network,
    mfu_bound=model_flops / (chip.tflops * 1e12 * max(bounds)),
    compile_seconds=program.compile_seconds,
  )


def abstract_step(run: Run) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """The train step of a run, whose devices need not be here.

  Returns:
    (the step, its inputs as ShapeDtypeStructs with their shardings).
  """
  loaded, batch = abstract_inputs(run)
  init, tx = make_init(run, loaded)
  state = jax.eval_shape(init, jax.random.key(0), loaded)
  shardings = sharding.shardings(state, run.mesh)
  frozen = {name: loaded[name] for name in run.stage.modules.needs}
  batch_sharding = NamedSharding(run.mesh, sharding.BATCH)
  inputs = (
    _with_shardings(state, shardings),
    _with_shardings(frozen, sharding.shardings(frozen, run.mesh)),
    _with_shardings(batch, dict.fromkeys(batch, batch_sharding)),
  )
  return make_train_step(run, tx, shardings), inputs


def _with_shardings(tree: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
  )
