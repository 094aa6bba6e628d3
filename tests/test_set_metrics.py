"""Metrics of sets of features against their definitions, written out."""

import numpy as np
import pytest

from maskgen.errors import UserError
from maskgen.evaluators import frechet_distance, set_metrics

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(60, 5)), RNG.normal(0.5, 1.2, size=(50, 5))


def test_precision_recall_density_and_coverage_in_three_loops():
  def radii(x):
    return [sorted(np.linalg.norm(x - row, axis=1))[4] for row in x]

  distances = np.linalg.norm(A[:, None] - B, axis=2)
  in_real = distances < radii(B)
  expected = {
    "precision": in_real.any(axis=1).mean(),
    "recall": (radii(A) > distances.T).any(axis=1).mean(),
    "density": in_real.sum(axis=1).mean() / 4,
    "coverage": in_real.any(axis=0).mean(),
  }
  assert set_metrics.manifold_metrics(A, B, k=4, strict=True) == pytest.approx(expected)


def test_samples_on_the_surface_of_a_ball():
  line = np.arange(4.0)[:, None]
  for strict, precision in ((True, 0.5), (False, 1.0)):
    found = set_metrics.manifold_metrics(np.array([[-1.0], [4.0], [0.5], [1.5]]), line, k=1, strict=strict)
    assert found["precision"] == precision


def test_copies_are_their_own_neighbours():
  twice = np.repeat(np.arange(8.0), 2)[:, None]
  found = set_metrics.manifold_metrics(twice + 0.5, twice, k=1, strict=True)
  assert found["precision"] == found["coverage"] == 0.0  # every ball has radius 0


def test_kid_of_whole_sets_is_the_unbiased_estimate():
  def kernel(x, y):
    return (x @ y.T / 5 + 1) ** 3

  a, b = A[:50], B
  off = ~np.eye(50, dtype=bool)
  expected = kernel(a, a)[off].mean() + kernel(b, b)[off].mean() - 2 * kernel(a, b).mean()
  found = set_metrics.kid(a, b, subsets=3, size=50)
  np.testing.assert_allclose(found.mean, expected)
  assert found.std < 1e-12


def test_inception_score_of_certain_predictions_is_the_number_of_classes():
  logits = 100.0 * np.eye(8)[np.arange(800) // 100]  # sorted by class
  assert set_metrics.inception_score(logits, splits=1).mean == pytest.approx(8)
  assert set_metrics.inception_score(logits).mean > 7.5
  assert set_metrics.inception_score(logits, splits=8, seed=None).mean == pytest.approx(1)
  assert set_metrics.inception_score_in_slices(logits, 400) == pytest.approx(4)
  assert set_metrics.inception_score_in_slices(logits[:500], 400) == pytest.approx(2.5)  # a shorter tail


def test_too_few_samples_and_wrong_statistics_are_refused():
  with pytest.raises(UserError, match="KID needs at least 1,000 samples of both sets, but there are 50"):
    set_metrics.kid(A, B)
  with pytest.raises(UserError, match="the inception score needs at least 10 samples, but there are 9"):
    set_metrics.inception_score(A[:9])
  with pytest.raises(UserError, match="at least 6 samples"):
    set_metrics.manifold_metrics(A, B[:5], k=5, strict=True)
  with pytest.raises(UserError, match=r"give \[d\], \[d, d\]"):
    frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
  with pytest.raises(UserError, match="not finite"):
    frechet_distance(np.zeros(2), np.eye(2) * np.nan, np.zeros(2), np.eye(2))
