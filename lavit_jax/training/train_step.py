"""One step of a training: the loss and gradient of a batch, in one piece or several, and the update
of the parameters.

The result does not depend on `accumulate`: pieces count by what their means are means over (tokens,
pairs), and what is random about
an example depends on its row in the batch. An update that is not finite is skipped.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lavit_jax import sharding
from lavit_jax.training import metrics, optimizer
from lavit_jax.training.keys import Purpose, key_for
from lavit_jax.training.stage import ROW, Mean, Sum


class TrainState(NamedTuple):
  """All that a step changes: `step` i32[] steps made; `state` what the stage carries besides
  parameters; `ema` {} if it is off.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  state: Any
  ema: Any


def make_init(config, stage, parts):
  """-> (init(key, parts) -> TrainState, the optimizer)."""
  params, _ = jax.eval_shape(stage.init, jax.random.key(0), parts)
  hold = stage.hold if stage.hold_of is None else stage.hold_of(parts)
  tx = optimizer.make_optimizer(config.optim, config.num_steps, params, hold)

  def init(key, parts):
    params, state = stage.init(key, parts)
    ema = {}
    if config.optim.ema_decay:
      ema = jax.tree.map(jnp.copy, stage.average.join(params, state) if stage.average else params)
    return TrainState(jnp.zeros([], jnp.int32), params, tx.init(params), state, ema)

  return init, tx


def averaged(stage, train_state: TrainState) -> tuple[Any, Any]:
  """(params, state) to evaluate and to export: the averages, with the state that belongs to them,
  or the latest where there are none.
  """
  if not train_state.ema:
    return train_state.params, train_state.state
  if stage.average is None:
    return train_state.ema, train_state.state
  return stage.average.part(train_state.ema, train_state.state)


def in_pieces(function, pieces: int, shards: int, mesh):
  """`function(carry, batch) -> (carry, values)` on a batch in `pieces`, one after the other:
  (carry, batch) -> (carry, values [pieces]).

  Of each shard's examples an equal share goes into each piece, so none is sent. A piece's batch
  says under ROW which rows it has.
  """

  def split(x):
    """[B, ...] -> [pieces, B / pieces, ...]."""
    x = jnp.moveaxis(x.reshape(shards, pieces, -1, *x.shape[1:]), 1, 0)
    return jax.lax.with_sharding_constraint(
      x.reshape(pieces, -1, *x.shape[3:]), NamedSharding(mesh, P(None, *sharding.BATCH))
    )

  def run(carry, batch):
    size = len(jax.tree.leaves(batch)[0])
    batch = {**batch, ROW: jnp.arange(size, dtype=jnp.int32)}
    return jax.lax.scan(function, carry, jax.tree.map(split, batch))

  return run


def combine(values: dict) -> dict:
  """The metrics of the pieces [pieces] -> of the batch: sums are added, means are weighted, what
  has no number (nan) is left out.
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


def numbers(values: dict) -> dict:
  """Sums and means as plain numbers; a mean over nothing is nan: that is what it is."""
  plain = {}
  for name, value in values.items():
    if isinstance(value, Sum):
      value = value.total
    elif isinstance(value, Mean):
      value = value.total / value.weight
    plain[name] = value
  return plain


def loss_and_metrics(stage, pieces: int, shards: int, mesh):
  """(params, frozen, state, batch, key) -> metrics of a batch that nothing is learnt from, computed
  in as many pieces as in training.
  """

  def whole(params, frozen, state, batch, key):
    value, (_, values) = stage.loss(params, frozen, state, batch, key, False)
    return dict(
      loss=value, **{name: value for name, value in values.items() if name != 'loss'}
    ), values.get('loss')

  def run(params, frozen, state, batch, key):
    if pieces == 1:
      return numbers(whole(params, frozen, state, batch, key)[0])

    def piece(carry, batch):
      values, loss = whole(params, frozen, state, batch, key)
      if loss is not None:
        values['loss'] = loss
      return carry, values

    _, values = in_pieces(piece, pieces, shards, mesh)((), batch)
    return numbers(combine(values))

  return run


def make_train_step(config, stage, tx, places, mesh):
  """jit of (TrainState, frozen parts, batch) -> (TrainState, metrics); the old state's memory
  becomes the new one's.

  With `config.accumulate` > 1 the batch goes through in that many pieces, whose gradients are
  added, each by the weight of its loss: less
  memory, the same update.

  Where the loss, the gradient or the new state is not finite, the update is skipped (metric
  `nonfinite` 1): parameters, moments, averages
  and state stay, and the next step has the next batch. So does a single parameter that would
  overflow: none is ever not finite.
  """
  rate = optimizer.learning_rate(config.optim, config.num_steps)
  pieces, shards = config.accumulate, sharding.batch_shards(mesh)

  def gradient_of(params, frozen, state, batch, key):
    def loss(params):
      return stage.loss(
        optimizer.stop_frozen_gradients(config.optim, params), frozen, state, batch, key, True
      )

    (value, (state, values)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    gradient = jax.lax.with_sharding_constraint(gradient, places.params)
    return value, gradient, state, values

  def whole(params, frozen, state, batch, key):
    value, gradient, state, values = gradient_of(params, frozen, state, batch, key)
    return gradient, state, numbers({**values, 'loss': value})

  def accumulated(params, frozen, state, batch, key):
    def add(carry, batch):
      total, state = carry
      value, gradient, state, values = gradient_of(params, frozen, state, batch, key)
      loss = values.get('loss', Mean(value, jnp.ones([])))
      total = jax.tree.map(lambda t, g: t + loss.weight * g, total, gradient)
      return (total, state), {**values, 'loss': loss}

    zeros = jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, params), places.params)
    (total, state), values = in_pieces(add, pieces, shards, mesh)((zeros, state), batch)
    values = combine(values)
    weight = values['loss'].weight
    gradient = jax.tree.map(lambda t: t / jnp.maximum(weight, 1e-6), total)
    values['loss'] = values['loss'].total / jnp.maximum(
      weight, 1e-6
    )  # as the stage's own: 0 of a batch without a target
    return gradient, state, numbers(values)

  def follow(ema, params, old, new, step):
    """The averages after a step that turned the stage's state from `old` into `new`."""
    if stage.average is None:
      return optimizer.ema_update(ema, params, config.optim.ema_decay, step)
    moved = optimizer.ema_update(ema, stage.average.join(params, new), config.optim.ema_decay, step)
    return stage.average.settle(moved, old, new)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(places, NamedSharding(mesh, P())))
  def train_step(train_state, frozen, batch):
    step, params, opt_state, state, ema = train_state
    key = jax.random.fold_in(key_for(config.seed, Purpose.STEPS), step)
    gradient, new_state, values = (whole if pieces == 1 else accumulated)(
      params, frozen, state, batch, key
    )
    grad_norm = optax.global_norm(gradient)
    fine = (
      jnp.isfinite(values['loss']) & jnp.isfinite(grad_norm) & all_finite(new_state)
    )  # then the moments are finite too

    def choose(new, old):
      return jax.tree.map(lambda new, old: jnp.where(fine, new, old), new, old)

    updates, new_opt_state = tx.update(gradient, opt_state, params)
    updated = choose(optax.apply_updates(params, updates), params)
    # Number by number, for to wait until all are known would take the memory of a second set of parameters.
    new_params = jax.tree.map(
      lambda new, old: jnp.where(jnp.isfinite(new), new, old), updated, params
    )
    new_state = choose(new_state, state)
    if config.optim.ema_decay:
      ema = choose(follow(ema, new_params, state, new_state, step), ema)
    skipped = 1.0 - (fine & all_finite(updated))
    loss = dict(loss=values.pop('loss'))
    values = loss | values | dict(grad_norm=grad_norm, learning_rate=rate(step), nonfinite=skipped)
    return TrainState(
      step + 1, new_params, choose(new_opt_state, opt_state), new_state, ema
    ), values

  return train_step


def all_finite(tree) -> jax.Array:
  """Whether every floating number of a tree is finite, bool[]."""
  flags = [
    jnp.isfinite(x).all() for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)
  ]
  return jnp.stack(flags).all() if flags else jnp.ones([], bool)
