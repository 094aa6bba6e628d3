"""The Frechet distance between two sets of features (Heusel et al. 2017, equation 6)."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from maskgen.errors import UserError

# Rows of a block: matrices [d, d] are added up for each, which takes longer than the product of a few rows.
_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """The Gaussian fitted to a set of features.

  Attributes:
    mean: float64 [d].
    covariance: float64 [d, d], the unbiased estimate.
    count: the number of features, if it is known.
  """

  mean: np.ndarray
  covariance: np.ndarray
  count: int | None = None


class Moments:
  """Fits a Gaussian to features that arrive in batches, in float64.

  Means and scatter matrices of blocks of rows are merged pairwise (Chan et al. 1979), which avoids the
  cancellation of sums of squares. Blocks are the same whatever the batches.
  """

  def __init__(self) -> None:
    self._count, self._mean, self._scatter = 0, np.zeros(()), np.zeros(())
    self._waiting: list[np.ndarray] = []  # less than a block

  def add(self, batch: np.ndarray) -> None:
    """Adds features [b, d]."""
    self._waiting.append(batch)
    if sum(map(len, self._waiting)) >= _BLOCK:
      rows = np.concatenate(self._waiting)
      *blocks, rest = (rows[start : start + _BLOCK] for start in range(0, len(rows) + 1, _BLOCK))
      for block in blocks:
        self._merge(block)
      self._waiting = [rest]

  def _merge(self, block: np.ndarray) -> None:
    block = block.astype(np.float64)
    block_mean = block.mean(axis=0)
    centred, shift = block - block_mean, block_mean - self._mean
    total = self._count + len(block)
    weight = self._count * len(block) / total
    self._scatter = self._scatter + centred.T @ centred + np.outer(shift, shift) * weight
    self._mean = self._mean + shift * (len(block) / total)
    self._count = total

  def gaussian(self) -> Gaussian:
    """The Gaussian of all features so far, at least two."""
    if any(map(len, self._waiting)):
      self._merge(np.concatenate(self._waiting))
      self._waiting = []
    return Gaussian(self._mean, self._scatter / (self._count - 1), self._count)


def fit(batches: Iterable[np.ndarray]) -> Gaussian:
  """Fits a Gaussian to features [b, d] that arrive in batches, at least two rows in all."""
  moments = Moments()
  for batch in batches:
    moments.add(batch)
  return moments.gaussian()


def distance(a: Gaussian, b: Gaussian) -> float:
  """The Frechet distance of two Gaussians; see `frechet_distance`."""
  return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
  """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), at least 0, in float64.

  The trace of the root is the sum of the singular values of R1' R2, where C = R R'. This also holds for
  singular covariances and needs no root of an unsymmetric product.

  Args:
    mean1: [d].
    cov1: [d, d], symmetric.
    mean2: [d].
    cov2: [d, d], symmetric.

  Raises:
    UserError: if the shapes do not fit, or a number is not finite.
  """
  mean1, cov1, mean2, cov2 = (np.asarray(x, np.float64) for x in (mean1, cov1, mean2, cov2))
  if mean1.ndim != 1 or mean2.shape != mean1.shape or not cov1.shape == cov2.shape == (len(mean1),) * 2:
    shapes = ", ".join(str(x.shape) for x in (mean1, cov1, mean2, cov2))
    raise UserError(f"means and covariances have shapes {shapes}: give [d], [d, d], [d], [d, d]")
  if not all(np.isfinite(x).all() for x in (mean1, cov1, mean2, cov2)):
    raise UserError("a mean or covariance contains values that are not finite: check the features")
  overlap = np.linalg.svd(_root(cov1).T @ _root(cov2), compute_uv=False).sum()
  squared = np.sum((mean1 - mean2) ** 2)
  return float(max(squared + np.trace(cov1) + np.trace(cov2) - 2 * overlap, 0.0))


def _root(covariance: np.ndarray) -> np.ndarray:
  """R with R R' = covariance, positive semi-definite up to rounding."""
  values, vectors = np.linalg.eigh(covariance)
  return vectors * np.sqrt(np.maximum(values, 0.0))
