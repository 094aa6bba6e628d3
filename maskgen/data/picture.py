"""Picture files as tensors: decoded as a viewer displays them, and only as far as needed."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from maskgen import images
from maskgen.data.cpu_tf import tf

# Larger pictures are rejected, as many are decoded at once; Pillow's limit against decompression bombs.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 26)
# As Pillow decodes; the pixels of TensorFlow's default differ by one grey level on average.
JPEG_DECODING = "INTEGER_ACCURATE"
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_CUT_OFF = "the file is truncated"
_ORIENTATION = 0x0112  # the EXIF tag
# Ordinary metadata is in the first bytes of a file; to look further costs a call to Python.
_HEAD = 4096
# Of a PNG: a transparent colour, and orientation in a chunk of its own or in one of text.
_PNG_METADATA = "tRNS|eXIf|Raw profile"
_PNG_CHUNK = re.compile(rb"tRNS|eXIf|[tzi][ET]XtRaw profile")


class Picture:
  """An encoded picture: traceable by TensorFlow, and lazy.

  TensorFlow decodes ordinary JPEG and PNG files. Pillow decodes the rest: other formats, EXIF orientation
  (applied), transparency (composited on white), palettes, CMYK, 16 bits (scaled to 8), and files with an
  unexpected end, as truncation is only noticed when a whole file is decoded. Of an animation the first frame
  is used. Colour profiles are not applied.

  Using pixels of a file that cannot be decoded, or has more than `MAX_PIXELS`, raises `tf.errors.OpError`; so
  does using those that are missing in a JPEG that was cut off and ended by a marker.

  Attributes:
    channels: 3 (RGB) or 1 (luma, ITU-R BT.601).
    sides: int32 [2], height and width as displayed.
  """

  def __init__(self, data: tf.Tensor, channels: int):
    """Opens the content of a file, a scalar string."""
    self.channels = channels
    self._data = data
    self._plain_jpeg = _is_plain_jpeg(data)
    # Other files than plain JPEGs cannot be decoded partially: decode once, for the sides and all crops.
    self._whole = tf.cond(self._plain_jpeg, lambda: tf.zeros([0, 0, channels], tf.uint8), self._decode_whole)
    self.sides = tf.cond(
      self._plain_jpeg, lambda: tf.image.extract_jpeg_shape(data)[:2], lambda: tf.shape(self._whole)[:2]
    )

  def pixels(self) -> tf.Tensor:
    """The whole picture, uint8 [h, w, channels]."""

    def decode() -> tf.Tensor:
      return self._there(tf.image.decode_jpeg(self._data, self.channels, dct_method=JPEG_DECODING))

    return self._with_channels(tf.cond(self._plain_jpeg, decode, lambda: self._whole))

  def crop(self, begin: tf.Tensor, extent: tf.Tensor) -> tf.Tensor:
    """A rectangle, uint8 [h, w, channels]; of a plain JPEG nothing else is decoded.

    Args:
      begin: int32 [2], top and left.
      extent: int32 [2], height and width.
    """

    def decode() -> tf.Tensor:
      rectangle = tf.concat([begin, extent], 0)
      return self._there(
        tf.image.decode_and_crop_jpeg(self._data, rectangle, self.channels, dct_method=JPEG_DECODING)
      )

    def cut() -> tf.Tensor:
      return tf.slice(self._whole, tf.concat([begin, [0]], 0), tf.concat([extent, [self.channels]], 0))

    return self._with_channels(tf.cond(self._plain_jpeg, decode, cut))

  def _there(self, pixels: tf.Tensor) -> tf.Tensor:
    """Asserts that pixels of a plain JPEG are not missing; if any are, the last ones are."""
    suspicious = tf.reduce_all(pixels[-1, -1] == images.MISSING[1])
    cut_off = tf.cond(suspicious, lambda: _ask(images.is_cut_off, self._data), lambda: tf.constant(False))
    with tf.control_dependencies([tf.debugging.Assert(~cut_off, [_CUT_OFF])]):
      return tf.identity(pixels)

  def _decode_whole(self) -> tf.Tensor:
    def decode_png() -> tf.Tensor:
      return tf.image.decode_png(self._data, self.channels)

    def decode_other() -> tf.Tensor:
      return _decode_with_pillow(self._data, self.channels)

    return self._with_channels(tf.cond(_is_plain_png(self._data), decode_png, decode_other))

  def _with_channels(self, pixels: tf.Tensor) -> tf.Tensor:
    pixels.set_shape([None, None, self.channels])
    return pixels


def _is_plain_jpeg(data: tf.Tensor) -> tf.Tensor:
  """Whether a file is a JPEG that TensorFlow decodes as a viewer would."""

  def look_inside() -> tf.Tensor:
    shape = tf.image.extract_jpeg_shape(data)
    # Thumbnails, which are JPEG files themselves, may follow "Photoshop" and "JFXX".
    doubtful = _has(_head(data), "Exif|Photoshop|JFXX") | ~_scan_begins(_head(data))
    upright = tf.cond(doubtful, lambda: _ask(_is_upright, data), lambda: tf.constant(True))
    return upright & _is_small(shape[0], shape[1]) & ((shape[2] == 1) | (shape[2] == 3))

  return tf.cond(_is_framed(data, b"\xff\xd8\xff", b"\xff\xd9"), look_inside, lambda: tf.constant(False))


def _is_plain_png(data: tf.Tensor) -> tf.Tensor:
  """Whether a file is an 8-bit PNG, grey or RGB, without transparency or orientation."""

  def look_inside() -> tf.Tensor:
    width, height = tf.unstack(
      tf.io.decode_raw(tf.strings.substr(data, 16, 8), tf.int32, little_endian=False), 2
    )
    bits_and_colour = tf.strings.substr(data, 24, 2)
    ordinary = (bits_and_colour == b"\x08\x00") | (bits_and_colour == b"\x08\x02")
    plain = tf.cond(
      tf.strings.length(data) > _HEAD,
      lambda: _ask(_is_without_metadata, data),
      lambda: ~_has(data, _PNG_METADATA),
    )
    return ordinary & _is_small(height, width) & plain

  framed = _is_framed(data, b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", b"IEND\xaeB`\x82")
  return tf.cond(framed, look_inside, lambda: tf.constant(False))


def _is_framed(data: tf.Tensor, first: bytes, last: bytes) -> tf.Tensor:
  """Whether a file begins and ends with these bytes."""
  end = tf.strings.substr(data, tf.maximum(tf.strings.length(data) - len(last), 0), len(last))
  return (tf.strings.substr(data, 0, len(first)) == first) & (end == last)


def _head(data: tf.Tensor) -> tf.Tensor:
  return tf.strings.substr(data, 0, _HEAD)


def _has(data: tf.Tensor, words: str) -> tf.Tensor:
  """Whether one of the `|`-separated words is in a string."""
  return tf.strings.regex_full_match(data, rf"\C*({words})\C*")


def _scan_begins(data: tf.Tensor) -> tf.Tensor:
  """Whether the marker that ends the metadata of a JPEG, and the two bytes of a length, are in a string."""
  data = tf.io.decode_raw(data, tf.uint8)
  return tf.reduce_any((data[:-3] == 0xFF) & (data[1:-2] == 0xDA) & (data[2:-1] == 0) & (data[3:] <= 14))


def _is_small(height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
  return tf.cast(height, tf.int64) * tf.cast(width, tf.int64) <= MAX_PIXELS


def _is_upright(data: bytes) -> np.bool_:
  """Whether no EXIF data rotates a picture."""
  try:
    image = Image.open(io.BytesIO(data))
    return np.bool_("exif" not in image.info or image.getexif().get(_ORIENTATION, 1) == 1)
  except Exception:  # Unreadable metadata does not rotate a picture.
    return np.bool_(True)


def _is_without_metadata(data: bytes) -> np.bool_:
  """Whether no chunk of a PNG changes how it is shown."""
  place = 8
  while place + 8 <= len(data):
    if _PNG_CHUNK.match(data, place + 4):
      return np.bool_(False)
    place += 12 + int.from_bytes(data[place : place + 4])
  return np.bool_(True)


def _graph(function: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
  """Traces a function also in eager execution, where `tf.numpy_function` would truncate strings at zeros."""
  traced = functools.cache(lambda: tf.function(function, autograph=False))
  return lambda *args: traced()(*args)


@_graph
def _ask(question: Callable[[bytes], np.bool_], data: tf.Tensor) -> tf.Tensor:
  return tf.ensure_shape(tf.numpy_function(question, [data], tf.bool), ())


@_graph
def _decode_with_pillow(data: tf.Tensor, channels: int) -> tf.Tensor:
  # An exception would be logged with its traceback, unlike an assertion.
  pixels, wrong = tf.numpy_function(_try_to_decode, [data, channels], (tf.uint8, tf.string))
  with tf.control_dependencies([tf.debugging.Assert(tf.strings.length(wrong) == 0, [wrong])]):
    return tf.identity(pixels)


def _try_to_decode(data: bytes, channels: int) -> tuple[np.ndarray, bytes]:
  """Returns uint8 [h, w, channels], and an error message, empty on success."""
  try:
    return _decode_as_shown(data, channels), b""
  except UnidentifiedImageError:
    wrong = "the file is not a picture, or of an unknown format" if data else "the file is empty"
  except Image.DecompressionBombError:
    wrong = f"the file declares more than {MAX_PIXELS:,} pixels"
  except Exception as error:  # Pillow's plugins raise many kinds.
    wrong = str(error) or type(error).__name__
  return np.zeros((0, 0, channels), np.uint8), wrong.encode()


def _decode_as_shown(data: bytes, channels: int) -> np.ndarray:
  """Decodes any file that Pillow supports to uint8 [h, w, channels]."""
  image: Image.Image = Image.open(io.BytesIO(data))
  image.load()  # errors here mean a damaged picture
  if image.format in ("JPEG", "MPO"):
    last = image.getpixel((image.width - 1, image.height - 1))
    if {*(last if isinstance(last, tuple) else (last,))} <= {*images.MISSING} and images.is_cut_off(data):
      raise ValueError(_CUT_OFF)
  with contextlib.suppress(Exception):  # Unreadable metadata does not rotate a picture.
    image = ImageOps.exif_transpose(image)
  image = _to_8_bits(image)
  if image.has_transparency_data:
    image = images.on_white(image)
  pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
  return pixels.reshape(*pixels.shape[:2], channels)


def _to_8_bits(image: Image.Image) -> Image.Image:
  """Maps 0..65535 to 0..255; other deep pixels have no range that a viewer could assume."""
  if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
    return image
  values = np.asarray(image)
  if image.mode == "F" or values.min() < 0 or values.max() > 65535:
    raise ValueError(f"pixels of type {values.dtype} are not 8 or 16 bits deep")
  return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
