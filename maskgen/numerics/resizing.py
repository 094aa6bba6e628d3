"""Resizing as other programs do it, where a metric is defined by their pixels."""

import jax
import jax.numpy as jnp
import numpy as np


def bilinear_tf1(images: jax.Array, side: int) -> jax.Array:
  """`tf.compat.v1.image.resize_bilinear` with its defaults: no antialiasing, corners aligned at the top left.

  Args:
    images: float32 [b, h, w, c].
    side: height and width of the result.

  Returns:
    float32 [b, side, side, c]; equal in every bit for integers up to 255, outside of `jax.jit` or on a device
    that fuses no products and sums.
  """
  for axis in (2, 1):  # along rows first
    size = images.shape[axis]
    places = np.arange(side, dtype=np.float32) * (np.float32(size) / np.float32(side))
    images = _interpolate(images, axis, places)
  return images


def bilinear_half_pixel(images: jax.Array, side: int) -> jax.Array:
  """`torch.nn.functional.interpolate` with mode "bilinear": no antialiasing, pixels as areas.

  Args and result are those of `bilinear_tf1`.
  """
  for axis in (2, 1):
    size = images.shape[axis]
    places = (np.arange(side, dtype=np.float32) + np.float32(0.5)) * np.float32(size / side) - np.float32(0.5)
    images = _interpolate(images, axis, np.maximum(places, 0))
  return images


def _interpolate(images: jax.Array, axis: int, places: np.ndarray) -> jax.Array:
  low = np.minimum(places.astype(np.int32), images.shape[axis] - 1)
  high = np.minimum(low + 1, images.shape[axis] - 1)
  shape = [-1 if i == axis else 1 for i in range(images.ndim)]
  share = (places - low.astype(np.float32)).reshape(shape)
  first, second = jnp.take(images, low, axis), jnp.take(images, high, axis)
  return first + (second - first) * share


def bicubic_pillow(images: jax.Array, side: int) -> jax.Array:
  """Pillow's bicubic filter, which antialiases, on floats: nothing is rounded or clipped.

  Args and result are those of `bilinear_tf1`; equal up to rounding.
  """
  rows, columns = (_bicubic_weights(images.shape[axis], side) for axis in (1, 2))
  return jnp.einsum("yh,bhwc,xw->byxc", rows, images, columns, precision="highest")


def _bicubic_weights(size: int, side: int) -> np.ndarray:
  """The matrix [side, size] of Keys's cubic with a = -1/2, widened where it shrinks."""
  scale = max(size / side, 1.0)
  centres = (np.arange(side) + 0.5) * (size / side)
  reach = 2.0 * scale
  starts = np.maximum((centres - reach + 0.5).astype(int), 0)
  ends = np.minimum((centres + reach + 0.5).astype(int), size)
  pixels = np.arange(size)
  x = np.abs((pixels + 0.5 - centres[:, None]) / scale)
  near = (1.5 * x - 2.5) * x**2 + 1
  far = ((-0.5 * x + 2.5) * x - 4) * x + 2
  weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
  weights = np.where((pixels >= starts[:, None]) & (pixels < ends[:, None]), weights, 0.0)
  return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
