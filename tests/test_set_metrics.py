"""Metrics of sets of features against their definitions, written out."""

import functools

import numpy as np
import pytest
import tensorflow as tf

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


def half_distances(u, v, xp):
  """ADM's squared distances in float16, by the operations of NumPy or TensorFlow, as float64."""
  u, v = (xp.cast(rows) for rows in (u, v))
  squares_u, squares_v = (xp.sum(xp.square(rows)) for rows in (u, v))
  return np.maximum(np.asarray(squares_u[:, None] - 2 * xp.matmul(u, v) + squares_v[None], np.float64), 0)


class InNumpy:
  cast, square = (lambda x: x.astype(np.float16)), np.square
  sum, matmul = (lambda x: x.sum(axis=1)), (lambda u, v: u @ v.T)


class InTensorFlow:
  cast, square = (lambda x: tf.cast(x, tf.float16)), tf.square
  sum, matmul = (lambda x: tf.reduce_sum(x, 1)), (lambda u, v: tf.matmul(u, v, transpose_b=True))


def precision_and_recall(generated, real, distances, k=3):
  real_radii, generated_radii = (np.sort(distances(rows, rows), axis=1)[:, k] for rows in (real, generated))
  between = distances(real, generated)
  return (between <= real_radii[:, None]).any(axis=0).mean(), (between <= generated_radii).any(axis=1).mean()


@pytest.mark.parametrize("block", [10_000, 17])
# In two dimensions no sum depends on its order, which is the device's in TensorFlow.
@pytest.mark.parametrize(("xp", "width"), [(InNumpy, 48), (InTensorFlow, 2)])
def test_precision_and_recall_of_adm_are_in_float16(monkeypatch, xp, width, block):
  monkeypatch.setattr(set_metrics, "_HALF_BLOCK", block)
  rng = np.random.default_rng(2)
  generated, real = (20 + rng.normal(size=(n, width)).astype(np.float32) for n in (60, 50))
  expected = precision_and_recall(generated, real, functools.partial(half_distances, xp=xp))
  found = set_metrics.manifold_metrics(generated, real, k=3, strict=False, half=True)
  assert (found["precision"], found["recall"]) == expected
  exact = set_metrics.manifold_metrics(generated, real, k=3, strict=False)
  assert (exact["precision"], exact["recall"]) != expected


def test_distances_that_float16_cannot_hold_are_in_float32():
  generated, real = 100 * A, 100 * B
  with np.errstate(over="ignore", invalid="ignore"):
    assert not np.isfinite(half_distances(generated, real, InNumpy)).all()
  exact, half = (set_metrics.manifold_metrics(generated, real, k=3, strict=False, half=h) for h in (0, 1))
  assert exact == half


def test_copies_are_their_own_neighbours():
  twice = np.repeat(np.arange(8.0), 2)[:, None]
  found = set_metrics.manifold_metrics(twice + 0.5, twice, k=1, strict=True)
  assert found["precision"] == found["coverage"] == 0.0  # every ball has radius 0


def unbiased_mmd(a, b):
  def kernel(x, y):
    return (x @ y.T / 5 + 1) ** 3

  off = ~np.eye(len(a), dtype=bool)
  return kernel(a, a)[off].mean() + kernel(b, b)[off].mean() - 2 * kernel(a, b).mean()


def test_kid_of_whole_sets_is_the_unbiased_estimate():
  found = set_metrics.kid(A[:50], B, subsets=3, size=50)
  np.testing.assert_allclose(found.mean, unbiased_mmd(A[:50], B))
  assert found.std < 1e-12


@pytest.mark.parametrize("subsets", [2, 40])
def test_kid_is_that_of_random_subsets(subsets, monkeypatch):
  """Of each alone, or all at once where pairs of samples are in several."""
  monkeypatch.setattr(set_metrics, "_BLOCK", 16)
  rng = np.random.RandomState(7)
  draws = [[rng.choice(len(x), 20, replace=False) for x in (A, B)] for _ in range(subsets)]
  expected = [unbiased_mmd(A[rows], B[columns]) for rows, columns in draws]
  found = set_metrics.kid(A, B, subsets=subsets, size=20, seed=7)
  np.testing.assert_allclose(found, (np.mean(expected), np.std(expected)))


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
