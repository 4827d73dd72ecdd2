"""The optimizer: AdamW with a schedule, clipping, and freezing and learning rates by regex.

A parameter is named by its '/'-joined path, such as `tokenizer/selector/fc1/kernel`; regexes are
searched, so '^vit/' means the module and 'kernel$' the array.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lavit_jax.errors import UserError
from lavit_jax.sharding import path_name
from lavit_jax.training.config import read_options
from lavit_jax.training.schedule import ScheduleConfig, learning_rate

Tree = Any
MUON_RMS = 0.2  # of an update, about that of Adam's
MAX_BFLOAT16_B2 = 0.99  # above it an update changes a number by less than bfloat16's rounding


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The section `optim` of the config."""

  schedule: ScheduleConfig
  weight_decay: float  # of kernels only
  b1: float
  b2: float
  mu_dtype: str  # of the first moment; bfloat16 halves its memory
  nu_dtype: str  # of the second moment
  clip_norm: float | None  # of the whole gradient, or of each of its groups; None: off
  freeze: tuple[str, ...]  # regexes of parameters that do not train
  lr_scale: tuple[tuple[str, float], ...]  # (regex, factor); the first match counts
  ema_decay: float = 0.0  # of the parameters' moving average; 0: off
  clip_groups: tuple[
    str, ...
  ] = ()  # regexes of groups clipped on their own; the first match counts
  max_nonfinite: int = 10  # updates skipped in a row after which a run ends
  muon: tuple[str, ...] = ()  # regexes of matrices that Muon updates in the place of Adam

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> OptimizerConfig:
    """Reads it from a config.

    Raises:
      UserError: `optim` lacks an option that has no default.
    """
    schedule = ScheduleConfig.from_config(config)
    options = read_options(cls, {**config['optim'], 'schedule': schedule}, 'optim')
    return dataclasses.replace(
      options,
      freeze=tuple(options.freeze),
      clip_groups=tuple(options.clip_groups),
      muon=tuple(options.muon),
      lr_scale=tuple((regex, factor) for regex, factor in options.lr_scale),
    )


class Hold(NamedTuple):
  """Parameters that do not move in some of the steps.

  Attributes:
    regex: of their names.
    start: the first update, counted from 0, that they miss.
    stop: the first one that they get again; None: never.
  """

  regex: str
  start: int = 0
  stop: int | None = None


def make_optimizer(
  config: OptimizerConfig, params: Tree, hold: Sequence[Hold] = ()
) -> optax.GradientTransformation:
  """Builds the optimizer of a run.

  Args:
    config: its options.
    params: the parameters, or their shapes.
    hold: parameters that do not move, decay included, in some of the steps.

  Raises:
    UserError: a regex is malformed or matches no parameter, or the second moment moves too slowly
      for bfloat16.
  """
  names = jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), params)
  _check_regexes('freeze', config.freeze, names)
  _check_regexes('clip_groups', config.clip_groups, names)
  _check_regexes('muon', config.muon, names)
  _check_regexes('lr_scale', [regex for regex, _ in config.lr_scale], names)
  _check_regexes('hold', [each.regex for each in hold], names)

  def matches(regex: str) -> Tree:
    return jax.tree.map(lambda name: bool(re.search(regex, name)), names)

  def scale(name: str) -> float:
    return next((factor for regex, factor in config.lr_scale if re.search(regex, name)), 1.0)

  def group(name: str) -> str:
    return next((regex for regex in config.clip_groups if re.search(regex, name)), '')

  holds = [hold_updates(hold, [matches(each.regex) for each in hold])] if hold else []
  trained = optax.chain(
    *holds,  # before the clipping: what no longer moves does not count in the norm
    clip_by_group(config.clip_norm, jax.tree.map(group, names)),
    _direction(config, names),
    optax.add_decayed_weights(config.weight_decay, mask=matches('kernel$')),
    scale_leaves(jax.tree.map(scale, names)),
    optax.scale_by_learning_rate(learning_rate(config.schedule)),
    *holds,  # and after Adam and the decay, which move what has no gradient
  )
  labels = jax.tree.map(lambda name: 'frozen' if _is_frozen(config, name) else 'trained', names)
  return optax.partition({'trained': trained, 'frozen': optax.set_to_zero()}, labels)


def _direction(config: OptimizerConfig, names: Tree) -> optax.GradientTransformation:
  """Adam, or Muon for the matrices that `config.muon` names."""
  if not config.muon:
    return adam(config)

  def label(name: str) -> str:
    return 'muon' if any(re.search(regex, name) for regex in config.muon) else 'adam'

  return optax.partition({'adam': adam(config), 'muon': muon()}, jax.tree.map(label, names))


def muon() -> optax.GradientTransformation:
  """`optax.contrib.scale_by_muon` of the last two axes, whose updates are as large as Adam's.

  So the learning rate and the decay are those of Adam (Liu et al. 2025, Muon is scalable for LLM
  training, section 2.2).
  """

  def axes(params: Tree) -> Tree:
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), params)

  def scale(updates: Tree, params: Tree) -> Tree:
    del params
    return jax.tree.map(lambda x: MUON_RMS * max(x.shape[-2:]) ** 0.5 * x, updates)

  return optax.chain(
    optax.contrib.scale_by_muon(weight_dimension_numbers=axes), optax.stateless(scale)
  )


def stop_frozen_gradients(config: OptimizerConfig, params: Tree) -> Tree:
  """`params` with no gradient to those that `config.freeze` matches, so that none is computed."""

  def stop(path, x):
    return jax.lax.stop_gradient(x) if _is_frozen(config, path_name(path)) else x

  return jax.tree_util.tree_map_with_path(stop, params)


def adam(config: OptimizerConfig) -> optax.GradientTransformation:
  """`optax.scale_by_adam`, whose second moment may be stored in bfloat16 too.

  All arithmetic with it is in float32.

  Raises:
    UserError: bfloat16 with a `b2` above 0.99: a step then changes a number by less than 1 in 512,
      of which rounding leaves nothing.
  """
  if config.nu_dtype == 'bfloat16' and config.b2 > MAX_BFLOAT16_B2:
    raise UserError(
      f"optim.nu_dtype='bfloat16' needs optim.b2 of at most {MAX_BFLOAT16_B2}, not {config.b2}: "
      'above this, updates are lost to rounding'
    )
  inner = optax.scale_by_adam(config.b1, config.b2, eps=1e-8, mu_dtype=config.mu_dtype)

  def cast(state, dtype):
    return state._replace(nu=optax.tree.cast(state.nu, dtype))

  def init(params):
    return cast(inner.init(params), config.nu_dtype)

  def update(updates, state, params=None):
    updates, state = inner.update(updates, cast(state, jnp.float32), params)
    return updates, cast(state, config.nu_dtype)

  return optax.GradientTransformation(init, update)


class HoldState(NamedTuple):
  """Updates made so far, i32[]."""

  count: jax.Array


def hold_updates(holds: Sequence[Hold], masks: Sequence[Tree]) -> optax.GradientTransformation:
  """Zeroes the updates of parameters in the steps of their holds.

  The state is one count, so that a checkpoint does not depend on the number of holds.

  Args:
    holds: at least one.
    masks: of the parameters of each.
  """

  def init(params):
    del params
    return HoldState(jnp.zeros([], jnp.int32))

  def update(updates, state, params=None):
    del params
    for hold, mask in zip(holds, masks, strict=True):
      moves = state.count < hold.start
      if hold.stop is not None:
        moves |= state.count >= hold.stop

      def zero(u, masked, moves=moves):
        return jnp.where(moves, u, 0) if masked else u

      updates = _map_unmasked(zero, updates, mask)
    return updates, HoldState(state.count + 1)

  return optax.GradientTransformation(init, update)


def clip_by_group(max_norm: float | None, groups: Tree) -> optax.GradientTransformation:
  """Scales the gradient of each group to a norm of at most `max_norm`.

  Args:
    max_norm: None does not clip.
    groups: the name of each leaf's group.
  """
  if not max_norm:
    return optax.identity()
  clip = optax.clip_by_global_norm(max_norm)

  def update(updates, _):
    gradients, structure = jax.tree.flatten(updates)
    names = jax.tree.leaves(_map_unmasked(lambda _, name: name, updates, groups))
    for name in dict.fromkeys(names):
      members = [i for i, other in enumerate(names) if other == name]
      clipped, _ = clip.update([gradients[i] for i in members], optax.EmptyState())
      for i, gradient in zip(members, jax.tree.leaves(clipped), strict=True):
        gradients[i] = gradient
    return jax.tree.unflatten(structure, gradients)

  return optax.stateless(update)


def scale_leaves(factors: Tree) -> optax.GradientTransformation:
  """Multiplies each leaf of the updates by its own constant."""
  return optax.stateless(
    lambda updates, _: _map_unmasked(
      lambda u, factor: u if factor == 1.0 else factor * u, updates, factors
    )
  )


def ema_update(ema: Tree, params: Tree, decay: float, step: jax.Array) -> Tree:
  """The moving average of the parameters after a step.

  Early on it follows faster: the decay is at most (1 + step) / (10 + step). A parameter that does
  not move has itself as its average, to the bit.
  """
  share = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
  return jax.tree.map(lambda e, p: e + share * (p - e), ema, params)


def _is_frozen(config: OptimizerConfig, name: str) -> bool:
  return any(re.search(regex, name) for regex in config.freeze)


def _map_unmasked(function: Callable[[Any, Any], Any], updates: Tree, tree: Tree) -> Tree:
  """`function(update, leaf of tree)` of all that `optax.partition` has not masked out."""

  def is_masked(x):
    return isinstance(x, optax.MaskedNode)

  def apply(u, x):
    return u if is_masked(u) else function(u, x)

  return jax.tree.map(apply, updates, tree, is_leaf=is_masked)


def _check_regexes(option: str, regexes: Iterable[str], names: Tree) -> None:
  """Raises UserError if one is malformed or matches no parameter."""
  leaves = jax.tree.leaves(names)
  for regex in regexes:
    try:
      matched = any(re.search(regex, name) for name in leaves)
    except re.error as error:
      raise UserError(f'optim.{option}: {regex!r} is not a regular expression ({error})') from None
    if not matched:
      prefixes = sorted({'/'.join(name.split('/')[:2]) for name in leaves})
      raise UserError(
        f'optim.{option}: {regex!r} matches no parameter; they begin with {", ".join(prefixes)}'
      )
