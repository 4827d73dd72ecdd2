"""Floating-point operations: of a traced function, and of the published model in one training step.

(XLA's own cost analysis counts the body of a loop once, so scanned layers would be missed.)
"""

from __future__ import annotations

import math

import jax
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from lavit_jax import sharding
from lavit_jax.models import lavit
from lavit_jax.training import optim, stages

ONE_CPU = AbstractMesh((1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=AbstractDevice('cpu', 1, 'cpu'))


def model_flops(config) -> float:
  """Of one step of a training: each product of the model once forward and, where it is trained, its gradients.

  So 6 operations for each parameter and token that are trained, 2 where they are frozen. Nothing that the program does besides counts:
  rematerialisation, or the half of the language model's attention that causality forbids. All slots of a packed row count as tokens.
  """
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.update(remat='none', accumulate=1)
  with jax.sharding.use_abstract_mesh(ONE_CPU):
    model = lavit.build(config.variant, config.dtype)
    stage = stages.build(config, model, 1)
    parts, batch = stages.abstract_inputs(config, model, stage)
    params, state = jax.eval_shape(stage.init, jax.random.key(0), parts)
    frozen = {name: parts[name] for name in stage.needs}

    def step(params, frozen, state, batch):
      return jax.grad(lambda params: stage.loss(optim.stop_frozen(config.optim, params), frozen, state, batch, jax.random.key(0), True),
                      has_aux=True)(params)

    total = count(jax.make_jaxpr(step)(params, frozen, state, batch))
  if config.stage == 'lm':
    llama = model.llama
    scores = config.lm.num_rows * config.lm.row_length**2 * llama.num_heads * llama.head_dim * llama.num_layers
    total -= 3 * 4 * scores / 2
  return total


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
