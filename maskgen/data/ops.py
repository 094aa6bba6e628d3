"""Preprocessing ops: plain functions of one entry of a record, which run eagerly or inside tf.data.

To add an op, decorate `def name(image, *args)` with `@op`. Preprocessing refers to it with its module, as in
`decode|my_package.my_ops.name(2)`, or by `name` alone if the module is already imported.

The name of the first parameter, such as `image`, is the key of the entry that the op takes and replaces; an
op that makes further entries returns all of them by key. The pipeline supplies keyword-only parameters:
`seed`, an int64 tensor [2] as for TensorFlow's stateless random ops, and `draw`, an int64 scalar, the number
of earlier draws of the record. Images are uint8 [h, w, c] before and after, c static; crops also accept a
`Picture`, of which they decode only their rectangle. A size is an int for a square, or (height, width).
Invalid arguments raise ValueError.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeAlias

from maskgen.data.cpu_tf import tf
from maskgen.data.picture import MAX_PIXELS, Picture

Op: TypeAlias = "Callable[..., tf.Tensor | dict[str, tf.Tensor]]"
Size = int | tuple[int, int]

# By function name, with and without the module.
OPS: dict[str, Op] = {}
_METHODS = ("bilinear", "bicubic", "nearest", "lanczos3", "area")
_PLACES = ("random", "center")
_PAD_MODES = ("constant", "reflect", "symmetric")


def op(function: Op) -> Op:
  """Registers a preprocessing op under its function's name; it receives all pixels of a picture."""

  @functools.wraps(function)
  def with_pixels(value: tf.Tensor | Picture, *args, **kwargs) -> tf.Tensor:
    return function(value.pixels() if isinstance(value, Picture) else value, *args, **kwargs)

  return picture_op(with_pixels)


def picture_op(function: Op) -> Op:
  """Registers an op that receives a picture undecoded, to decode only what it needs."""
  OPS[function.__name__] = OPS[f"{function.__module__}.{function.__name__}"] = function
  return function


@picture_op
def decode(image: tf.Tensor, channels: int = 3) -> tf.Tensor | Picture:
  """Opens a picture file with 3 or 1 (luma, ITU-R BT.601) channels; see `Picture`.

  Images that are already arrays are converted, unless they have exactly `channels` channels of any kind.
  """
  if not _is_count(channels):
    raise ValueError(f"channels is {channels!r}, not a number of channels")
  if image.dtype != tf.string and image.shape[-1] == channels:
    return image
  if channels not in (1, 3):
    raise ValueError(f"channels is {channels}: pictures are decoded to 3 or 1")
  if image.dtype == tf.string:
    return Picture(image, channels)
  if image.shape[-1] < 3:  # grey, perhaps with transparency
    return tf.repeat(image[..., :1], channels, axis=-1)
  image = image[..., :3]
  if channels == 3:
    return image
  return _to_uint8(tf.tensordot(tf.cast(image, tf.float32), [[0.299], [0.587], [0.114]], axes=1))


@op
def take_crop(tokens: tf.Tensor, *, draw: tf.Tensor) -> tf.Tensor:
  """Returns one of the crops [crops, n] of a token cache, codes [n]; successive draws take them in turn."""
  return tokens[draw % tokens.shape[0]]


@op
def value_range(image: tf.Tensor, low: float = 0.0, high: float = 1.0) -> tf.Tensor:
  """Maps 0..255 to float32 from `low` to `high`; not needed for maskgen's models, which take bytes."""
  return low + tf.cast(image, tf.float32) * ((high - low) / 255.0)


@op
def resize(image: tf.Tensor, size: Size, method: str = "bilinear", antialias: bool = True) -> tf.Tensor:
  """Resizes to exactly `size`, ignoring the aspect ratio; rounds to the nearest grey level."""
  return _resize(image, _height_width(size), method, antialias)


@op
def resize_small(image: tf.Tensor, size: int, method: str = "bilinear", antialias: bool = True) -> tf.Tensor:
  """Resizes so that the shorter side has `size` pixels, keeping the aspect ratio."""
  _height_width((size, size))
  sides = tf.shape(image)[:2]
  scale = tf.cast(size, tf.float32) / tf.cast(tf.reduce_min(sides), tf.float32)
  resized = tf.cast(tf.round(tf.cast(sides, tf.float32) * scale), tf.int32)
  small = tf.reduce_prod(tf.cast(resized, tf.int64)) <= MAX_PIXELS
  with tf.control_dependencies([tf.debugging.Assert(small, ["it is too narrow to be resized"])]):
    return _resize(image, resized, method, antialias)


@picture_op
def center_crop(image: tf.Tensor | Picture, size: Size) -> tf.Tensor:
  """Crops the centre to `size`; smaller images are an error."""
  height_width = _fitting(image, size)
  return _crop(image, (_sides(image) - height_width) // 2, height_width)


@picture_op
def random_crop(image: tf.Tensor | Picture, size: Size, *, seed: tf.Tensor) -> tf.Tensor:
  """Crops to `size` at a uniformly random position; smaller images are an error."""
  height_width = _fitting(image, size)
  return _crop(image, _random_place(image, height_width, seed), height_width)


@picture_op
def sized_crop(
  image: tf.Tensor | Picture, size: int, place: str = "random", *, seed: tf.Tensor
) -> dict[str, tf.Tensor]:
  """Resizes so that the shorter side has `size` pixels, and crops to a square there, noting what it did.

  The crop is at a "random" place or in the "center". The entry `sizes`, int32 [6], is the size conditioning
  of SDXL (Podell et al. 2023, section 2.2): height and width before, top and left of the crop, height and
  width after. Flip before, since a flip moves the crop.
  """
  if place not in _PLACES:
    raise ValueError(f"place is {place!r}, not one of {', '.join(_PLACES)}")
  small = resize_small(image, size)
  sides = _height_width(size)
  begin = _random_place(small, sides, seed) if place == "random" else (_sides(small) - sides) // 2
  sizes = tf.concat([_sides(image), begin, sides], axis=0)
  return {"image": _crop(small, begin, sides), "sizes": tf.ensure_shape(sizes, [6])}


@picture_op
def random_resized_crop(
  image: tf.Tensor | Picture,
  size: Size,
  scale: tuple[float, float] = (0.2, 1.0),
  method: str = "bilinear",
  antialias: bool = True,
  clamp: bool = False,
  *,
  seed: tf.Tensor,
) -> tf.Tensor:
  """Crops to a random rectangle and resizes it to `size`, sampled as in torchvision.

  The rectangle's fraction of the area is uniform in `scale`, and the logarithm of its aspect ratio is
  uniform between those of 3/4 and 4/3. The first of ten draws that fits the image is used; if none
  fits, the largest centred rectangle with an aspect ratio in that range. With `clamp`, the first draw is
  always used, its sides no longer than the image's (BYOL, Grill et al. 2020; MAE, He et al. 2022).
  """
  target = _height_width(size)
  if not (isinstance(scale, tuple) and len(scale) == 2 and 0.0 < scale[0] <= scale[1] <= 1.0):
    raise ValueError(f"scale is {scale!r}, not (low, high) with 0 < low <= high <= 1")
  narrow, wide = 3 / 4, 4 / 3
  sides = tf.cast(_sides(image), tf.float32)
  height, width = sides[0], sides[1]
  areas, ratios, places = tf.split(tf.random.stateless_uniform([22], seed), [10, 10, 2])

  area = height * width * (scale[0] + (scale[1] - scale[0]) * areas)
  ratio = tf.exp(math.log(wide) * (2.0 * ratios - 1.0))
  draws = tf.round(tf.sqrt(tf.stack([area / ratio, area * ratio], axis=1)))  # [10, (h, w)]
  largest = [tf.minimum(height, width / narrow), tf.minimum(width, height * wide)]
  candidates = tf.concat([draws, tf.round([largest])], axis=0)
  if clamp:
    candidates = tf.clip_by_value(candidates, 1.0, sides)
  fits = tf.reduce_all((candidates >= 1.0) & (candidates <= sides), axis=1)
  first = tf.argmax(tf.concat([fits[:-1], [True]], axis=0))  # the first True
  crop = tf.maximum(candidates[first], 1.0)

  random_place = tf.floor(places * (sides - crop + 1.0))
  place = tf.where(first < 10, tf.minimum(random_place, sides - crop), (sides - crop) // 2)
  pixels = _crop(image, tf.cast(place, tf.int32), tf.cast(crop, tf.int32))
  return _resize(pixels, target, method, antialias)


@op
def second_crop(
  image: tf.Tensor,
  size: Size,
  scale: tuple[float, float] = (0.3, 0.6),
  method: str = "bilinear",
  flip: float = 0.5,
  *,
  seed: tf.Tensor,
) -> dict[str, tf.Tensor]:
  """Makes a second view, `image2`: a `random_resized_crop` of the image, flipped with probability `flip`.

  Later ops change the image, not this view (CropMAE, Eymaël et al. 2024, section 3).
  """
  if not 0.0 <= flip <= 1.0:
    raise ValueError(f"flip is {flip!r}, not a probability from 0 to 1")
  crop_seed, flip_seed = tf.unstack(tf.random.experimental.stateless_split(seed, 2))
  view = random_resized_crop(image, size, scale, method, seed=crop_seed)
  flipped = tf.random.stateless_uniform([], flip_seed) < flip
  return {"image": image, "image2": tf.where(flipped, tf.reverse(view, [1]), view)}


@op
def pad(image: tf.Tensor, n: int, mode: str = "constant") -> tf.Tensor:
  """Pads each side by `n` pixels: black ("constant") or mirrored ("reflect", "symmetric")."""
  if not _is_count(n):
    raise ValueError(f"n is {n!r}, not a number of pixels")
  if mode not in _PAD_MODES:
    raise ValueError(f"mode is {mode!r}, not one of {', '.join(_PAD_MODES)}")
  return tf.pad(image, [[n, n], [n, n], [0, 0]], mode)


@op
def flip_lr(image: tf.Tensor, *, seed: tf.Tensor) -> tf.Tensor:
  """Flips left and right with probability 1/2."""
  return tf.image.stateless_random_flip_left_right(image, seed)


def _is_count(value: object) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _height_width(size: Size) -> tuple[int, int]:
  height, width = size if isinstance(size, tuple) and len(size) == 2 else (size, size)
  if not (_is_count(height) and _is_count(width)):
    raise ValueError(f"size is {size!r}, not a number of pixels or (height, width)")
  return height, width


def _sides(image: tf.Tensor | Picture) -> tf.Tensor:
  """Height and width, int32 [2]."""
  return image.sides if isinstance(image, Picture) else tf.shape(image)[:2]


def _random_place(image: tf.Tensor | Picture, height_width: tuple[int, int], seed: tf.Tensor) -> tf.Tensor:
  """Top and left of a crop, uniform over all places, int32 [2]."""
  room = _sides(image) - height_width
  begin = tf.random.stateless_uniform([2], seed) * tf.cast(room + 1, tf.float32)
  return tf.minimum(tf.cast(begin, tf.int32), room)


def _crop(image: tf.Tensor | Picture, begin: tf.Tensor, extent: tf.Tensor | tuple[int, int]) -> tf.Tensor:
  """Crops to a rectangle, given as int32 [2] each; sets the static shape if it is known."""
  if isinstance(image, Picture):
    pixels = image.crop(begin, tf.convert_to_tensor(extent))
  else:
    pixels = tf.slice(image, tf.concat([begin, [0]], 0), tf.concat([extent, image.shape[-1:]], 0))
  if isinstance(extent, tuple):
    pixels.set_shape([*extent, None])
  return pixels


def _fitting(image: tf.Tensor | Picture, size: Size) -> tuple[int, int]:
  """Returns the height and width of a crop, after checking that it fits the image if its shape is known."""
  height, width = _height_width(size)
  if not isinstance(image, Picture):
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
