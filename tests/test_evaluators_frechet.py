"""The Fréchet distance against closed forms, and its pixel space."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from maskgen.evaluators import frechet
from maskgen.evaluators.feature_spaces import area_weights, pixels


def _random_gaussian(rng, dims, rank):
  factor = rng.normal(size=(dims, rank))
  return frechet.Gaussian(rng.normal(size=dims), factor @ factor.T)


def test_diagonal_gaussians_have_the_closed_form():
  a = frechet.Gaussian(np.array([0.0, 1.0, 2.0]), np.diag([1.0, 4.0, 0.0]))
  b = frechet.Gaussian(np.array([3.0, 1.0, -2.0]), np.diag([9.0, 1.0, 0.25]))
  # |m_a - m_b|^2 + the sum of (std_a - std_b)^2
  np.testing.assert_allclose(frechet.distance(a, b), 25 + (1 - 3) ** 2 + (2 - 1) ** 2 + 0.5**2)


def test_full_covariances_agree_with_the_matrix_square_root():
  rng = np.random.default_rng(0)
  a, b = _random_gaussian(rng, 6, 12), _random_gaussian(rng, 6, 12)
  root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
  expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
  np.testing.assert_allclose(frechet.distance(a, b), expected, rtol=1e-9)


def test_symmetric_and_zero_on_itself_even_when_singular():
  rng = np.random.default_rng(1)
  a, b = _random_gaussian(rng, 20, 3), _random_gaussian(rng, 20, 5)
  np.testing.assert_allclose(frechet.distance(a, b), frechet.distance(b, a), rtol=1e-9)
  assert 0.0 <= frechet.distance(a, a) < 1e-9


@pytest.mark.parametrize("block", [8, 50, 1024])
def test_fit_does_not_depend_on_the_batches(block, monkeypatch):
  monkeypatch.setattr(frechet, "_BLOCK", block)
  features = np.random.default_rng(2).normal(100.0, 1e-2, (50, 4))  # sums of squares would cancel
  gaussian = frechet.fit([features[:7], features[:0], features[7:8], features[8:]])
  np.testing.assert_array_equal(gaussian.covariance, frechet.fit([features]).covariance)
  np.testing.assert_allclose(gaussian.mean, features.mean(axis=0))
  np.testing.assert_allclose(gaussian.covariance, np.cov(features, rowvar=False), atol=1e-12)


def test_area_weights_average_whole_and_partial_samples():
  np.testing.assert_allclose(area_weights(3, 2), [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]])
  np.testing.assert_allclose(area_weights(5, 8).sum(axis=1), 1.0)


def test_pixels_average_blocks():
  images = np.random.default_rng(3).uniform(size=(2, 16, 32, 3)).astype(np.float32)
  expected = images.reshape(2, 8, 2, 8, 4, 3).mean(axis=(2, 4)).reshape(2, -1)
  np.testing.assert_allclose(pixels(jnp.asarray(images)), expected, atol=1e-6)
