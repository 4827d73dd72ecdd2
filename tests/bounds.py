"""How far a right answer may be from the exact one: bounds that follow from float arithmetic, on any machine.

CPUs with wider vectors, other BLAS libraries and other compilers add the terms of a sum in other orders, with and without fused
multiplications. A tolerance that was read off one of them is too small for another.
"""

import numpy as np


def sum_error(absolute: np.ndarray, terms: int, dtype=np.float32) -> np.ndarray:
  """The error that a sum of `terms` products may have in `dtype`, in whatever order they are added.

  Each addition rounds a partial sum, and so errs by at most eps / 2 of the sum of absolute terms. Roundings are as often up as down, so n
  of them add up to sqrt(n) times one (Higham & Mary 2019, A new approach to probabilistic rounding error analysis): eps * sqrt(n) is more
  than three deviations of the worst case, in which all terms have one sign and are added one after the other. The 2 stands for the roundings of
  the products and of what the result is multiplied by.

  Args:
    absolute: float64, the sum of the terms' absolute values.
  """
  return (np.sqrt(terms) + 2) * float(np.finfo(dtype).eps) * np.asarray(absolute, np.float64)


def assert_product(got, x, kernel, inexact: float = 0.0) -> None:
  """`got` [..., N, O] is x [..., N, I] by kernel [I, O], of which the latter two are numbers exact as they stand.

  `inexact`: relative error of the terms themselves, when they come out of float32 computations.
  """
  x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  absolute = np.abs(x) @ np.abs(kernel)
  assert_within(got, x @ kernel, sum_error(absolute, x.shape[-1]) + inexact * absolute)


def assert_within(got, expected, error) -> None:
  """|got - expected| <= error, element by element; says by how much it is missed."""
  got, expected, error = np.broadcast_arrays(np.asarray(got, np.float64), np.asarray(expected, np.float64), error)
  difference = np.abs(got - expected)
  over = ~(difference <= error)  # NaN is too far
  if over.any():
    place = np.unravel_index(np.argmax(np.where(over, difference / np.maximum(error, 1e-300), 0)), got.shape)
    raise AssertionError(f'{over.sum()} of {over.size} are out of bounds; at {tuple(map(int, place))} {got[place]} is {difference[place]:.3g} from '
                         f'{expected[place]}, and may be {error[place]:.3g}')
