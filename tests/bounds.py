"""How far a right answer may be from the exact one: bounds that follow from float arithmetic.

CPUs with wider vectors, other BLAS libraries and other compilers add the terms of a sum in other
orders, with and without fused multiplications. A tolerance that was read off one machine is too
small for another.
"""

import numpy as np


def sum_error(absolute: np.ndarray, terms: int, dtype=np.float32) -> np.ndarray:
  """The error that a sum of `terms` products may have in `dtype`, in whatever order they are added.

  Each addition rounds a partial sum, so it errs by at most eps / 2 of the sum of absolute terms.
  Roundings are as often up as down, so n of them add up to sqrt(n) times one (Higham & Mary 2019, A
  new approach to probabilistic rounding error analysis). eps * sqrt(n) is more than three
  deviations of the worst case, in which all terms have one sign and are added one after the other.
  The 2 stands for the roundings of the products and of what the result is multiplied by.

  Args:
    absolute: float64, the sum of the terms' absolute values.
  """
  return (np.sqrt(terms) + 2) * float(np.finfo(dtype).eps) * np.asarray(absolute, np.float64)


def assert_product(got, x, kernel) -> None:
  """`got` [..., N, O], computed in float32, is x [..., N, I] by kernel [I, O]."""
  x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  assert_within(got, x @ kernel, sum_error(np.abs(x) @ np.abs(kernel), x.shape[-1]))


def assert_within(got, expected, error) -> None:
  """|got - expected| <= error, element by element, compared in float64."""
  got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
  assert got.shape == expected.shape, f'{got.shape}, not {expected.shape}'
  difference, error = np.abs(got - expected), np.broadcast_to(error, got.shape)
  over = ~(difference <= error)  # NaN is too far
  if over.any():
    worst = np.argmax(np.where(over, difference / np.maximum(error, 1e-300), 0))
    place = tuple(map(int, np.unravel_index(worst, got.shape)))
    raise AssertionError(
        f'{over.sum()} of {over.size} are out of bounds; at {place} {got[place]} is '
        f'{difference[place]:.3g} from {expected[place]}, and may be {error[place]:.3g}')
