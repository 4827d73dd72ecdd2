"""What ends a run early: updates that are not finite, and pairs without room in packed rows."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lavit_jax.errors import UserError
from lavit_jax.training.checkpoint import Checkpoints
from lavit_jax.training.metrics import MetricLogger
from lavit_jax.training.run import Run
from lavit_jax.training.stages import LanguageModelOptions
from lavit_jax.training.stages.language_model import longest_pair

WARNING_SHARE = 0.02  # share of the pairs without room from which a run warns
FILL = 0.9  # share of the slots of packed rows that first fit fills, whatever the lengths


class MetricWatch:
  """Checks the metrics that were flushed.

  Args:
    run: the run.
    log: gives the metrics, and receives warnings.
    checkpoints: those that have broken parameters are set aside.
  """

  def __init__(self, run: Run, log: MetricLogger, checkpoints: Checkpoints):
    self.run = run
    self.log = log
    self.checkpoints = checkpoints
    self.streak = 0  # updates skipped in a row, up to now
    self.first_skipped = 0  # the step of the first of them
    self.warned = False

  def is_sound(self) -> bool:
    """Whether the last flushed step had a finite loss and gradient, so that it may be saved."""
    return self.streak == 0

  def check_steps(self, last: bool) -> None:
    """Checks the steps that were flushed since the last call.

    Args:
      last: whether the last of them is the last one of the run.

    Raises:
      UserError: `optim.max_nonfinite` updates were skipped in a row, or the last ones of the run.
        Then the parameters may be broken by an update that was finite and too large; checkpoints
        that have them are set aside.
    """
    limit = self.run.optimizer.max_nonfinite
    for record in self.log.take_new():
      if not record['nonfinite']:
        self.streak = 0
        continue
      if self.streak == 0:
        self.first_skipped = int(record['step'])
      self.streak += 1
      if self.streak >= limit:
        break
    if self.streak >= limit or (last and self.streak):
      self._end_broken_run()

  def _end_broken_run(self) -> None:
    aside = self.checkpoints.set_aside_broken(self.first_skipped - 1)
    remaining = self.checkpoints.manager.all_steps(read=True)
    moved = ''
    if aside:
      names = ', '.join(f'{step}.broken' for step in aside)
      moved = f'the checkpoints {names} have these parameters and are set aside; '
    restart = f'it resumes from step {max(remaining)}' if remaining else 'it restarts from step 0'
    raise UserError(
      f'loss or gradient was not finite in {self.streak} steps in a row, from step '
      f'{self.first_skipped} on; {moved}lower optim.learning_rate or optim.clip_norm, or look at '
      f'the data, and start again: {restart}'
    )

  def check_packing(self, means: Mapping[str, float], step: int) -> None:
    """Checks the means since the last report.

    Args:
      means: of the metrics.
      step: the last one.

    Raises:
      UserError: a larger share of the pairs than `lm.max_overflow` found no room.
    """
    options = self.run.options
    if not means.get('overflow') or not isinstance(options, LanguageModelOptions):
      return
    batch_size = self.run.batch_size
    share = means['overflow'] / batch_size
    message = (
      f'{means["overflow"]:.3g} of the {batch_size} pairs of a step ({share:.0%}) find no room in '
      f'the packed rows and are dropped; {self._remedy(options, means)}'
    )
    if share > options.max_overflow:
      raise UserError(
        f'at step {step} {message} (lm.max_overflow={options.max_overflow} is the share that a '
        'run allows)'
      )
    if share > WARNING_SHARE and not self.warned:
      self.warned = True
      self.log.print_line(f'warning: {message}')

  def _remedy(self, options: LanguageModelOptions, means: Mapping[str, float]) -> str:
    """Options under which the pairs have room, by the length of those that had."""
    layout = self.run.layout
    length = options.row_length
    longest = longest_pair(self.run.model, layout)
    if length < longest:
      return (
        f'lm.row_length={length} is less than the {longest} tokens that a pair may have: set '
        f'lm.row_length={_round_up(longest, options.loss_chunks)}'
      )
    placed = max(layout.batch_size - means['overflow'], 1.0)
    mean_length = means['packed_share'] * options.num_slots / placed
    needed = layout.batch_size * mean_length / (FILL * length)
    num_rows = max(_round_up(needed, layout.pieces), options.num_rows + layout.pieces)
    return (
      f'set lm.num_rows={num_rows} (now {options.num_rows}) and '
      f'lm.mean_length={round(mean_length)}, or lower batch_size'
    )


def _round_up(number: float, multiple: int) -> int:
  """The least multiple that is not below a number."""
  return multiple * math.ceil(number / multiple)
