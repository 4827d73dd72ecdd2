"""The learning rate over the steps of a run, and how it changes when a run continues."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import optax

from lavit_jax.training.config import read_options

if TYPE_CHECKING:
  from lavit_jax.training.metrics import MetricLogger

SCHEDULES = ('cosine', 'constant', 'rewarm')
NOTICEABLE = 1.02  # the ratio of learning rates from which a jump is reported


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """How the learning rate changes over the steps of a run."""

  num_steps: int  # where the (last) cosine ends
  learning_rate: float  # the highest rate
  warmup_steps: int  # updates over which the rate rises linearly from 0
  final_fraction: float  # of the highest rate, at the end of a cosine
  schedule: str = 'cosine'  # or 'constant' (stays at the highest rate), or 'rewarm'
  rewarm_from: int = 0  # under 'rewarm', the update at which the first cosine ends

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> ScheduleConfig:
    """Reads it from a config, or from the JSON of one of an earlier version.

    Raises:
      UserError: `optim` lacks an option that has no default.
    """
    return read_options(cls, {**config['optim'], 'num_steps': config['num_steps']}, 'optim')


def learning_rate(config: ScheduleConfig) -> optax.Schedule:
  """The rate of the n-th update, counted from 0.

  Under 'rewarm' the updates before `rewarm_from` are those of a cosine that ends there. Then the
  rate rises again over `warmup_steps`, from what was left, and falls once more.
  """
  peak = config.learning_rate
  final = config.final_fraction * peak

  def cosine(start: float, steps: int) -> optax.Schedule:
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(start, peak, warmup, steps, final)

  if config.schedule == 'constant':
    return optax.warmup_constant_schedule(0.0, peak, config.warmup_steps)
  restart = config.rewarm_from
  if config.schedule == 'rewarm' and 0 < restart < config.num_steps:
    cosines = [cosine(0.0, restart), cosine(final, config.num_steps - restart)]
    return optax.join_schedules(cosines, [restart])
  return cosine(0.0, config.num_steps)


def rate_at(config: ScheduleConfig, step: int) -> float:
  """The rate of one update, counted from 0."""
  return float(np.asarray(learning_rate(config)(step)))


def warn_of_schedule(
  log: MetricLogger, config: ScheduleConfig, saved: ScheduleConfig, step: int
) -> None:
  """Warns where the next update's rate differs from that of the options it was trained with.

  Args:
    log: receives the warning.
    config: of this run.
    saved: with which the first steps were made.
    step: their number.
  """
  if step >= config.num_steps:
    return
  before = rate_at(saved, step)
  now = rate_at(config, step)
  if max(before, now) <= NOTICEABLE * min(before, now):
    return
  log.print_line(
    f'warning: at step {step} the learning rate goes from {before:.3g}, as this run was begun '
    f'(num_steps={saved.num_steps}), to {now:.3g} (num_steps={config.num_steps}); '
    f'--config.optim.schedule=constant --config.optim.learning_rate={before:.3g} goes on as it '
    f'was, --config.optim.schedule=rewarm --config.optim.rewarm_from={step} warms up anew'
  )
