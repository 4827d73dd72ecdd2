"""What ends a run for its own good: updates that are not finite, step after step, and pairs that
find no room in packed rows.
"""

from __future__ import annotations

import math

from lavit_jax.errors import UserError
from lavit_jax.models import lavit

WORTH_A_WARNING = 0.02  # share of the pairs that find no room
FILL = 0.9  # share of the slots of packed rows that first fit fills, whatever the lengths


class MetricWatch:
  """Looks at the metrics that were flushed.

  Args:
    config: the page, of which `optim.max_nonfinite` and `lm.max_overflow` count here.
    log: metrics.Log of the run.
    checkpoints: of the run.
    shards: the pieces that the mesh makes of a batch.
  """

  def __init__(self, config, log, checkpoints, shards: int):
    self.config, self.log, self.checkpoints, self.shards = config, log, checkpoints, shards
    self.streak = 0  # updates skipped in a row, up to now
    self.first = 0  # the step of the first of them
    self.warned = False

  def is_sound(self) -> bool:
    """Whether the last step that was flushed had a finite loss and gradient: its parameters may be
    saved.
    """
    return self.streak == 0

  def check_steps(self, last: bool) -> None:
    """Looks at the steps flushed since the last call.

    Raises:
      UserError: `optim.max_nonfinite` updates were skipped in a row, or the last ones of the run.
        Then the parameters may be what is broken, by
        an update that was finite and too large; checkpoints that have them are set aside.
    """
    limit = self.config.optim.get('max_nonfinite', 10)
    for row in self.log.take_new():
      if not row['nonfinite']:
        self.streak = 0
        continue
      if self.streak == 0:
        self.first = int(row['step'])
      self.streak += 1
      if self.streak >= limit:
        break
    if self.streak < limit and not (last and self.streak):
      return
    aside = self.checkpoints.set_aside_broken(self.first - 1)
    remaining = self.checkpoints.manager.all_steps(read=True)
    told = (
      f'the checkpoints {", ".join(f"{step}.broken" for step in aside)} have these parameters and are set aside; '
      if aside
      else ''
    )
    place = f'it goes on from step {max(remaining)}' if remaining else 'it begins anew'
    raise UserError(
      f'loss or gradient was not finite in {self.streak} steps in a row, from step {self.first} on; {told}lower optim.learning_rate or '
      f'optim.clip_norm, or look at the data, and start again: {place}'
    )

  def check_packing(self, means: dict[str, float], step: int) -> None:
    """Looks at the means since the last report.

    Raises:
      UserError: more pairs than the share `lm.max_overflow` found no room.
    """
    if not means.get('overflow'):
      return
    batch_size = self.config.batch_size
    share = means['overflow'] / batch_size
    limit = self.config.lm.get('max_overflow', 1.0)
    line = f'{means["overflow"]:.3g} of the {batch_size} pairs of a step ({share:.0%}) find no room in the packed rows and are dropped; {self.remedy(means)}'
    if share > limit:
      raise UserError(
        f'at step {step} {line} (lm.max_overflow={limit} is the share that a run puts up with)'
      )
    if share > WORTH_A_WARNING and not self.warned:
      self.warned = True
      self.log.say(f'warning: {line}')

  def remedy(self, means: dict[str, float]) -> str:
    """Options under which the pairs find room, by how long those were that did."""
    config = self.config
    rows, length = config.lm.num_rows, config.lm.row_length
    longest = config.data.text_length + lavit.build(config.variant).num_patches + 3
    if length < longest:
      return f'lm.row_length={length} is less than the {longest} tokens that a pair may have: set lm.row_length={_multiple(longest, config.lm.loss_chunks)}'
    placed = max(config.batch_size - means['overflow'], 1.0)
    mean_length = means['packed_share'] * rows * length / placed
    wanted = _multiple(
      config.batch_size * mean_length / (FILL * length), config.accumulate * self.shards
    )
    wanted = max(wanted, rows + config.accumulate * self.shards)
    return f'set lm.num_rows={wanted} (now {rows}) and lm.mean_length={round(mean_length)}, or lower batch_size'


def _multiple(number: float, of: int) -> int:
  """The least multiple that is not below a number."""
  return of * math.ceil(number / of)
