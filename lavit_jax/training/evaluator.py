"""Held-out metrics and drawn images, always of the same examples with the same noise."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping

import jax
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lavit_jax import sharding
from lavit_jax.training import metrics
from lavit_jax.training.batches import open_batches
from lavit_jax.training.distributed import InterruptHandler
from lavit_jax.training.keys import Purpose, key_for
from lavit_jax.training.metrics import MetricLogger
from lavit_jax.training.run import Run
from lavit_jax.training.stages.base import Tree
from lavit_jax.training.train_step import TrainState, averaged, loss_and_metrics
from lavit_jax.visualization import image_grid


def _draw_nothing(*_) -> list[Array]:
  return []


class Evaluator:
  """Evaluates and draws with the averaged weights, if there are any.

  Args:
    run: the run.
    frozen: the params of the modules that its stage needs.
    log: receives the metrics and images.
  """

  def __init__(self, run: Run, frozen: Mapping[str, Tree], log: MetricLogger):
    self.run = run
    self.frozen = frozen
    self.log = log
    self.key = key_for(run.seed, Purpose.HELDOUT)
    stage = run.stage
    measure = loss_and_metrics(run)
    draw = stage.draw or _draw_nothing
    # Every process sees all of the results.
    jit = functools.partial(jax.jit, out_shardings=NamedSharding(run.mesh, P()))

    @jit
    def measure_batch(train_state, frozen, batch, key):
      params, state = averaged(stage, train_state)
      return measure(params, frozen, state, batch, key)

    @jit
    def draw_batch(train_state, frozen, batch, key):
      params, state = averaged(stage, train_state)
      return draw(params, frozen, state, batch, key)

    self._measure_batch = measure_batch
    self._draw_batch = draw_batch

  def evaluate(self, state: TrainState, step: int, interrupt: InterruptHandler) -> bool:
    """Logs the mean over `eval_batches` held-out batches.

    Returns:
      Whether the evaluation is complete; False if the run was asked to stop meanwhile.
    """
    start = time.monotonic()
    results = []
    for key, batch in self._batches(self.run.intervals.eval_batches):
      results.append(jax.device_get(self._measure_batch(state, self.frozen, batch, key)))
      if interrupt.requested():
        return False
    self.log.evaluation(step, metrics.mean_metrics(results))
    self.log.pause(time.monotonic() - start)
    return True

  def draw(self, state: TrainState, step: int) -> None:
    """Logs the images of the first held-out batch."""
    start = time.monotonic()
    ((key, batch),) = self._batches(1)
    rows = jax.device_get(self._draw_batch(state, self.frozen, batch, key))
    self.log.images(step, {self.run.stage_name: image_grid(*rows)})
    self.log.pause(time.monotonic() - start)

  def _batches(self, count: int) -> Iterator[tuple[Array, dict[str, Array]]]:
    """(key, batch) of the first held-out batches."""
    with contextlib.closing(open_batches(self.run, 'heldout')) as batches:
      for i in range(count):
        batch = sharding.put_batch(next(batches), self.run.mesh, self.run.share)
        yield jax.random.fold_in(self.key, i), batch
