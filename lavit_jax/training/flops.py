"""Floating-point operations: of a traced function, and of the published model in one training step.

(XLA's own cost analysis counts the body of a loop once, so scanned layers would be missed.)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lavit_jax import sharding
from lavit_jax.data import mixtures
from lavit_jax.models import lavit
from lavit_jax.models.initial import initial_parts
from lavit_jax.models.lavit import Lavit
from lavit_jax.training import optim, stages
from lavit_jax.training.stage import apply, features

ONE_CPU = AbstractMesh((1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=AbstractDevice('cpu', 1, 'cpu'))


class StepFlops(NamedTuple):
  """What the model needs for one step: whatever is in the batch, and of the slots of packed rows if all hold a token."""

  fixed: float
  slots: float = 0.0

  def at(self, packed_share: float) -> float:
    """If `packed_share` of the slots hold a token."""
    return self.fixed + packed_share * self.slots


class Pair(NamedTuple):
  """What one pair and one packed row take in the language model's step."""

  see: float  # the encoder and the selector, of a picture
  code: float  # its codes
  read: float  # its continuous features, and their gradient
  row: float  # products of the language model and their gradients, without attention
  scores: float  # attention of a slot to one other, and its gradient


def of_step(config) -> StepFlops:
  """Of one step of a training: each product of the model once forward and, where it is trained, its gradients.

  So 6 operations for each parameter and token that are trained, 2 where they are frozen. What the program does besides does not count:
  rematerialisation; in the language model's stage empty slots, attention to later tokens and to other pairs, and what a kind of pair has no
  use for: the picture of plain text, the codes of one that is read, the features of one that is drawn. Of the kinds there are as many as
  `data` leads one to expect, and pairs are as long as `lm.mean_length` says.
  """
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.update(remat='none', accumulate=1)
  with jax.sharding.use_abstract_mesh(ONE_CPU):
    model = lavit.build(config.variant, config.dtype)
    if config.stage != 'lm':
      return StepFlops(traced(config, model))
    pair, c = of_pair(config, model), config.lm
  read, drawn, text = mixtures.kind_shares(config.data.shares, config.data.sources)
  towers = (1 - text) * pair.see + drawn * pair.code + read * pair.read
  row = pair.row + c.row_length * pair.scores * (c.mean_length + 1) / 2
  return StepFlops(float(config.batch_size * towers), c.num_rows * row)


def expected_share(config) -> float:
  """The share of the slots of packed rows that hold a token, if pairs are of `lm.mean_length`; 1 where nothing is packed."""
  return min(1.0, config.batch_size * config.lm.mean_length / stages.tokens(config)) if config.stage == 'lm' else 1.0


def traced(config, model: Lavit) -> float:
  """Of a stage's loss and gradient as they are computed, whatever they are needed for."""
  stage = stages.build(config, model, 1)
  parts, batch = stages.abstract_inputs(config, model, stage)
  params, state = jax.eval_shape(stage.init, jax.random.key(0), parts)
  frozen = {name: parts[name] for name in stage.needs}

  def step(params, frozen, state, batch):
    return jax.grad(lambda params: stage.loss(optim.stop_frozen(config.optim, params), frozen, state, batch, jax.random.key(0), True),
                    has_aux=True)(params)

  return count(jax.make_jaxpr(step)(params, frozen, state, batch))


def of_pair(config, model: Lavit) -> Pair:
  """The parts of the language model's step, traced one by one."""
  parts = jax.eval_shape(lambda: initial_parts(model, jax.random.key(0), ('vit', 'tokenizer', 'understanding', 'llama')))
  side, length, llama = model.image_size, config.lm.row_length, model.llama
  image, slots = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8), jax.ShapeDtypeStruct((1, length), jnp.int32)
  x = jax.eval_shape(lambda p, image: features(model, p, image)[:, 1:], parts['vit'], image)
  keep = jax.ShapeDtypeStruct(x.shape[:2], jnp.float32)

  def of(name, function, *inputs):
    return count(jax.make_jaxpr(function)(parts[name], *inputs))

  def code(p, x, keep):
    return apply(model.tokenizer, p, apply(model.tokenizer, p, x, keep, method='merge'), method='quantize')

  def read(p, x, keep):
    return apply(model.understanding, p, x, keep).astype(jnp.float32).sum()

  def row(p, ids):
    hidden, _ = apply(llama, p, apply(llama, p, ids, method='embed'), ids, ids)
    return apply(llama, p, hidden, method='logits')

  def select(p, x):
    return apply(model.tokenizer, p, x, method='select')

  scores = 2 * 2 * llama.num_heads * llama.head_dim * llama.num_layers  # two products
  return Pair(
      see=of('vit', lambda p, image: features(model, p, image), image) + of('tokenizer', select, x),
      code=of('tokenizer', code, x, keep), read=of('understanding', jax.grad(read), x, keep),
      row=3 * (of('llama', row, slots) - length**2 * scores), scores=3 * scores)


def count(jaxpr) -> float:
  """Multiplications and additions in the products and convolutions of a (closed) jaxpr, recomputation by remat included.

  A `while` counts as one round, and of the branches of a `cond` the cheapest counts: the dear one is the exception (k-means).
  """
  return float(sum(_equation(equation) for equation in getattr(jaxpr, 'jaxpr', jaxpr).eqns))


def _equation(equation) -> float:
  params = equation.params
  if equation.primitive.name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * inner * math.prod(equation.outvars[0].aval.shape)
  if equation.primitive.name == 'conv_general_dilated':
    kernel, (out_features, *_) = equation.invars[1].aval.shape, params['dimension_numbers'].rhs_spec
    return 2 * math.prod(kernel) // kernel[out_features] * math.prod(equation.outvars[0].aval.shape)
  if equation.primitive.name == 'cond':
    return min(count(branch) for branch in params['branches'])
  rounds = params['length'] if equation.primitive.name == 'scan' else 1
  return rounds * sum(count(inner) for inner in jaxprs_in_params(params))
