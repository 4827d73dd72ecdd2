"""The Fréchet distance between two sets of features (Heusel et al. 2017, section 2)."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass
class FeatureSums:
  """What the mean and the covariance of features are computed from, in float64.

  Attributes:
    count: the number of features.
    total: f64[D], their sum.
    products: f64[D, D], the sum of their outer products.
  """

  count: int
  total: np.ndarray
  products: np.ndarray

  @classmethod
  def zeros(cls, size: int) -> FeatureSums:
    """Sums of no features of width `size`."""
    return cls(0, np.zeros(size), np.zeros((size, size)))

  def add(self, features: np.ndarray) -> None:
    """Adds features [B, D]."""
    features = np.asarray(features, np.float64)
    self.count += len(features)
    self.total += features.sum(0)
    self.products += features.T @ features

  def mean(self) -> np.ndarray:
    """f64[D]."""
    return self.total / self.count

  def covariance(self) -> np.ndarray:
    """f64[D, D], without bias: divided by `count` - 1."""
    mean = self.mean()
    return (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)


def frechet_distance(a: FeatureSums, b: FeatureSums) -> float:
  """|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)), with the covariances A and B.

  A B has the eigenvalues of the symmetric A^(1/2) B A^(1/2), so that no root of an asymmetric
  matrix is needed. At least two features are needed on each side.
  """
  difference = a.mean() - b.mean()
  covariance_a = a.covariance()
  covariance_b = b.covariance()
  values, vectors = np.linalg.eigh(covariance_a)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  shared = np.linalg.eigvalsh(root @ covariance_b @ root)
  spread = np.trace(covariance_a) + np.trace(covariance_b)
  return float(difference @ difference + spread - 2 * np.sqrt(np.maximum(shared, 0)).sum())
