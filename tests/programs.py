"""Functions under test as single programs."""

from collections.abc import Callable
from typing import Any

import jax


def compiled(function: Callable, *static: str, **options: Any) -> Callable:
  """`function` as one program whose results are NumPy arrays.

  Called operation by operation, each operation and each shape is a program of its own, of some
  twenty milliseconds; so is each operation on its results.

  Args:
    function: of arrays and pytrees.
    static: names of the arguments that are no arrays.
    options: of `jax.jit`.
  """
  program = jax.jit(function, static_argnames=static, **options)
  return lambda *args, **kwargs: jax.device_get(program(*args, **kwargs))
