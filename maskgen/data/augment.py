"""Preprocessing ops that augment colour and sharpness (see `ops.py`).

Results depend only on the image and the seed. Sums over an image are therefore taken over integers:
the order of summation changes with the number of threads.
"""

from __future__ import annotations

import functools
import math

from maskgen.data.cpu_tf import tf
from maskgen.data.ops import op


@op
def color_jitter(
  image: tf.Tensor,
  brightness: float = 0.4,
  contrast: float = 0.4,
  saturation: float = 0.4,
  hue: float = 0.1,
  probability: float = 0.8,
  *,
  seed: tf.Tensor,
) -> tf.Tensor:
  """Changes brightness, contrast, saturation and hue in a random order, as torchvision does.

  SimCLR (Chen et al. 2020, appendix A) uses (0.8 s, 0.8 s, 0.8 s, 0.2 s) at strength s. The factors
  of the first three are uniform in [max(0, 1 - x), 1 + x] and blend the image with black, with its
  mean luma, and with its luma; hue is rotated by a fraction of the circle that is uniform in
  [-hue, hue]. Grey levels are clipped to 0..255 after each adjustment and rounded once at the end.
  An image with one channel has neither saturation nor hue.

  Args:
    image: uint8 [h, w, c], c 1 or 3.
    brightness: at least 0.
    contrast: at least 0.
    saturation: at least 0.
    hue: from 0 to 0.5.
    probability: the probability of changing the image.
    seed: int [2].

  Returns:
    uint8 [h, w, c].

  Raises:
    ValueError: if an argument is out of range, or the image has another dtype or shape.
  """
  check_image(image)
  check_number("brightness", brightness)
  check_number("contrast", contrast)
  check_number("saturation", saturation)
  check_number("hue", hue, most=0.5)
  check_number("probability", probability, most=1)
  apply_seed, factor_seed, order_seed = tf.unstack(tf.random.experimental.stateless_split(seed, 3))
  spread = tf.constant([brightness, contrast, saturation, hue], tf.float32)
  middle = tf.constant([1, 1, 1, 0], tf.float32)
  low = tf.maximum(middle - spread, [0, 0, 0, -hue])
  share = tf.random.stateless_uniform([4], factor_seed)
  factors = tf.unstack(low + share * (middle + spread - low))
  order = tf.random.experimental.stateless_shuffle(tf.range(4), order_seed)
  adjustments = [_adjust_brightness, _adjust_contrast]
  adjustments += [_adjust_saturation, tf.image.adjust_hue] if image.shape[-1] == 3 else [_keep, _keep]

  def jitter():
    result = tf.cast(image, tf.float32)
    for place in range(4):
      branches = [
        functools.partial(adjust, result, factor) for adjust, factor in zip(adjustments, factors, strict=True)
      ]
      result = tf.switch_case(order[place], branches)
    return tf.saturate_cast(tf.round(result), tf.uint8)

  return tf.cond(tf.random.stateless_uniform([], apply_seed) < probability, jitter, lambda: image)


@op
def grayscale(image: tf.Tensor, probability: float = 0.2, *, seed: tf.Tensor) -> tf.Tensor:
  """Replaces all channels by their luma (ITU-R BT.601) with a given probability; c is unchanged.

  Raises:
    ValueError: if the image is not uint8 [h, w, 1 or 3], or the probability is not in [0, 1].
  """
  check_image(image)
  check_number("probability", probability, most=1)
  return tf.cond(
    tf.random.stateless_uniform([], seed) < probability,
    lambda: tf.broadcast_to(tf.cast(rounded_luma(image), tf.uint8), tf.shape(image)),
    lambda: image,
  )


@op
def blur(
  image: tf.Tensor,
  sigma: tuple[float, float] = (0.1, 2.0),
  probability: float = 0.5,
  *,
  seed: tf.Tensor,
) -> tf.Tensor:
  """Blurs with a Gaussian (SimCLR, Chen et al. 2020, appendix A), truncated at four sigma.

  The border is mirrored, including the outermost pixels.

  Args:
    image: uint8 [h, w, c], c 1 or 3.
    sigma: (low, high), 0 < low <= high, in pixels; the standard deviation is uniform between them.
    probability: the probability of blurring the image.
    seed: int [2].

  Returns:
    uint8 [h, w, c].

  Raises:
    ValueError: if an argument is out of range, or the image has another dtype or shape.
  """
  check_image(image)
  pair = isinstance(sigma, tuple) and len(sigma) == 2 and all(map(_is_number, sigma))
  if not (pair and 0 < sigma[0] <= sigma[1]):
    raise ValueError(f"sigma is {sigma!r}, not (low, high) with 0 < low <= high")
  check_number("probability", probability, most=1)
  apply_seed, sigma_seed = tf.unstack(tf.random.experimental.stateless_split(seed, 2))
  width = tf.random.stateless_uniform([], sigma_seed, *sigma)

  def gaussian():
    shortest = tf.reduce_min(tf.shape(image)[:2])  # the most that can be mirrored
    radius = tf.minimum(tf.cast(4.0 * width + 0.5, tf.int32), shortest)
    weights = tf.exp(-0.5 * (tf.range(tf.cast(radius, tf.float32) + 1.0) / width) ** 2)
    weights /= 2.0 * tf.reduce_sum(weights) - weights[0]
    result = tf.cast(image, tf.float32)
    for axis in range(2):
      result = _smooth(result, weights, axis)
    return tf.saturate_cast(tf.round(result), tf.uint8)

  blurred = tf.random.stateless_uniform([], apply_seed) < probability
  return tf.ensure_shape(tf.cond(blurred, gaussian, lambda: image), image.shape)


def check_image(image: tf.Tensor) -> None:
  """Raises ValueError unless an image is uint8 and has 1 or 3 channels."""
  if image.dtype != tf.uint8 or image.shape[-1] not in (1, 3):
    has = f"{image.dtype.name} with {image.shape[-1]} channels"
    raise ValueError(f"image is {has}, not uint8 with 1 or 3 channels")


def check_number(name: str, value: float, most: float = math.inf) -> None:
  """Raises ValueError unless an argument is a number from 0 to `most`."""
  if not (_is_number(value) and 0 <= value <= most):
    takes = f"a number from 0 to {most:g}" if math.isfinite(most) else "a number of at least 0"
    raise ValueError(f"{name} is {value!r}, not {takes}")


def rounded_luma(image: tf.Tensor) -> tf.Tensor:
  """The luma of a uint8 image [h, w, c], rounded half up to a grey level; float32 [h, w, 1]."""
  return tf.floor(_luma(tf.cast(image, tf.float32)) + 0.5)


def mean_level(grey: tf.Tensor) -> tf.Tensor:
  """The mean of a float32 image with levels 0..255, exact to 2^-16 of a level; a float64 scalar."""
  total = tf.reduce_sum(tf.cast(grey * 65536.0, tf.int64))
  return tf.cast(total, tf.float64) / (65536.0 * tf.cast(tf.size(grey), tf.float64))


def _is_number(value: object) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _luma(image: tf.Tensor) -> tf.Tensor:
  if image.shape[-1] == 1:
    return image
  red, green, blue = tf.split(image, 3, axis=-1)
  # Multiples of 2^-16, so that sums of whole grey levels are exact.
  return red * (19595 / 65536) + green * (38470 / 65536) + blue * (7471 / 65536)


def _adjust_brightness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  return tf.clip_by_value(factor * image, 0.0, 255.0)


def _adjust_contrast(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  mean = tf.cast(mean_level(_luma(image)), tf.float32)
  return tf.clip_by_value(factor * image + (1.0 - factor) * mean, 0.0, 255.0)


def _adjust_saturation(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  return tf.clip_by_value(factor * image + (1.0 - factor) * _luma(image), 0.0, 255.0)


def _keep(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  del factor
  return image


def _smooth(image: tf.Tensor, weights: tf.Tensor, axis: int) -> tf.Tensor:
  """Correlates one axis of a mirrored image with the weights of distances 0, 1, ..., radius."""
  radius = tf.size(weights) - 1
  along = tf.one_hot(axis, 3, dtype=tf.int32)
  padded = tf.pad(image, tf.stack([radius * along, radius * along], axis=1), "SYMMETRIC")

  def shifted(distance):
    return tf.slice(padded, (radius + distance) * along, tf.shape(image))

  def add(distance, total):
    return distance + 1, total + weights[distance] * (shifted(distance) + shifted(-distance))

  start = (tf.constant(1), weights[0] * image)
  return tf.while_loop(lambda distance, _: distance <= radius, add, start)[1]
