"""RandAugment (Cubuk et al. 2020) as a preprocessing op, and the operations it draws from.

Each operation maps uint8 [h, w, c] to the same and matches Pillow's function of that name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from maskgen.data.augment import check_image, check_number, mean_level, rounded_luma
from maskgen.data.cpu_tf import tf
from maskgen.data.ops import op

# A grey level for all channels, or one for each.
Fill = int | tuple[int, ...]

_GREY = 128
_METHODS = ("bilinear", "bicubic")


@op
def rand_augment(
  image: tf.Tensor,
  layers: int = 2,
  magnitude: float = 9.0,
  std: float = 0.5,
  increasing: bool = False,
  method: str = "bilinear",
  fill: Fill = _GREY,
  *,
  seed: tf.Tensor,
) -> tf.Tensor:
  """Applies `layers` random operations in sequence (RandAugment, Cubuk et al. 2020).

  The operations, ranges and probabilities are those of timm's `rand-m{magnitude}-n{layers}-mstd{std}`, with
  `-inc1` if `increasing`.
  Each layer draws uniformly from the fifteen operations below, with replacement, and applies the one
  it drew with probability 1/2. For each layer the level l is a normal draw around `magnitude`,
  clipped to [0, 10] and divided by ten; +- is a random sign.

      autocontrast, equalize, invert
      rotate                                       by +-30 l degrees
      posterize                                    to floor(4 l) bits
      solarize                                     from the level floor(256 l) on
      solarize_add                                 adds floor(110 l) to levels below 128
      color, contrast, brightness, sharpness       by the factor 0.1 + 1.8 l
      shear_x, shear_y                             by +-0.3 l pixels per pixel
      translate_x, translate_y                     by +-0.45 l of the width or height

  With `increasing`, each of these grows stronger with the level, where some grow weaker without:

      posterize                                    to 4 - floor(4 l) bits
      solarize                                     from the level 256 - floor(256 l) on
      color, contrast, brightness, sharpness       by the factor 1 +- 0.9 l

  Args:
    image: uint8 [h, w, c], c 1 or 3, both sides 2 or more.
    layers: the number of operations, at least 1.
    magnitude: the mean level, from 0 to 10.
    std: the standard deviation of the level in the same unit, at least 0.
    increasing: whether all operations grow stronger with the level.
    method: how geometric operations interpolate, "bilinear" or "bicubic".
    fill: the level outside of the image, or one for each channel.
    seed: int [2].

  Returns:
    uint8 [h, w, c].

  Raises:
    ValueError: if an argument is out of range, or the image has another dtype or shape.
  """
  check_image(image)
  if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
    raise ValueError(f"layers is {layers!r}, not a number of operations (1 or more)")
  check_number("magnitude", magnitude, most=10)
  check_number("std", std)
  if not isinstance(increasing, bool):
    raise ValueError(f"increasing is {increasing!r}, not True or False")
  if method not in _METHODS:
    raise ValueError(f"method is {method!r}, not one of {', '.join(_METHODS)}")
  levels = fill if isinstance(fill, tuple) else (fill,)
  if len(levels) not in (1, image.shape[-1]) or not all(type(x) is int and 0 <= x <= 255 for x in levels):
    raise ValueError(f"fill is {fill!r}, not a level from 0 to 255, or one for each channel")
  operations = functools.partial(_operations, increasing=increasing, method=method, fill=fill)
  for layer_seed in tf.unstack(tf.random.experimental.stateless_split(seed, layers)):
    image = _layer(image, magnitude, std, operations, layer_seed)
  return image


def _layer(
  image: tf.Tensor,
  magnitude: float,
  std: float,
  make_operations: Callable[..., list[Callable[[], tf.Tensor]]],
  seed: tf.Tensor,
) -> tf.Tensor:
  choice_seed, level_seed, sign_seed = tf.unstack(tf.random.experimental.stateless_split(seed, 3))
  level = tf.clip_by_value(magnitude + std * tf.random.stateless_normal([], level_seed), 0.0, 10.0)
  sign = tf.where(tf.random.stateless_uniform([], sign_seed) < 0.5, -1.0, 1.0)
  operations = make_operations(image, 0.1 * level, sign)
  # The upper half of the numbers leaves the image unchanged.
  number = tf.random.stateless_uniform([], choice_seed, 0, 2 * len(operations), tf.int32)
  choice = tf.minimum(number, len(operations))
  return tf.ensure_shape(tf.switch_case(choice, [*operations, lambda: image]), image.shape)


def _operations(
  image: tf.Tensor, level: tf.Tensor, sign: tf.Tensor, increasing: bool, method: str, fill: Fill
) -> list[Callable[[], tf.Tensor]]:
  """The fifteen operations as functions without arguments, for a level in [0, 1]."""

  def whole(most: int) -> tf.Tensor:
    return tf.cast(level * most, tf.int32)

  height, width = (tf.cast(side, tf.float32) for side in tf.unstack(tf.shape(image)[:2]))
  if increasing:
    bits, threshold, factor = 4 - whole(4), 256 - whole(256), 1.0 + sign * 0.9 * level
  else:
    bits, threshold, factor = whole(4), whole(256), 0.1 + 1.8 * level
  return [
    lambda: autocontrast(image),
    lambda: equalize(image),
    lambda: invert(image),
    lambda: rotate(image, sign * 30.0 * level, method, fill),
    lambda: posterize(image, bits),
    lambda: solarize(image, threshold),
    lambda: solarize_add(image, whole(110)),
    lambda: color(image, factor),
    lambda: contrast(image, factor),
    lambda: brightness(image, factor),
    lambda: sharpness(image, factor),
    lambda: shear_x(image, sign * 0.3 * level, method, fill),
    lambda: shear_y(image, sign * 0.3 * level, method, fill),
    lambda: translate_x(image, sign * 0.45 * level * width, method, fill),
    lambda: translate_y(image, sign * 0.45 * level * height, method, fill),
  ]


# Grey levels


def autocontrast(image: tf.Tensor) -> tf.Tensor:
  """Stretches each channel linearly to 0..255; a channel with a single level is unchanged."""
  # Pillow's arithmetic: in double precision, on the 256 levels only.
  low = tf.cast(tf.reduce_min(image, axis=(0, 1)), tf.float64)[:, None]
  high = tf.cast(tf.reduce_max(image, axis=(0, 1)), tf.float64)[:, None]
  levels = tf.range(256, dtype=tf.float64)[None]
  scale = 255.0 / tf.maximum(high - low, 1.0)
  table = tf.where(high > low, levels * scale - low * scale, levels)
  return _look_up(image, tf.saturate_cast(table, tf.uint8))


def equalize(image: tf.Tensor) -> tf.Tensor:
  """Equalizes the histogram of each channel."""
  channels = image.shape[-1]
  histogram = tf.math.bincount(_table_index(image), minlength=256 * channels, maxlength=256 * channels)
  histogram = tf.reshape(histogram, [channels, 256])
  below = tf.cumsum(histogram, axis=1, exclusive=True)
  # Pixels per level of the result, excluding those of the highest level.
  step = tf.reduce_max(tf.where(histogram > 0, below, 0), axis=1, keepdims=True) // 255
  table = (step // 2 + below) // tf.maximum(step, 1)
  return _look_up(image, tf.saturate_cast(tf.where(step > 0, table, tf.range(256)[None]), tf.uint8))


def invert(image: tf.Tensor) -> tf.Tensor:
  """Subtracts each level from 255."""
  return 255 - image


def posterize(image: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
  """Keeps the highest bits, an int32 scalar in 0..8, of each level."""
  mask = 256 - tf.bitwise.left_shift(1, 8 - bits)
  return tf.bitwise.bitwise_and(image, tf.cast(mask, tf.uint8))


def solarize(image: tf.Tensor, threshold: tf.Tensor) -> tf.Tensor:
  """Inverts the levels at or above a threshold (int32 scalar, 0..256)."""
  return tf.where(tf.cast(image, tf.int32) < threshold, image, 255 - image)


def solarize_add(image: tf.Tensor, amount: tf.Tensor) -> tf.Tensor:
  """Adds an int32 scalar, 0 or more, to the levels below 128, up to 255."""
  brighter = tf.saturate_cast(tf.cast(image, tf.int32) + amount, tf.uint8)
  return tf.where(image < 128, brighter, image)


# Blends with a degenerate image: factor 0 returns it, 1 returns the image, larger ones exaggerate


def color(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """Blends with the luma."""
  return _blend(rounded_luma(image), image, factor)


def contrast(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """Blends with the mean of the luma."""
  mean = tf.floor(mean_level(rounded_luma(image)) + 0.5)
  return _blend(tf.cast(mean, tf.float32), image, factor)


def brightness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """Blends with black."""
  return _blend(tf.constant(0.0), image, factor)


def sharpness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """Blends with a smoothed image, weights 5 in the middle and 1 around; the border is unchanged."""
  levels = tf.cast(image, tf.float32)
  rows = levels[:-2] + levels[1:-1] + levels[2:]
  box = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
  inner = levels[1:-1, 1:-1]
  smooth = tf.round((box + 4.0 * inner) * (1 / 13))
  return _blend(levels + tf.pad(smooth - inner, [[1, 1], [1, 1], [0, 0]]), image, factor)


# Geometry


def rotate(image: tf.Tensor, degrees: tf.Tensor, method: str = "bilinear", fill: Fill = _GREY) -> tf.Tensor:
  """Rotates anticlockwise about the centre."""
  radians = degrees * (math.pi / 180)
  cos, sin = tf.cos(radians), tf.sin(radians)
  height, width = (tf.cast(side, tf.float32) for side in tf.unstack(tf.shape(image)[:2]))
  x, y = width / 2.0, height / 2.0
  return _transform(image, [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y], method, fill)


def shear_x(image: tf.Tensor, factor: tf.Tensor, method: str = "bilinear", fill: Fill = _GREY) -> tf.Tensor:
  """Moves rows to the left by `factor` times their distance from the top."""
  return _transform(image, [1.0, factor, 0.0, 0.0, 1.0, 0.0], method, fill)


def shear_y(image: tf.Tensor, factor: tf.Tensor, method: str = "bilinear", fill: Fill = _GREY) -> tf.Tensor:
  """Moves columns up by `factor` times their distance from the left."""
  return _transform(image, [1.0, 0.0, 0.0, factor, 1.0, 0.0], method, fill)


def translate_x(
  image: tf.Tensor, pixels: tf.Tensor, method: str = "bilinear", fill: Fill = _GREY
) -> tf.Tensor:
  """Moves to the left."""
  return _transform(image, [1.0, 0.0, pixels, 0.0, 1.0, 0.0], method, fill)


def translate_y(
  image: tf.Tensor, pixels: tf.Tensor, method: str = "bilinear", fill: Fill = _GREY
) -> tf.Tensor:
  """Moves up."""
  return _transform(image, [1.0, 0.0, 0.0, 0.0, 1.0, pixels], method, fill)


def _table_index(image: tf.Tensor) -> tf.Tensor:
  """Numbers (channel, level) as channel * 256 + level; int32 [h, w, c]."""
  return tf.cast(image, tf.int32) + 256 * tf.range(image.shape[-1])


def _look_up(image: tf.Tensor, table: tf.Tensor) -> tf.Tensor:
  """Replaces levels by those of a table [c, 256]."""
  return tf.gather(tf.reshape(table, [-1]), _table_index(image))


def _blend(degenerate: tf.Tensor, image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """Truncates fractions, as Pillow does."""
  levels = tf.cast(image, tf.float32)
  return tf.saturate_cast(degenerate + factor * (levels - degenerate), tf.uint8)


def _transform(image: tf.Tensor, coefficients: list, method: str, fill: Fill) -> tf.Tensor:
  """Maps (a x + b y + c, d x + e y + f) to (x, y); pixel centres are at half-integers."""
  fill_level = tf.constant(fill, tf.float32)
  if method == "bicubic":
    return _bicubic(image, coefficients, fill_level)
  a, b, c, d, e, f = coefficients
  # TensorFlow counts from the centre of the first pixel, and fills all channels with the same level.
  row = tf.stack([a, b, c + (a + b - 1.0) / 2.0, d, e, f + (d + e - 1.0) / 2.0, 0.0, 0.0])
  shift = fill_level - _GREY
  result = tf.raw_ops.ImageProjectiveTransformV3(
    images=(tf.cast(image, tf.float32) - shift)[None],
    transforms=row[None],
    output_shape=tf.shape(image)[:2],
    fill_value=float(_GREY),
    interpolation="BILINEAR",
  )
  return tf.cast(tf.round(result[0] + shift), tf.uint8)


def _bicubic(image: tf.Tensor, coefficients: list, fill: tf.Tensor) -> tf.Tensor:
  """`_transform` with Pillow's bicubic filter, which truncates fractions."""
  a, b, c, d, e, f = coefficients
  height, width = tf.unstack(tf.shape(image)[:2])
  x = tf.range(tf.cast(width, tf.float32))[None] + 0.5
  y = tf.range(tf.cast(height, tf.float32))[:, None] + 0.5
  columns, right, inside_x = _neighbours(a * x + b * y + c, width)
  rows, down, inside_y = _neighbours(d * x + e * y + f, height)
  pixels = tf.reshape(tf.cast(image, tf.float32), [-1, image.shape[-1]])
  lines = [_cubic([tf.gather(pixels, row * width + column) for column in columns], right) for row in rows]
  result = tf.saturate_cast(_cubic(lines, down), tf.uint8)
  return tf.where((inside_x & inside_y)[..., None], result, tf.cast(fill, tf.uint8))


def _neighbours(place: tf.Tensor, side: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
  """Returns the four pixels around places along an axis, the way past the second, and what is inside."""
  second = tf.floor(place - 0.5)
  pixels = [tf.clip_by_value(tf.cast(second, tf.int32) + k, 0, side - 1) for k in (-1, 0, 1, 2)]
  inside = (place >= 0.0) & (place < tf.cast(side, tf.float32))
  return pixels, (place - 0.5 - second)[..., None], inside


def _cubic(levels: list[tf.Tensor], way: tf.Tensor) -> tf.Tensor:
  """The cubic convolution with a = -1 of four neighbours, at `way` from the second to the third."""
  v1, v2, v3, v4 = levels
  return v2 + way * (v3 - v1 + way * (2.0 * (v1 - v2) + v3 - v4 + way * (v2 - v1 + v4 - v3)))
