"""Structural similarity of images at several scales (Wang et al. 2003)."""

import jax
import jax.numpy as jnp
import numpy as np

# Exponents of the levels, finest first.
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SMALLEST_SIDE = 161  # the coarsest level still covers the window
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def ms_ssim(a: jax.Array, b: jax.Array) -> jax.Array:
  """MS-SSIM of pairs of images: mean over channels of the product over levels, negative factors being 0.

  Args:
    a: float32 [b, h, w, c] in [0, 1], whose sides are at least `SMALLEST_SIDE`.
    b: images of the same shape.

  Returns:
    float32 [b], at most 1.
  """
  product = jnp.ones((a.shape[0], a.shape[-1]))
  for level, weight in enumerate(WEIGHTS):
    if level:
      a, b = _halve(a), _halve(b)
    luminance, contrast = _factors(a, b)
    last = level == len(WEIGHTS) - 1
    factor = (luminance * contrast if last else contrast).mean(axis=(1, 2))
    product *= jnp.maximum(factor, 0) ** weight
  return product.mean(axis=-1)


def _factors(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  mean_a, mean_b = _blur(a), _blur(b)
  covariance = _blur(a * b) - mean_a * mean_b
  variances = _blur(a * a) - mean_a**2 + _blur(b * b) - mean_b**2
  luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
  return luminance, (2 * covariance + _C2) / (variances + _C2)


def _blur(x: jax.Array) -> jax.Array:
  """Averages with a Gaussian window, without padding."""
  rows, columns = (_windows(size) for size in x.shape[1:3])
  return jnp.einsum("yh,bhwc,xw->byxc", rows, x, columns, precision="highest")


def _windows(size: int) -> np.ndarray:
  """The matrix [size - 10, size] of Gaussian weights around each place."""
  window = np.exp(-(np.arange(-(_WINDOW // 2), _WINDOW // 2 + 1) ** 2) / (2 * _SIGMA**2))
  matrix = np.zeros((size - _WINDOW + 1, size), np.float32)
  for i, row in enumerate(matrix):
    row[i : i + _WINDOW] = window / window.sum()
  return matrix


def _halve(x: jax.Array) -> jax.Array:
  """Averages 2 x 2 pixels; an odd side is padded by a zero on both ends, and the last pixel is dropped."""
  padding = [(0, 0), *((side % 2, side % 2) for side in x.shape[1:3]), (0, 0)]
  x = jnp.pad(x, padding)
  height, width = (side // 2 for side in x.shape[1:3])
  x = x[:, : 2 * height, : 2 * width]
  return x.reshape(x.shape[0], height, 2, width, 2, x.shape[-1]).mean(axis=(2, 4))
