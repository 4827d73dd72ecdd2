"""The Fréchet distance against its formula with the eigenvalues of the asymmetric product."""

import numpy as np
import pytest

from lavit_jax.evaluation.frechet import FeatureSums, frechet_distance


def sums(features, parts=1):
  total = FeatureSums.zeros(features.shape[1])
  for part in np.array_split(features, parts):
    total.add(part)
  return total


@pytest.mark.parametrize('count', [200, 8], ids=['full rank', 'fewer than their width'])
def test_distance(count):
  random = np.random.default_rng(0)
  a = random.normal(size=(count, 12))
  b = 0.3 + random.normal(size=(count + 5, 12)) @ random.normal(size=(12, 12))
  covariances = [np.cov(x, rowvar=False) for x in (a, b)]
  shared = np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)
  expected = ((a.mean(0) - b.mean(0)) ** 2).sum()
  expected += np.trace(covariances[0] + covariances[1]) - 2 * np.sqrt(shared).real.sum()
  # The root of an eigenvalue that is 0 but for rounding has half the digits.
  tolerance = 1e-9 if count == 200 else 1e-5
  assert frechet_distance(sums(a), sums(b)) == pytest.approx(expected, rel=tolerance)


def test_equal_sets_have_no_distance():
  features = np.random.default_rng(1).normal(size=(50, 8)).astype(np.float32)
  assert abs(frechet_distance(sums(features), sums(features))) < 1e-9


def test_order_and_parts_do_not_matter():
  """30,000 features in eight parts, as in one, but for the rounding of float64."""
  features = np.random.default_rng(2).normal(size=(30000, 4)).astype(np.float32)
  whole = sums(features)
  parts = sums(features[::-1], parts=8)
  assert parts.count == whole.count == 30000
  np.testing.assert_allclose(parts.covariance(), whole.covariance(), atol=1e-11)
  np.testing.assert_allclose(whole.covariance(), np.cov(features, rowvar=False), atol=1e-9)
