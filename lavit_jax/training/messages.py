"""The messages of a run at its start and at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from lavit_jax.training.checkpoint import Checkpoints
from lavit_jax.training.goodput import Goodput
from lavit_jax.training.metrics import MetricLogger
from lavit_jax.training.profiler import ProfilerTrace
from lavit_jax.training.run import Run
from lavit_jax.training.schedule import ScheduleConfig, warn_of_schedule
from lavit_jax.training.stages import LanguageModelOptions
from lavit_jax.training.train_step import TrainState


def option_warnings(
  run: Run, loaded: Mapping[str, Any], trace: ProfilerTrace, start_step: int
) -> list[str]:
  """A line for each option that does not have the effect that one may expect.

  Args:
    run: the run.
    loaded: the params in its folders, or their shapes.
    trace: of the profiler.
    start_step: the steps that were made before this process started.
  """
  modules = run.stage.modules
  lines = []
  absent = [name for name in modules.zeros if run.init_from and name not in loaded]
  if absent and not start_step:
    lines.append(f'init_from={run.init_from} has no {", ".join(absent)}: zeros take the place')
  own = [name for name in modules.takes if name not in modules.starts]
  if run.init_from and not any(name in loaded for name in own):
    lines.append(
      f'init_from={run.init_from} has none of {", ".join(modules.takes)}, which stage '
      f'{run.stage_name} trains: they begin anew'
    )
  if run.stage.warnings is not None:
    lines += run.stage.warnings(loaded, run.num_steps)
  if trace.last and not (start_step < trace.last and trace.first <= run.num_steps):
    lines.append(
      f'profile={run.profile} traces nothing: this run makes steps {start_step + 1} to '
      f'{run.num_steps}'
    )
  return lines


def log_start(
  run: Run, log: MetricLogger, checkpoints: Checkpoints, abstract: TrainState, start_step: int
) -> None:
  """Logs what is trained, and what has changed since the checkpoint of step `start_step`."""
  count = sum(x.size for x in jax.tree.leaves(abstract.params))
  begin = f'continuing from step {start_step}' if start_step else f'starting in {run.workdir}'
  log.print_line(
    f'{run.stage_name}:{run.variant}  {count / 1e6:.2f} M parameters  mesh {dict(run.mesh.shape)}  '
    f'{begin}'
  )
  if isinstance(run.options, LanguageModelOptions) and run.model.interface is not None:
    tokens = f'{run.model.max_visual_tokens} tokens an image'
    if run.model.layered_interface is not None:
      tokens = f'{run.model.num_image_vectors} vectors an image, which extra layers read'
    drawing = 'and no codes, so no image is drawn (data.shares.draw=0)'
    if run.model.regressing_interface is not None:
      drawing = 'which are regressed, too, in place of codes'
    log.print_line(f'interface {run.model.interface_name}: {tokens}, {drawing}')
  if isinstance(run.options, LanguageModelOptions) and run.stage.base is not None:
    lora = run.options.lora
    modules = ', '.join(abstract.params)
    log.print_line(
      f'adapters of rank {lora.rank} in {modules}; the weights beside them are {lora.base_dtype}'
    )
  if not start_step:
    return
  harmless, inexact = checkpoints.changes(start_step)
  if harmless:
    log.print_line(f'changed since then: {", ".join(harmless)}')
  if inexact:
    log.print_line(
      'warning: changed since then, so the next examples are not those that it would have seen: '
      f'{", ".join(inexact)}'
    )
  saved = ScheduleConfig.from_config(checkpoints.saved_config(start_step))
  warn_of_schedule(log, run.optimizer.schedule, saved, start_step)


def log_end(
  run: Run, log: MetricLogger, metadata: Mapping[str, Any], start_step: int, goodput: Goodput
) -> None:
  """Logs where the export is, whether later stages can use it, and where the time went.

  Args:
    run: the run.
    log: receives the lines.
    metadata: of the export.
    start_step: the steps that were made before this process started.
    goodput: of the run.
  """
  if metadata.get('codebook') == 'untrained':
    log.print_line(
      'warning: the codebook of this run was never trained, so its codes mean nothing: the export '
      'says so, and is only for init_from'
    )
  before = ' before; a larger num_steps goes on' if start_step >= run.num_steps else ''
  what = 'weights' if run.stage.base is None else 'adapters'
  log.print_line(f'done{before}; the {what} are in {run.workdir / "export"}')
  log.print_line(goodput.totals().line())
