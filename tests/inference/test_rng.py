"""Random keys follow the row, and differ by purpose."""

import jax
import numpy as np
import pytest

from lavit_jax.errors import UserError
from lavit_jax.inference.rng import (
  IndexedSeed,
  Purpose,
  example_keys,
  optional_keys,
  purpose_keys,
  sample_keys,
)


@pytest.mark.parametrize(
  'seed', [-1, 2**32, 1.5, '1', True, [0, -1], [0, 0.5], [0, None], IndexedSeed(-1, [0, 1])]
)
def test_invalid_seeds(seed):
  with pytest.raises(
    UserError, match=r'seed=.* is not allowed; choose a whole number in 0..4294967295'
  ):
    example_keys(seed, 2)


def test_seeds_of_any_integer_type():
  data = jax.random.key_data(example_keys(3, 2))
  for seed in (np.int64(3), np.array(3), jax.numpy.int32(3)):
    np.testing.assert_array_equal(jax.random.key_data(example_keys(seed, 2)), data)
  assert example_keys(2**32 - 1, 2).shape == (2,) and example_keys(0, 0).shape == example_keys(
    [], 0
  ).shape == (0,)


def test_keys_follow_the_row_and_differ_by_purpose():
  data = jax.random.key_data
  keys = example_keys(3, 4)
  np.testing.assert_array_equal(
    data(example_keys(IndexedSeed(3, [2, 0]), 2)), data(keys)[np.array([2, 0])]
  )
  several = [sample_keys(purpose, keys, 3) for purpose in Purpose]
  every = np.concatenate([data(purpose_samples) for purpose_samples in several])
  assert len(np.unique(every, axis=0)) == len(every) == 36
  np.testing.assert_array_equal(
    data(several[1]).reshape(4, 3, -1)[:, 0], data(sample_keys(Purpose.TOKENS, keys, 1))
  )
  np.testing.assert_array_equal(
    data(several[0]).reshape(4, 3, -1)[:, 2], data(purpose_keys(Purpose.PATCHES, keys, 2))
  )


def test_no_seed():
  assert optional_keys(None, 4) is None
  with pytest.raises(UserError, match='random sampling needs a seed'):
    example_keys(None, 4)
