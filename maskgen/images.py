"""Pixels at the boundaries of the program: uint8 and float32 images, grids, PNG files."""

import io
import math
import os
from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image, ImageOps, UnidentifiedImageError

from maskgen.errors import UserError

# What users give as one image or several: also paths of picture files.
Pictures = np.ndarray | jax.Array | Image.Image | str | os.PathLike[str] | Sequence[Any]

# Pictures of phones, which Pillow opens if the extra `heif` is installed.
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
try:
  import pillow_heif
except ImportError:
  HAS_HEIF = False
else:
  pillow_heif.register_heif_opener()
  HAS_HEIF = True

# What a JPEG decoder shows in place of pixels that are missing; 127 in inverted CMYK.
MISSING = (127, 128)
# Entropy-coded data without a marker, even after a byte 0xFF.
_MORE_DATA = b"\0" + bytes(range(1, 255)) * 8

_GREY = 0.5
# How far floats may leave [0, 1]: resizing white gives a little more than 1.
_ROUNDING = 1e-3


def to_float(images: jax.Array) -> jax.Array:
  """Converts uint8 [..., h, w, c] in 0..255, or float32 in [0, 1], to float32 in [0, 1]."""
  if images.dtype == jnp.uint8:
    return images.astype(jnp.float32) / 255.0
  if images.dtype != jnp.float32:
    raise UserError(f"images are {images.dtype}: give uint8 in 0..255 or float32 in [0, 1]")
  return images


def to_uint8(images: np.ndarray) -> np.ndarray:
  """Converts float [..., h, w, c] in [0, 1] (clipped), or uint8, to uint8 in 0..255."""
  images = np.asarray(images)
  if images.dtype == np.uint8:
    return images
  return np.rint(np.clip(images, 0.0, 1.0) * 255.0).astype(np.uint8)


def to_rgb(images: np.ndarray) -> np.ndarray:
  """Converts images [..., h, w, 1 or 3] as `to_uint8` does, and grey ones to three channels."""
  images = to_uint8(images)
  return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def to_rgb_on_devices(images: jax.Array) -> jax.Array:
  """Does what `to_rgb` does, where the images are."""
  if images.dtype != jnp.uint8:
    images = jnp.rint(jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)
  return jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def like(given: np.ndarray, made: np.ndarray) -> np.ndarray:
  """Converts float images in [0, 1] to the dtype of the images a user gave: uint8, or unchanged."""
  return to_uint8(made) if given.dtype == np.uint8 else made


def shift_hues(images: jax.Array, shift: jax.Array) -> jax.Array:
  """Shifts hues of float images [b, h, w, 3] by multiples of 60 degrees, int32 [b]: 1 turns red to yellow.

  The largest and the smallest channel of a pixel do not change, so grey does not change either.
  """
  opposite = images.max(axis=-1, keepdims=True) + images.min(axis=-1, keepdims=True) - images
  odd = shift % 2
  thirds = (shift - 3 * odd) // 2
  channels = (jnp.arange(3)[None] - thirds[:, None]) % 3
  from_here = jnp.where(odd[:, None, None, None] == 1, opposite, images)
  return jnp.take_along_axis(from_here, channels[:, None, None, :], axis=-1)


def as_array(images: Any, *, channels: int = 3) -> np.ndarray:
  """An image or several of them as one array: arrays, Pillow images, paths of files, or a list of these.

  Args:
    images: of which Pillow's and files are converted to the number of channels, on white.
    channels: 3, or 1 for grey.

  Raises:
    UserError: for a list of images of different shapes, or a file that cannot be read.
  """
  if is_path(images):
    images = open_picture(os.path.expanduser(images), os.fspath(images))
  if isinstance(images, Image.Image):
    picture = on_white(images) if channels == 3 else on_white(images).convert("L")
    return np.asarray(picture).reshape(*picture.size[::-1], channels)
  if not isinstance(images, list | tuple):
    return np.asarray(images)
  arrays = [as_array(image, channels=channels) for image in images]
  for array in arrays:
    if array.shape != arrays[0].shape:
      raise UserError(
        f"images have shapes {arrays[0].shape} and {array.shape}: resize them to one, or give them one by one"
      )
  return np.stack(arrays) if arrays else np.zeros(0)


def is_path(image: Any) -> TypeGuard[str | os.PathLike[str]]:
  """Whether an image that a user passes is the path of a file."""
  return isinstance(image, str | os.PathLike)


def check_images(images: Any, *, channels: int = 3) -> np.ndarray:
  """Checks images that a user passes, and returns them as uint8 or float32.

  Args:
    images: see `as_array`; [b, h, w, c], uint8 in 0..255 or floating point in [0, 1], which rounding may
      have left by up to 0.001.
    channels: the number of channels c that the model takes.

  Raises:
    UserError: on another rank, number of channels, dtype or range, or without a pixel.
  """
  images = as_array(images, channels=channels)
  if images.ndim != 4:
    raise UserError(f"images have shape {images.shape}: give a batch, [b, h, w, c], or a list of images")
  if images.shape[-1] != channels:
    raise UserError(f"images have shape {images.shape}: the last axis must hold {channels} channels")
  if not images.size:
    raise UserError(f"images have shape {images.shape}: give at least one of at least one pixel")
  if images.dtype == np.uint8:
    return images
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise UserError(f"images are {images.dtype}: give uint8 in 0..255 or floats in [0, 1]")
  floats = images.astype(np.float32)
  low, high = float(floats.min()), float(floats.max())
  if not (low >= -_ROUNDING and high <= 1.0 + _ROUNDING):  # also catches NaN
    raise UserError(
      f"float images range over [{low:g}, {high:g}]: scale them to [0, 1], or give uint8 in 0..255"
    )
  return np.clip(floats, 0.0, 1.0)


def regular(values: Any, name: str, remedy: str) -> np.ndarray:
  """Returns values that a user passes, such as nested lists, as an array.

  Args:
    values: the values.
    name: names them in errors.
    remedy: what to give instead of lists of different lengths.

  Raises:
    UserError: for such lists.
  """
  try:
    return np.asarray(values)
  except ValueError:
    raise UserError(f"{name} is ragged: {remedy}") from None


def check_mask(mask: Any, shape: tuple[int, ...], name: str) -> np.ndarray:
  """Checks a mask that a user passes, and returns it as booleans, True where masked.

  Args:
    mask: booleans, or numbers that are 0 and 1, or 0 and 255; a last axis of size 1 may follow.
    shape: of what it masks.
    name: names it in errors.

  Raises:
    UserError: on another shape, or for other values.
  """
  mask = regular(mask, name, "give booleans, True where masked")
  if mask.shape == (*shape, 1):
    mask = mask[..., 0]
  if mask.shape != shape:
    raise UserError(f"{name} has shape {mask.shape}: it must be {shape}, the size of what it masks")
  if mask.dtype == bool:
    return mask
  masked = mask != 0
  if not any((mask[masked] == value).all() for value in (1, 255)):
    raise UserError(f"{name} has values other than 0 and 1: give booleans, True where masked")
  return masked


def open_picture(path: epath.PathLike, what: str) -> Image.Image:
  """Reads a picture file and applies its EXIF orientation.

  Args:
    path: of the file.
    what: names it in errors.

  Raises:
    UserError: if there is none, or it is damaged, or has more than 8 bits per channel.
  """
  if not epath.Path(path).is_file():
    raise UserError(f"{what}: there is no such file")
  try:
    data = epath.Path(path).read_bytes()
    picture: Image.Image = Image.open(io.BytesIO(data))
    picture.load()
    if data.startswith(b"\xff\xd8") and is_cut_off(data):
      raise ValueError("the file is truncated")
    picture = ImageOps.exif_transpose(picture)
  except Exception as error:  # Pillow's plugins raise many kinds.
    reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
    raise UserError(f"{what} cannot be read as a picture: {reason}") from error
  if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
    raise UserError(f"{what} has more than 8 bits per channel: save it with 8")
  return picture


def is_cut_off(data: bytes) -> bool:
  """Whether a JPEG ends before its last pixels, although the marker of its end is there.

  Decoders fill the rest with grey, or with less detail in a progressive file, and report nothing. But only of
  such a file do they decode more, if there is more.
  """
  place = 2
  while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != b"\xda":  # before the scan
    is_fill = data[place + 1 : place + 2] == b"\xff"
    place += 1 if is_fill else 2 + int.from_bytes(data[place + 2 : place + 4])
  end = data.find(b"\xff\xd9", place)
  return end > 0 and _decode(data) != _decode(data[:end] + _MORE_DATA + data[end:])


def _decode(data: bytes) -> bytes:
  return Image.open(io.BytesIO(data)).tobytes()


def on_white(picture: Image.Image) -> Image.Image:
  """An RGB picture, with transparency composited on white."""
  if not picture.has_transparency_data:
    return picture.convert("RGB")
  picture = picture.convert("RGBA")
  return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def shade(images: np.ndarray, unknown: np.ndarray) -> np.ndarray:
  """Shows unknown tokens as grey, tinted with what the images [..., h, w, c] have there.

  Args:
    images: float, in [0, 1].
    unknown: bool [..., h', w'], whose sides divide those of the images.
  """
  factor = np.array(images.shape[-3:-1]) // unknown.shape[-2:]
  hidden = unknown.repeat(factor[0], axis=-2).repeat(factor[1], axis=-1)[..., None]
  return np.where(hidden, _GREY + 0.25 * (images - _GREY), images)


def grid(images: np.ndarray, columns: int | None = None, padding: int = 2) -> np.ndarray:
  """Tiles images [b, h, w, c] into one uint8 picture [H, W, 3], row by row on white."""
  images = to_rgb(images)
  count, height, width, _ = images.shape
  columns = columns or math.ceil(math.sqrt(count))
  rows = math.ceil(count / columns)
  canvas = np.full(
    (rows * (height + padding) + padding, columns * (width + padding) + padding, 3), 255, np.uint8
  )
  for i, image in enumerate(images):
    top = padding + (i // columns) * (height + padding)
    left = padding + (i % columns) * (width + padding)
    canvas[top : top + height, left : left + width] = image[..., :3]
  return canvas


def enlarge(picture: np.ndarray, smallest: int = 512) -> np.ndarray:
  """Repeats pixels of [h, w, c] until the longer side reaches `smallest`."""
  factor = max(1, -(-smallest // max(picture.shape[:2])))
  return np.repeat(np.repeat(picture, factor, axis=0), factor, axis=1)


def metadata(picture: Image.Image) -> dict[str, Any]:
  """What an edited copy of a picture needs to be shown and printed alike, as options of `write_png`.

  Returns:
    "icc_profile", if the picture has a colour profile of RGB pixels; "dpi" (x, y), if it has a resolution.
  """
  found: dict[str, Any] = {}
  profile, dpi = (picture.info.get(name) for name in ("icc_profile", "dpi"))
  if profile and profile[16:20] == b"RGB ":  # the pixels of others are converted
    found["icc_profile"] = profile
  if dpi and all(0 < float(number) < 1e6 for number in dpi):
    found["dpi"] = tuple(map(float, dpi))
  return found


def write_png(path: epath.PathLike, picture: np.ndarray, **options: Any) -> None:
  """Writes one picture [h, w, 3], uint8 or float in [0, 1], as a PNG file; for options see `metadata`."""
  epath.Path(path).write_bytes(png(picture, **options))


def png(picture: np.ndarray, **options: Any) -> bytes:
  """The contents of such a file."""
  buffer = io.BytesIO()
  Image.fromarray(to_uint8(picture)).save(buffer, format="PNG", **options)
  return buffer.getvalue()
