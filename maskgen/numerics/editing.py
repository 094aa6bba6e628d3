"""Editing images of any size with a model of one size: masks, windows and blending, on the host.

Letters: H W of the image, h w of the model's images, c channels.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image
from scipy import ndimage

from maskgen.errors import UserError
from maskgen.numerics import masking

# The largest share of a window's tokens that may be unknown, if some window allows it.
_MOST_UNKNOWN = 0.5
# Ratio between the sides of successive candidate windows.
_RATIO = 2**0.25
# Limit on extended images: where Pillow warns of a decompression bomb.
_MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 1 << 26


@dataclasses.dataclass(frozen=True)
class Window:
  """The rectangle of an image that a model sees; it may extend beyond the image.

  Attributes:
    top, left: position of its first pixel, in pixels of the image; may be negative.
    height, width: size in pixels of the image.
  """

  top: int
  left: int
  height: int
  width: int

  def cut(self, image: np.ndarray, hole: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The window at the model's size; the part beyond the image belongs to the hole.

    No pixel of the hole contributes to a pixel outside the hole.

    Args:
      image: float32 [H, W, c].
      hole: bool [H, W].
      size: (h, w).

    Returns:
      float32 [h, w, c] and bool [h, w].
    """
    return _resize(self._crop(image, 0.0), size), self.cut_hole(hole, size)

  def cut_hole(self, hole: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Only the hole of `cut`."""
    crop = self._crop(hole, True)
    return _resize(crop[..., None].astype(np.float32), size)[..., 0] > 0.0

  def paste(self, image: np.ndarray, made: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """The image with the window's pixels blended in; pixels with opacity 0 keep their exact values.

    Args:
      image: float32 [H, W, c].
      made: float32 [h, w, c], the generated window at the model's size.
      opacity: float32 [H, W] in [0, 1], of the generated pixels; 0 outside the window.

    Returns:
      float32 [H, W, c].
    """
    here, inside = self._overlap(image.shape)
    made = _resize(made, (self.height, self.width), Image.Resampling.LANCZOS)[inside].clip(0.0, 1.0)
    share = opacity[here][..., None]
    result = image.copy()
    result[here] = np.where(share > 0.0, share * made + (1.0 - share) * image[here], image[here])
    return result

  def _crop(self, image: np.ndarray, beyond: Any) -> np.ndarray:
    """The pixels [height, width, ...], padded with `beyond` outside the image."""
    here, inside = self._overlap(image.shape)
    crop = np.full((self.height, self.width, *image.shape[2:]), beyond, image.dtype)
    crop[inside] = image[here]
    return crop

  def _overlap(self, shape: tuple[int, ...]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Rows and columns of the overlap of image and window, in the image and in the window."""
    top, left = max(self.top, 0), max(self.left, 0)
    bottom, right = min(self.top + self.height, shape[0]), min(self.left + self.width, shape[1])
    here = slice(top, bottom), slice(left, right)
    return here, (
      slice(top - self.top, bottom - self.top),
      slice(left - self.left, right - self.left),
    )


def choose_window(hole: np.ndarray, size: tuple[int, int], factor: int) -> Window:
  """Chooses the window in which a hole is filled.

  The window has the model's aspect ratio, contains the whole hole, stays within the image where it fits, and
  is not magnified unless the image is smaller than the model's size. Among such windows, the smallest one
  with at least half of its tokens known is chosen; if there is none, the one with the largest known share.

  Args:
    hole: bool [H, W].
    size: (h, w).
    factor: pixels per token along each side.
  """
  (top, bottom), (left, right) = _bounds(hole, 0), _bounds(hole, 1)
  sides = [long / short for long, short in zip(hole.shape, size, strict=True)]
  smallest = max((bottom - top) / size[0], (right - left) / size[1], min(1.0, *sides))
  count = 1 + math.ceil(math.log(max(*sides) / smallest, _RATIO) - 1e-9)
  best, least = None, math.inf
  for scale in np.geomspace(smallest, max(*sides), count):
    height, width = (math.ceil(scale * side - 1e-6) for side in size)
    window = Window(
      _place((top + bottom - height) // 2, height, hole.shape[0]),
      _place((left + right - width) // 2, width, hole.shape[1]),
      height,
      width,
    )
    pixels = jnp.asarray(window.cut_hole(hole, size))[None]
    unknown = float(masking.token_mask(pixels, factor).mean())
    if unknown < least:
      best, least = window, unknown
    if least <= _MOST_UNKNOWN:
      break
  assert best is not None
  return best


def _bounds(hole: np.ndarray, axis: int) -> tuple[int, int]:
  """The range [start, stop) of a hole along an axis; the middle if there is no hole."""
  places = np.flatnonzero(hole.any(axis=1 - axis))
  return (int(places[0]), int(places[-1]) + 1) if places.size else (hole.shape[axis] // 2,) * 2


def _place(start: int, length: int, available: int) -> int:
  """Shifts an interval into [0, available), or centres it if it is longer."""
  return min(max(start, 0), available - length) if length <= available else (available - length) // 2


def _resize(
  image: np.ndarray, size: tuple[int, int], method: Image.Resampling = Image.Resampling.BILINEAR
) -> np.ndarray:
  """Resizes float32 [., ., c] to [*size, c] with an antialiasing filter.

  The default is the filter of most training pipelines; its weights are positive and its support is local.
  """
  if image.shape[:2] == size:
    return image
  channels = [Image.fromarray(channel).resize(size[::-1], method) for channel in np.moveaxis(image, -1, 0)]
  return np.stack([np.asarray(channel) for channel in channels], axis=-1)


def grow(hole: np.ndarray, pixels: int) -> np.ndarray:
  """Dilates a hole, bool [H, W], by a distance in pixels."""
  return _distance(hole) <= pixels if pixels else hole


def opacity(hole: np.ndarray, feather: int) -> np.ndarray:
  """Opacity of generated pixels, float32 [H, W]: 1 in the hole, falling to 0 over `feather` pixels."""
  if not feather:
    return hole.astype(np.float32)
  return np.clip(1.0 - _distance(hole) / (feather + 1), 0.0, 1.0).astype(np.float32)


def _distance(hole: np.ndarray) -> np.ndarray:
  """Distance of every pixel to the hole, in pixels."""
  return ndimage.distance_transform_edt(~hole) if hole.any() else np.full(hole.shape, np.inf)


def box_hole(box: Sequence[int], shape: tuple[int, int]) -> np.ndarray:
  """A rectangular hole, bool [H, W].

  Args:
    box: (x0, y0, x1, y1) in pixels from the top left corner; x1 and y1 are exclusive.
    shape: (H, W).

  Raises:
    UserError: if the box is empty or extends beyond the image.
  """
  x0, y0, x1, y1 = box
  text = f"box {x0},{y0},{x1},{y1}"
  if x0 >= x1 or y0 >= y1:
    raise UserError(f"{text} is empty: give X0,Y0,X1,Y1 with X0 < X1 and Y0 < Y1")
  if x0 < 0 or y0 < 0 or x1 > shape[1] or y1 > shape[0]:
    raise UserError(
      f"{text} extends beyond the image: X must be within 0..{shape[1]} and Y within 0..{shape[0]}; to add "
      "pixels outside, use outpainting"
    )
  hole = np.zeros(shape, bool)
  hole[y0:y1, x0:x1] = True
  return hole


def extend(images: np.ndarray, sides: Sequence[int | float]) -> tuple[np.ndarray, np.ndarray]:
  """Puts images on a larger canvas.

  Args:
    images: [b, H, W, c].
    sides: what to add at the top, right, bottom and left: integers are pixels, floats are fractions of the
      image's height or width.

  Returns:
    The canvas [b, H', W', c], and its new pixels, bool [H', W'].

  Raises:
    UserError: if a side is not such a number, or if all add nothing or too much.
  """
  height, width = images.shape[1:3]
  for side in sides:
    number = isinstance(side, int | float | np.integer | np.floating) and not isinstance(side, bool)
    if not number or not 0 <= side < math.inf:
      raise UserError(f"cannot add {side!r} to a side: give pixels such as 64, or a fraction such as 0.5")
  top, right, bottom, left = (
    round(side * length) if isinstance(side, float | np.floating) else int(side)
    for side, length in zip(sides, (height, width, height, width), strict=True)
  )
  if not top + right + bottom + left:
    raise UserError("nothing is added on any side: give pixels such as 64, or a fraction such as 0.5")
  if (height + top + bottom) * (width + left + right) > _MAX_PIXELS:
    raise UserError(
      f"a picture of {width + left + right} x {height + top + bottom} pixels exceeds the limit of "
      f"{_MAX_PIXELS:,}: add less, or resize it first"
    )
  rows, columns = (top, bottom), (left, right)
  canvas = np.pad(images, ((0, 0), rows, columns, (0, 0)))
  return canvas, np.pad(np.zeros((height, width), bool), (rows, columns), constant_values=True)
