"""Preprocessing ops: plain functions from an image to an image, eager or inside tf.data.

To add an op, decorate `def name(image, *args)` with `@op`; a random op also takes `seed`, an int
tensor [2] as TensorFlow's stateless random ops have it. Images are uint8 [h, w, c] before and
after, c static (`decode` also takes the bytes of a picture file). A size is an int for a square, or
(height, width). Bad arguments raise ValueError.
"""

import math
from collections.abc import Callable

from maskgen.data.cpu_tf import tf

Op = Callable[..., tf.Tensor]
Size = int | tuple[int, int]

OPS: dict[str, Op] = {}
_METHODS = ("bilinear", "bicubic", "nearest", "lanczos3", "area")
_PAD_MODES = ("constant", "reflect", "symmetric")


def op(function: Op) -> Op:
  """Registers a preprocessing op under its function's name."""
  OPS[function.__name__] = function
  return function


@op
def decode(image: tf.Tensor, channels: int = 3) -> tf.Tensor:
  """Decodes a picture file and converts it to 3 or 1 (luma, ITU-R BT.601) channels.

  Transparency is dropped, and of an animation all frames but the first.
  """
  if channels not in (1, 3):
    raise ValueError(f"channels is {channels}, not 1 or 3")
  if image.dtype == tf.string:
    image = tf.io.decode_image(image, channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
  if image.shape[-1] < 3:  # grey, perhaps with transparency
    return tf.repeat(image[..., :1], channels, axis=-1)
  image = image[..., :3]
  if channels == 3:
    return image
  return _to_uint8(tf.tensordot(tf.cast(image, tf.float32), [[0.299], [0.587], [0.114]], axes=1))


@op
def resize(image: tf.Tensor, size: Size, method: str = "bilinear", antialias: bool = True) -> tf.Tensor:
  """Resizes to exactly `size`, whatever the aspect ratio; rounds to the nearest grey level."""
  return _resize(image, _height_width(size), method, antialias)


@op
def resize_small(image: tf.Tensor, size: int, method: str = "bilinear", antialias: bool = True) -> tf.Tensor:
  """Resizes so that the shorter side has `size` pixels, keeping the aspect ratio."""
  _height_width((size, size))
  sides = tf.shape(image)[:2]
  scale = tf.cast(size, tf.float32) / tf.cast(tf.reduce_min(sides), tf.float32)
  return _resize(image, tf.cast(tf.round(tf.cast(sides, tf.float32) * scale), tf.int32), method, antialias)


@op
def center_crop(image: tf.Tensor, size: Size) -> tf.Tensor:
  """Cuts `size` out of the middle; smaller images are an error."""
  height, width = _fitting(image, size)
  sides = tf.shape(image)
  top, left = (sides[0] - height) // 2, (sides[1] - width) // 2
  return tf.slice(image, [top, left, 0], [height, width, image.shape[-1]])


@op
def random_crop(image: tf.Tensor, size: Size, *, seed: tf.Tensor) -> tf.Tensor:
  """Cuts `size` out at a uniformly random place; smaller images are an error."""
  height, width = _fitting(image, size)
  return tf.image.stateless_random_crop(image, (height, width, image.shape[-1]), seed)


@op
def random_resized_crop(
  image: tf.Tensor,
  size: Size,
  scale: tuple[float, float] = (0.2, 1.0),
  method: str = "bilinear",
  antialias: bool = True,
  *,
  seed: tf.Tensor,
) -> tf.Tensor:
  """Cuts out a random rectangle and resizes it to `size`, with the sampling of torchvision.

  The rectangle's share of the area is uniform in `scale`, the logarithm of its aspect ratio uniform
  between those of 3/4 and 4/3. Of ten draws the first that fits the image is taken; if none fits,
  the largest centred rectangle with an aspect ratio in that range.
  """
  target = _height_width(size)
  if not (isinstance(scale, tuple) and len(scale) == 2 and 0.0 < scale[0] <= scale[1] <= 1.0):
    raise ValueError(f"scale is {scale!r}, not (low, high) with 0 < low <= high <= 1")
  narrow, wide = 3 / 4, 4 / 3
  sides = tf.cast(tf.shape(image)[:2], tf.float32)
  height, width = sides[0], sides[1]
  area_seed, ratio_seed, place_seed = tf.unstack(tf.random.experimental.stateless_split(seed, 3))

  area = height * width * tf.random.stateless_uniform([10], area_seed, *scale)
  log_ratio = tf.random.stateless_uniform([10], ratio_seed, math.log(narrow), math.log(wide))
  ratio = tf.exp(log_ratio)
  draws = tf.round(tf.sqrt(tf.stack([area / ratio, area * ratio], axis=1)))  # [10, (h, w)]
  largest = [tf.minimum(height, width / narrow), tf.minimum(width, height * wide)]
  candidates = tf.concat([draws, tf.round([largest])], axis=0)
  fits = tf.reduce_all((candidates >= 1.0) & (candidates <= sides), axis=1)
  first = tf.argmax(tf.concat([fits[:-1], [True]], axis=0))  # the first True
  crop = tf.maximum(candidates[first], 1.0)

  random_place = tf.floor(tf.random.stateless_uniform([2], place_seed) * (sides - crop + 1.0))
  place = tf.where(first < 10, tf.minimum(random_place, sides - crop), (sides - crop) // 2)
  begin = tf.concat([tf.cast(place, tf.int32), [0]], axis=0)
  extent = tf.concat([tf.cast(crop, tf.int32), [image.shape[-1]]], axis=0)
  return _resize(tf.slice(image, begin, extent), target, method, antialias)


@op
def pad(image: tf.Tensor, n: int, mode: str = "constant") -> tf.Tensor:
  """Adds `n` pixels on each side: black ("constant"), or mirrored ("reflect", "symmetric")."""
  if not _is_count(n):
    raise ValueError(f"n is {n!r}, not a number of pixels")
  if mode not in _PAD_MODES:
    raise ValueError(f"mode is {mode!r}, not one of {', '.join(_PAD_MODES)}")
  return tf.pad(image, [[n, n], [n, n], [0, 0]], mode)


@op
def flip_lr(image: tf.Tensor, *, seed: tf.Tensor) -> tf.Tensor:
  """Mirrors left and right with probability 1/2."""
  return tf.image.stateless_random_flip_left_right(image, seed)


def _is_count(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _height_width(size: Size) -> tuple[int, int]:
  height, width = size if isinstance(size, tuple) and len(size) == 2 else (size, size)
  if not (_is_count(height) and _is_count(width)):
    raise ValueError(f"size is {size!r}, not a number of pixels or (height, width)")
  return height, width


def _fitting(image: tf.Tensor, size: Size) -> tuple[int, int]:
  """Returns the height and width of a crop after comparing them with the image, where known."""
  height, width = _height_width(size)
  have_height, have_width = image.shape[0] or height, image.shape[1] or width
  if height > have_height or width > have_width:
    raise ValueError(f"{height}x{width} pixels don't fit into {have_height}x{have_width}")
  return height, width


def _resize(image: tf.Tensor, size: Size | tf.Tensor, method: str, antialias: bool) -> tf.Tensor:
  if method not in _METHODS:
    raise ValueError(f"method is {method!r}, not one of {', '.join(_METHODS)}")
  return _to_uint8(tf.cast(tf.image.resize(image, size, method, antialias=antialias), tf.float32))


def _to_uint8(image: tf.Tensor) -> tf.Tensor:
  return tf.cast(tf.clip_by_value(tf.round(image), 0.0, 255.0), tf.uint8)
