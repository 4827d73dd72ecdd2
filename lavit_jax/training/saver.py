"""When a run saves a checkpoint: after so many steps, at its end, and when it is stopped."""

from __future__ import annotations

from typing import NoReturn

from lavit_jax.data.loader import BatchIterator
from lavit_jax.training.checkpoint import Checkpoints
from lavit_jax.training.distributed import TERMINATED
from lavit_jax.training.goodput import Goodput
from lavit_jax.training.lock import WorkdirLock
from lavit_jax.training.metrics import MetricLogger
from lavit_jax.training.run import Run
from lavit_jax.training.train_step import TrainState
from lavit_jax.training.watch import MetricWatch
from lavit_jax.training.workdir import Mirror


def is_due(interval: int, step: int, last: bool) -> bool:
  """Whether something is due that happens each `interval` steps (0: never) and at the last one."""
  return bool(interval) and (step % interval == 0 or last)


class Saver:
  """Saves when due, as soon as the parameters are sound.

  Args:
    run: the run.
    log: its metrics.
    watch: knows whether the parameters are sound.
    checkpoints: receives the train state and the position in the data.
    lock: of the work directory, which must still be this run's.
    mirror: copies the metrics to a store, before a checkpoint has their steps.
    batches: the iterator over the data.
    goodput: counts the time of saving.
  """

  def __init__(
    self,
    run: Run,
    log: MetricLogger,
    watch: MetricWatch,
    checkpoints: Checkpoints,
    lock: WorkdirLock,
    mirror: Mirror,
    batches: BatchIterator,
    goodput: Goodput,
  ):
    self.run = run
    self.log = log
    self.watch = watch
    self.checkpoints = checkpoints
    self.lock = lock
    self.mirror = mirror
    self.batches = batches
    self.goodput = goodput
    self.due = False
    self.saved_step = -1

  def save_if_due(self, step: int, state: TrainState, stop: bool) -> None:
    """Saves after each `checkpoint_every` steps and the last one, and when the run stops."""
    last = step == self.run.num_steps
    self.due |= is_due(self.run.intervals.checkpoint_every, step, last)
    if self.due or stop:
      self._save(step, state)

  def _save(self, step: int, state: TrainState) -> None:
    self.log.flush()
    self.watch.check_steps(step == self.run.num_steps)
    if not self.watch.is_sound():
      return  # a later step is saved, or none
    self.lock.check()
    with self.goodput.phase('saving'):
      self.mirror.copy()
      self.checkpoints.save(step, state, self.batches)
    self.goodput.record(step)
    self.due = False
    self.saved_step = step

  def stop(self, step: int, state: TrainState) -> NoReturn:
    """Ends the run after a step, which is saved."""
    if self.saved_step != step:
      self._save(step, state)
    with self.goodput.phase('saving'):
      self.checkpoints.wait()
    place = 'here'
    if self.saved_step != step:
      place = 'the last checkpoint, for the last updates were skipped'
    self.log.print_line(f'stopped at step {step} as asked; the same command goes on from {place}')
    self.log.print_line(self.goodput.totals().line())
    raise SystemExit(TERMINATED)
