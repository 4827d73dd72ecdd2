"""`lavit compile`: the exact train step, compiled for a TPU pod that is not there.

What a pod would make of the program is what topology.py reads from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from rich.console import Console
from rich.table import Table

from lavit_jax import sharding
from lavit_jax.compile import topology as pods
from lavit_jax.compile.topology import GIB
from lavit_jax.training import flops
from lavit_jax.training.run import Run, check_values, resolve_abstract
from lavit_jax.training.train_step import abstract_inputs, make_init, make_train_step


class Report(NamedTuple):
  """What the compiled step needs, of one chip unless it says otherwise; seconds and GiB.

  Of chips that are two devices each (`devices_per_chip`), 'chip' means a device throughout: a half,
  with half of the memory.
  """

  config: str
  topology: str
  slices: int  # pods of that topology, joined by the data centre's network
  chips: int
  devices_per_chip: int
  mesh: dict[str, int]
  tokens_per_step: int  # of all chips: slots of packed rows, or patches
  packed_share: float  # of them, that are expected to hold a token
  hbm_parameters_gib: float
  hbm_optimizer_gib: float
  hbm_activations_gib: float  # and gradients: all that is neither of the above
  hbm_per_chip_gib: float
  hbm_limit_gib: float
  fits: bool  # with `pods.SPARE` to spare
  flops_per_chip: float
  model_flops_per_chip: float
  hbm_bytes_per_chip: float
  collective_bytes_per_chip: float
  collectives: dict[str, float]  # bytes sent, by kind
  compute_seconds: float
  memory_seconds: float
  network_seconds: (
    float  # as if all of it went between chips of one slice: what crosses slices takes longer
  )
  mfu_bound: float
  compile_seconds: float


def run(config, page: str, topology: str, slices: int, as_json: bool) -> None:
  """Compiles and prints, as one JSON object or as a table."""
  report = compile_step(config, page, topology, slices)
  if as_json:
    print(json.dumps(report._asdict()))
    return
  chips = pods.count(report.chips, report.devices_per_chip)
  one = 'a chip' if report.devices_per_chip == 1 else 'a device'
  where = f'{report.slices} x {report.topology}'
  table = Table('', one, title=f'{report.config} on {where}: {chips}, mesh {report.mesh}')
  for row in rows(report):
    table.add_row(*row)
  Console().print(table)


def rows(report: Report) -> list[tuple[str, str]]:
  """The lines of the table, (what, how much)."""
  return [
    ('parameters, GiB', f'{report.hbm_parameters_gib:.2f}'),
    ('optimizer, GiB', f'{report.hbm_optimizer_gib:.2f}'),
    ('activations and gradients, GiB', f'{report.hbm_activations_gib:.2f}'),
    ('memory, GiB', pods.memory_limit_note(report)),
    (
      'tokens a step, all chips',
      f'{report.tokens_per_step:,}, of which {report.packed_share:.1%} are expected to be filled',
    ),
    ('TFLOP of the program', f'{report.flops_per_chip / 1e12:,.1f}'),
    ('TFLOP of the model', f'{report.model_flops_per_chip / 1e12:,.1f}'),
    ('GB to and from HBM', f'{report.hbm_bytes_per_chip / 1e9:,.1f}'),
    *((f'GB of {kind}', f'{size / 1e9:,.2f}') for kind, size in sorted(report.collectives.items())),
    ('seconds of compute', f'{report.compute_seconds:.3f}'),
    ('seconds of memory', f'{report.memory_seconds:.3f}'),
    (
      'seconds of network',
      f'{report.network_seconds:.3f}{", more where it crosses slices" if report.slices > 1 else ""}',
    ),
    ('bound of the MFU', f'{report.mfu_bound:.1%}'),
    ('compiled in, s', f'{report.compile_seconds:.0f}'),
  ]


def compile_step(config, page: str, topology: str, slices: int = 1) -> Report:
  """Compiles the train step of a config.

  Args:
    config: a page of `configs/`.
    page: its name, for the report.
    topology: CHIP:SHAPE, such as 'v5e:16x16'.
    slices: how many of them.

  Raises:
    UserError: no such chip or topology, libtpu is missing, or the config does not fit it.
  """
  chip, devices = pods.pod_devices(topology, slices)
  check_values(config)
  mesh = sharding.make_mesh(config.mesh, devices)
  run = resolve_abstract(config, mesh)
  step, inputs = abstract_step(run)
  program = pods.compile_on(topology, mesh, step, *inputs)

  state, frozen, _ = inputs
  parameters = pods.bytes_per_chip((state.params, state.ema, state.state, frozen))
  optimizer = pods.bytes_per_chip(state.opt_state)
  packed_share = flops.expected_share(run)
  model_flops = flops.step_flops(run).at(packed_share) / mesh.size
  times = program.times(chip)
  return Report(
    page,
    topology,
    slices,
    mesh.size,
    pods.devices_per_chip(topology),
    dict(mesh.shape),
    run.tokens_per_step,
    packed_share,
    parameters / GIB,
    optimizer / GIB,
    (program.hbm_bytes - parameters - optimizer) / GIB,
    program.hbm_bytes / GIB,
    chip.hbm_gib,
    program.fits(chip),
    program.cost.flops,
    model_flops,
    program.cost.bytes,
    program.sent,
    dict(program.cost.network),
    *times,
    model_flops / (chip.tflops * 1e12 * max(times)),
    program.compile_seconds,
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
