"""The Frechet distance between two sets of features (Heusel et al. 2017, equation 6)."""

import dataclasses
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """The Gaussian fitted to a set of features.

  Attributes:
    mean: float64 [d].
    covariance: float64 [d, d], the unbiased estimate.
  """

  mean: np.ndarray
  covariance: np.ndarray


def fit(batches: Iterable[np.ndarray]) -> Gaussian:
  """Fits a Gaussian to features [b, d] that arrive in batches, at least two rows in all.

  Means and scatter matrices of the batches are merged pairwise (Chan et al. 1979), which avoids the
  cancellation of sums of squares.
  """
  count, mean, scatter = 0, np.zeros(()), np.zeros(())
  for batch in batches:
    if not len(batch):
      continue
    batch = batch.astype(np.float64)
    batch_mean = batch.mean(axis=0)
    centred, shift = batch - batch_mean, batch_mean - mean
    total = count + len(batch)
    scatter = scatter + centred.T @ centred + np.outer(shift, shift) * (count * len(batch) / total)
    mean = mean + shift * (len(batch) / total)
    count = total
  return Gaussian(mean, scatter / (count - 1))


def distance(a: Gaussian, b: Gaussian) -> float:
  """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), at least 0.

  The trace of the root is the sum of the singular values of R_a' R_b, where C = R R'. This also holds for
  singular covariances and needs no root of an unsymmetric product.
  """
  overlap = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False).sum()
  squared = np.sum((a.mean - b.mean) ** 2)
  return float(max(squared + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap, 0.0))


def _root(covariance: np.ndarray) -> np.ndarray:
  """R with R R' = covariance, positive semi-definite up to rounding."""
  values, vectors = np.linalg.eigh(covariance)
  return vectors * np.sqrt(np.maximum(values, 0.0))
