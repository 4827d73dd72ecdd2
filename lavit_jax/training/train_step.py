"""One step of training: the loss and gradient of a batch, in one or several pieces, and the update.

The result does not depend on `accumulate`: pieces count by what their means are means over
(tokens, pairs), and what is random about an example depends on its row in the batch. An update that
is not finite is skipped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lavit_jax import sharding
from lavit_jax.data import loader
from lavit_jax.models.initialization import init_params
from lavit_jax.training import metrics, optimizer
from lavit_jax.training.keys import Purpose, key_for
from lavit_jax.training.run import Run
from lavit_jax.training.stages.base import ROW, BatchLayout, Mean, Stage, Sum, Tree

MIN_WEIGHT = 1e-6  # of a mean, so that the loss of a batch without a target is 0


class TrainState(NamedTuple):
  """All that a step changes."""

  step: Array  # i32[], the steps made
  params: Tree
  opt_state: Any
  state: Any  # what the stage carries besides parameters
  ema: Any  # the moving average of the parameters; {} if it is off


class LossAndGradient(NamedTuple):
  """What a batch gives before the update."""

  metrics: dict[str, Array]  # 'loss' among them
  gradient: Tree
  state: Any  # of the stage, after the batch


def make_init(
  run: Run, loaded: Mapping[str, Tree]
) -> tuple[Callable[[Array, Mapping[str, Tree]], TrainState], optax.GradientTransformation]:
  """Makes the function that creates the first train state, and the optimizer.

  Args:
    run: the run.
    loaded: {module name: tree} of arrays or their shapes.

  Returns:
    (init(key, loaded) -> TrainState, the optimizer).

  Raises:
    UserError: a regex of the config matches no parameter, or loaded weights do not fit the model.
  """
  stage = run.stage
  # Programs that call it share one trace: the shapes here, and then `init` once or twice.
  stage_init = jax.jit(stage.init)
  params, _ = jax.eval_shape(stage_init, jax.random.key(0), loaded)
  hold = stage.hold(loaded) if stage.hold is not None else ()
  tx = optimizer.make_optimizer(run.optimizer, params, hold)

  def init(key, loaded):
    params, state = stage_init(key, loaded)
    ema = {}
    if run.optimizer.ema_decay:
      averaged_params = stage.average.join(params, state) if stage.average else params
      ema = jax.tree.map(jnp.copy, averaged_params)
    return TrainState(jnp.zeros([], jnp.int32), params, tx.init(params), state, ema)

  return init, tx


def abstract_inputs(run: Run) -> tuple[dict[str, Any], dict[str, jax.ShapeDtypeStruct]]:
  """(the params that the stage requires, a batch of all processes) as ShapeDtypeStructs."""
  names = run.stage.modules.required
  convert = run.stage.base.convert_all if run.stage.base is not None else lambda params: params
  params = jax.eval_shape(lambda: convert(init_params(run.model, jax.random.key(0), names)))
  shapes = loader.batch_shapes(
    run.data.task,
    run.batch_size,
    run.data.image_size,
    run.layout.text_length,
    run.vit_size,
    composed=not run.data.sources,
    code_sizes=run.code_sizes,
    max_images=run.layout.max_images,
  )
  batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}
  return params, batch


def averaged(stage: Stage, train_state: TrainState) -> tuple[Tree, Any]:
  """(params, state) to evaluate and to export.

  These are the averages, with the state that belongs to them; the latest where there are none.
  """
  if not train_state.ema:
    return train_state.params, train_state.state
  if stage.average is None:
    return train_state.ema, train_state.state
  return stage.average.split(train_state.ema, train_state.state)


# --- Pieces of a batch ---------------------------------------------------------------------------


def scan_pieces(function: Callable, layout: BatchLayout, mesh: Mesh) -> Callable:
  """Applies `function(carry, batch) -> (carry, values)` to the pieces of a batch in turn.

  An equal share of each shard's examples goes into each piece, so none is sent to another shard.
  A piece's batch has its rows in the whole batch under `ROW`.

  Returns:
    (carry, batch) -> (carry, values [pieces]).
  """

  def split(x):
    """[B, ...] -> [pieces, B / pieces, ...]."""
    x = x.reshape(layout.shards, layout.accumulate, -1, *x.shape[1:])
    x = jnp.moveaxis(x, 1, 0)
    x = x.reshape(layout.accumulate, -1, *x.shape[3:])
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, *sharding.BATCH)))

  def scan(carry, batch):
    size = len(jax.tree.leaves(batch)[0])
    batch = {**batch, ROW: jnp.arange(size, dtype=jnp.int32)}
    return jax.lax.scan(function, carry, jax.tree.map(split, batch))

  return scan


def combine(values: Mapping[str, Any]) -> dict[str, Any]:
  """The metrics of the pieces [pieces] -> those of the batch.

  Sums are added, means are weighted; nan stands for a piece that has nothing to measure.
  """
  combined = {}
  for name, value in values.items():
    if isinstance(value, Sum):
      combined[name] = Sum(value.total.sum())
    elif isinstance(value, Mean):
      combined[name] = Mean(value.total.sum(), value.weight.sum())
    else:
      combined[name] = value.mean() if name in metrics.VITAL else jnp.nanmean(value)
  return combined


def numbers(values: Mapping[str, Any]) -> dict[str, Array]:
  """Sums and means as plain numbers; a mean over nothing is nan."""
  plain = {}
  for name, value in values.items():
    if isinstance(value, Sum):
      plain[name] = value.total
    elif isinstance(value, Mean):
      plain[name] = value.total / value.weight
    else:
      plain[name] = value
  return plain


def loss_and_metrics(run: Run) -> Callable[..., dict[str, Array]]:
  """Evaluation metrics of a batch, computed in the same microbatches as in training.

  Returns:
    (params, frozen, state, batch, key) -> {name: f32[]}, 'loss' among them.
  """

  def measure(params, frozen, state, batch, key):
    """-> (metrics with the loss, the `Mean` 'loss' that weights microbatches, or None)."""
    value, (_, values) = run.stage.loss(params, frozen, state, batch, key, False)
    return {**values, 'loss': value}, values.get('loss')

  def measure_pieces(params, frozen, state, batch, key):
    def piece(carry, batch):
      values, weighted_loss = measure(params, frozen, state, batch, key)
      if weighted_loss is not None:
        values['loss'] = weighted_loss
      return carry, values

    _, values = scan_pieces(piece, run.layout, run.mesh)((), batch)
    return numbers(combine(values))

  def measure_whole(params, frozen, state, batch, key):
    values, _ = measure(params, frozen, state, batch, key)
    return numbers(values)

  return measure_whole if run.layout.accumulate == 1 else measure_pieces


# --- The step ------------------------------------------------------------------------------------


def make_train_step(run: Run, tx: optax.GradientTransformation, shardings: TrainState) -> Callable:
  """Compiles lazily (TrainState, frozen params, batch) -> (TrainState, metrics).

  The old state's memory becomes the new one's. With `accumulate` > 1 the batch goes through in
  that many pieces, whose gradients are added, each by the weight of its loss: less memory, the same
  update.

  Where the loss, the gradient or the new state is not finite, the update is skipped (metric
  `nonfinite` 1): parameters, moments, averages and state stay, and the next step has the next
  batch. A single parameter that would overflow stays too: none is ever not finite.

  Args:
    run: the run.
    tx: its optimizer.
    shardings: of the train state.
  """
  rate = optimizer.learning_rate(run.optimizer.schedule)
  compute = _make_gradient(run, shardings.params)
  out_shardings = (shardings, NamedSharding(run.mesh, P()))

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=out_shardings)
  def train_step(train_state, frozen, batch):
    step, params, opt_state, state, ema = train_state
    key = jax.random.fold_in(key_for(run.seed, Purpose.STEPS), step)
    values, gradient, new_state = compute(params, frozen, state, batch, key)
    grad_norm = optax.global_norm(gradient)
    # If these are finite, so are the moments.
    finite = jnp.isfinite(values['loss']) & jnp.isfinite(grad_norm) & all_finite(new_state)

    def choose(new, old):
      return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)

    updates, new_opt_state = tx.update(gradient, opt_state, params)
    updated = choose(optax.apply_updates(params, updates), params)
    new_params = _keep_finite(updated, params)
    new_state = choose(new_state, state)
    if run.optimizer.ema_decay:
      ema = choose(_update_average(run, ema, new_params, state, new_state, step), ema)
    skipped = 1.0 - (finite & all_finite(updated))
    values |= dict(grad_norm=grad_norm, learning_rate=rate(step), nonfinite=skipped)
    opt_state = choose(new_opt_state, opt_state)
    return TrainState(step + 1, new_params, opt_state, new_state, ema), values

  return train_step


def _make_gradient(run: Run, shardings: Tree) -> Callable[..., LossAndGradient]:
  """(params, frozen, state, batch, key) -> LossAndGradient, of the whole batch or in pieces."""
  stage = run.stage
  layout = run.layout

  def piece_gradient(params, frozen, state, batch, key):
    """-> (loss, gradient, state, metrics)."""

    def loss(params):
      params = optimizer.stop_frozen_gradients(run.optimizer, params)
      return stage.loss(params, frozen, state, batch, key, True)

    (value, (new_state, values)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    gradient = jax.lax.with_sharding_constraint(gradient, shardings)
    return value, gradient, new_state, values

  def whole(params, frozen, state, batch, key):
    value, gradient, state, values = piece_gradient(params, frozen, state, batch, key)
    return LossAndGradient(numbers({**values, 'loss': value}), gradient, state)

  def accumulated(params, frozen, state, batch, key):
    def add(carry, batch):
      total, state = carry
      value, gradient, state, values = piece_gradient(params, frozen, state, batch, key)
      loss = values.get('loss', Mean(value, jnp.ones([])))
      total = jax.tree.map(lambda t, g: t + loss.weight * g, total, gradient)
      return (total, state), {**values, 'loss': loss}

    zeros = jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, params), shardings)
    (total, state), values = scan_pieces(add, layout, run.mesh)((zeros, state), batch)
    values = combine(values)
    weight = jnp.maximum(values['loss'].weight, MIN_WEIGHT)
    gradient = jax.tree.map(lambda t: t / weight, total)
    values['loss'] = values['loss'].total / weight
    return LossAndGradient(numbers(values), gradient, state)

  return whole if layout.accumulate == 1 else accumulated


def _keep_finite(new: Tree, old: Tree) -> Tree:
  """`new`, with the old number wherever the new one is not finite.

  Number by number: to wait until all are known would take the memory of a second set of parameters.
  """
  return jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(new), new, old), new, old)


def _update_average(run: Run, ema: Tree, params: Tree, old: Any, new: Any, step: Array) -> Tree:
  """The averages after a step that turned the stage's state from `old` into `new`."""
  decay = run.optimizer.ema_decay
  average = run.stage.average
  if average is None:
    return optimizer.ema_update(ema, params, decay, step)
  moved = optimizer.ema_update(ema, average.join(params, new), decay, step)
  return average.restart(moved, old, new)


def all_finite(tree: Tree) -> Array:
  """Whether every floating-point number of a tree is finite, bool[]."""
  flags = [
    jnp.isfinite(x).all() for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)
  ]
  return jnp.stack(flags).all() if flags else jnp.ones([], bool)
