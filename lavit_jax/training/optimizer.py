"""The optimizer: AdamW with a schedule (schedule.py), clipping, and per-parameter freezing and learning rates by regex.

A parameter is known by its '/'-joined path, such as `tokenizer/selector/fc1/kernel`; regexes are searched, so '^vit/' means
the part and 'kernel$' the leaf.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lavit_jax.errors import UserError
from lavit_jax.sharding import path_name
from lavit_jax.training.schedule import learning_rate


def make_optimizer(config, num_steps: int, params, hold=()) -> optax.GradientTransformation:
  """Builds the optimizer of one run.

  Args:
    config: the page's `optim`: the options of schedule.learning_rate, weight_decay (on kernels only), b1, b2,
      mu_dtype, nu_dtype (of the moments: bfloat16 halves each), clip_norm (global, None = off), freeze (regexes), lr_scale ((regex,
      factor) pairs, the first match counts).
    num_steps: where the cosine ends.
    params: the parameters, or their shapes.
    hold: (regex, step) pairs; the parameters stop moving, decay included, once `step` updates were made.

  Raises:
    UserError: a regex is malformed or names no parameter, or the second moment moves too slowly for bfloat16.
  """
  names = jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), params)
  known = jax.tree.leaves(names)
  for option, regexes in dict(
    freeze=config.freeze, lr_scale=[r for r, _ in config.lr_scale], hold=[r for r, _ in hold]
  ).items():
    for regex in regexes:
      _check(option, regex, known)

  def match(regex):
    return jax.tree.map(lambda name: bool(re.search(regex, name)), names)

  def scale(name):
    return next((factor for regex, factor in config.lr_scale if re.search(regex, name)), 1.0)

  holds = [hold_from(match(regex), step) for regex, step in hold]
  trained = optax.chain(
    *holds,  # before the clipping, so that what no longer moves does not count in the norm
    optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
    adam(config),
    optax.add_decayed_weights(config.weight_decay, mask=match('kernel$')),
    scaled(jax.tree.map(scale, names)),
    optax.scale_by_learning_rate(learning_rate(config, num_steps)),
    *holds,  # and after Adam and the decay, which move what has no gradient
  )
  frozen = jax.tree.map(lambda name: any(re.search(regex, name) for regex in config.freeze), names)
  labels = jax.tree.map(lambda f: 'frozen' if f else 'trained', frozen)
  return optax.partition({'trained': trained, 'frozen': optax.set_to_zero()}, labels)


def stop_frozen_gradients(config, params):
  """`params` with no gradient to those that `config.freeze` names, so that none is computed."""

  def stop(path, x):
    frozen = any(re.search(regex, path_name(path)) for regex in config.freeze)
    return jax.lax.stop_gradient(x) if frozen else x

  return jax.tree_util.tree_map_with_path(stop, params)


def adam(config) -> optax.GradientTransformation:
  """`optax.scale_by_adam`, whose second moment may be kept in `config.nu_dtype` too; all arithmetic with it is in float32.

  Raises:
    UserError: bfloat16 at a `b2` above 0.99: of a step that changes a number by less than 1 in 512, rounding leaves nothing.
  """
  if config.nu_dtype == 'bfloat16' and config.b2 > 0.99:
    raise UserError(
      f"optim.nu_dtype='bfloat16' needs optim.b2 of at most 0.99, not {config.b2}: slower averages stand still in it"
    )
  inner = optax.scale_by_adam(config.b1, config.b2, eps=1e-8, mu_dtype=config.mu_dtype)

  def kept(state, dtype):
    return state._replace(nu=optax.tree.cast(state.nu, dtype))

  def update(updates, state, params=None):
    updates, state = inner.update(updates, kept(state, jnp.float32), params)
    return updates, kept(state, config.nu_dtype)

  return optax.GradientTransformation(
    lambda params: kept(inner.init(params), config.nu_dtype), update
  )


class HoldState(NamedTuple):
  """Updates made so far, i32[]."""

  count: jax.Array


def hold_from(mask, step: int) -> optax.GradientTransformation:
  """Zeroes the updates of the masked leaves from the `step`-th update (counted from 0) on."""

  def init(_):
    return HoldState(jnp.zeros([], jnp.int32))

  def update(updates, state, params=None):
    del params
    live = state.count < step
    updates = map_masked(lambda u, m: jnp.where(live, u, 0) if m else u, updates, mask)
    return updates, HoldState(state.count + 1)

  return optax.GradientTransformation(init, update)


def scaled(factors) -> optax.GradientTransformation:
  """Multiplies each leaf of the updates by its own constant."""
  return optax.stateless(
    lambda updates, _: map_masked(lambda u, f: u if f == 1.0 else f * u, updates, factors)
  )


def map_masked(fn, updates, tree):
  """`fn(update, leaf of tree)`, leaving alone what `optax.partition` has masked out."""
  return jax.tree.map(
    lambda u, x: u if isinstance(u, optax.MaskedNode) else fn(u, x),
    updates,
    tree,
    is_leaf=lambda x: isinstance(x, optax.MaskedNode),
  )


def ema_update(ema, params, decay: float, step: jax.Array):
  """Moving average of the parameters; early on it follows faster: decay at most (1 + step) / (10 + step)."""
  decay = jnp.minimum(decay, (1 + step) / (10 + step))
  return jax.tree.map(
    lambda e, p: e + (1 - decay) * (p - e), ema, params
  )  # what stands still has itself as its average, to the bit


def _check(option: str, regex: str, names) -> None:
  try:
    found = any(re.search(regex, name) for name in names)
  except re.error as error:
    raise UserError(f'optim.{option}: {regex!r} is not a regular expression ({error})') from None
  if not found:
    parts = sorted({'/'.join(name.split('/')[:2]) for name in names})
    raise UserError(
      f'optim.{option}: {regex!r} matches no parameter; they begin with {", ".join(parts)}'
    )
