"""Floating-point operations of a traced function: matrix products and convolutions, a scan's body times its length.

(XLA's own cost analysis counts the body of a loop once, so scanned layers would be missed.)
"""

from __future__ import annotations

import math

from jax.extend.core import jaxprs_in_params


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
