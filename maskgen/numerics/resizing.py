"""Resizing as other programs do it, where a metric is defined by their pixels."""

from collections.abc import Callable

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
  return antialiased(images, side, side, "bicubic")


def antialiased(images: jax.Array, height: int, width: int, filter: str) -> jax.Array:  # noqa: A002
  """A filter that is widened where it shrinks, on floats; so do Pillow and PyTorch with `antialias=True`.

  Args:
    images: float32 [b, h, w, c].
    height: of the result.
    width: of the result.
    filter: a name in `FILTERS`.

  Returns:
    float32 [b, height, width, c], neither rounded nor clipped.
  """
  sizes = zip(images.shape[1:3], (height, width), strict=True)
  rows, columns = (antialiased_weights(size, side, filter).astype(np.float32) for size, side in sizes)
  return jnp.einsum("yh,bhwc,xw->byxc", rows, images, columns, precision="highest")


def pillow(images: jax.Array, height: int, width: int, filter: str) -> jax.Array:  # noqa: A002  (Pillow's name)
  """Pillow's `Image.resize`, equal in every bit.

  Rows are resized before columns, as in Pillow, which begins with columns from version 13 on where a picture
  loses more than twice as many rows as columns.

  Args:
    images: uint8 [b, h, w, c].
    height: of the result.
    width: of the result.
    filter: a name in `FILTERS`.

  Returns:
    uint8 [b, height, width, c].
  """
  for axis, side in ((2, width), (1, height)):  # rounded to integers in between
    if images.shape[axis] != side:
      images = _resize_integers(images, axis, antialiased_weights(images.shape[axis], side, filter))
  return images


def _resize_integers(images: jax.Array, axis: int, weights: np.ndarray) -> jax.Array:
  """Weighted sums of uint8 in fixed point with 22 bits."""
  fixed = np.trunc(weights * 2.0**22 + np.copysign(0.5, weights)).astype(np.int32)
  used = [np.flatnonzero(row) for row in fixed]
  length = max(places[-1] - places[0] + 1 for places in used)
  starts = np.minimum([places[0] for places in used], images.shape[axis] - length)
  shape = [-1 if i == axis else 1 for i in range(images.ndim)]
  total = jnp.full((), 1 << 21, jnp.int32)
  for i in range(length):
    factors = fixed[np.arange(len(fixed)), starts + i].reshape(shape)
    total = total + jnp.take(images, starts + i, axis).astype(jnp.int32) * factors
  return jnp.clip(total >> 22, 0, 255).astype(jnp.uint8)


def _bicubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
  """Keys's cubic at distances x >= 0."""
  near = ((a + 2) * x - (a + 3)) * x**2 + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))


# Filters of Pillow and their reach in pixels.
FILTERS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
  "bilinear": (lambda x: np.maximum(1.0 - x, 0.0), 1.0),
  "bicubic": (_bicubic, 2.0),
}


def antialiased_weights(size: int, side: int, filter: str) -> np.ndarray:  # noqa: A002
  """The matrix float64 [side, size] of a filter that is widened where it shrinks.

  So do Pillow and PyTorch with `antialias=True`.
  """
  kernel, reach = FILTERS[filter]
  scale = max(size / side, 1.0)
  centres = (np.arange(side) + 0.5) * (size / side)
  starts = np.maximum((centres - reach * scale + 0.5).astype(int), 0)
  ends = np.minimum((centres + reach * scale + 0.5).astype(int), size)
  pixels = np.arange(size)
  weights = kernel(np.abs((pixels + 0.5 - centres[:, None]) / scale))
  weights = np.where((pixels >= starts[:, None]) & (pixels < ends[:, None]), weights, 0.0)
  return weights / weights.sum(axis=1, keepdims=True)


def bicubic_torch_weights(size: int, side: int) -> np.ndarray:
  """The matrix float64 [side, size] of `torch.nn.functional.interpolate` with mode "bicubic"."""
  centres = (np.arange(side) + 0.5) * (size / side) - 0.5
  weights = np.zeros((side, size))
  for offset in range(-1, 3):
    places = np.floor(centres).astype(int) + offset
    at = (np.arange(side), np.clip(places, 0, size - 1))
    np.add.at(weights, at, _bicubic(np.abs(centres - places), a=-0.75))
  return weights
