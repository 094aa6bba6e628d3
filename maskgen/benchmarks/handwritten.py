"""The pipeline's baseline: a hand-written loop over the same pictures, as in TensorFlow's documentation.

It only shuffles, decodes, augments and batches: it has no labels, cannot be resumed, stops at damaged
pictures and ignores orientation and transparency. It shares no op with the pipeline.
"""

import functools
import math
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from maskgen.data.cpu_tf import tf
from maskgen.data.picture import JPEG_DECODING
from maskgen.data.preprocess import parse_preprocess
from maskgen.data.reader import reason_of
from maskgen.data.sources import Source, open_source
from maskgen.data.sources.digits import load as load_digits
from maskgen.errors import UserError

# The number of encoded pictures that are kept in memory to measure decoding alone.
_PICTURES = 512


class Handwritten:
  """The hand-written loop over the pictures of one split."""

  def __init__(self, source: str, split: str, preprocess: str):
    """Opens the pictures.

    Raises:
      UserError: if they are not files or are damaged, or the preprocessing has no counterpart here.
    """
    parsed = parse_preprocess(preprocess)
    known = ("decode", _CROP, *_OPS)
    for name in [op.name for op in parsed.ops] + ["two_views"] * (parsed.views > 1):
      if name not in known:
        raise UserError(
          f"{name} in preprocessing '{preprocess}' has no counterpart in the hand-written loop, which has "
          f"{', '.join(known)}: use only these"
        )
    opened = open_source(source, split)
    image = tf.data.Dataset.range(1).map(opened.fetch).element_spec.get("image")
    if image is None or image.dtype != tf.string:
      raise UserError(
        f"{opened.name} has no encoded pictures, so there is no decoding to compare: give another data.source"
      )
    self._name, self._size = opened.name, opened.size
    self._keys, self._read = _keys(source, split, opened)
    self._channels = parsed.ops[0].arguments["channels"]
    self._ops = [(op.name, op.arguments) for op in parsed.ops[1:]]
    files = self._keys.take(_PICTURES).map(self._read, num_parallel_calls=tf.data.AUTOTUNE)
    self._files = np.array(list(self._iterate(files)), object)
    self._are_jpegs = all(file.startswith(b"\xff\xd8\xff") for file in self._files)

  def batches(self, batch_size: int) -> Generator[np.ndarray]:
    """Yields images uint8 [b, h, w, c] endlessly, each epoch in another order."""
    dataset = self._keys.shuffle(self._size).repeat()
    dataset = dataset.map(self._load, num_parallel_calls=tf.data.AUTOTUNE)
    return self._iterate(dataset.batch(batch_size).prefetch(tf.data.AUTOTUNE))

  def decodings(self, batch_size: int) -> Generator[np.ndarray]:
    """Decodes pictures in memory endlessly, and yields the decoded sizes in bytes, int32 [b]."""
    dataset = tf.data.Dataset.from_tensor_slices(self._files).repeat()
    dataset = dataset.map(lambda file: tf.size(self._decode(file)), num_parallel_calls=tf.data.AUTOTUNE)
    return self._iterate(dataset.batch(batch_size).prefetch(tf.data.AUTOTUNE))

  def _iterate(self, dataset: tf.data.Dataset) -> Generator[np.ndarray]:
    try:
      yield from dataset.as_numpy_iterator()
    except tf.errors.OpError as error:
      raise UserError(
        f"the hand-written loop cannot read {self._name} ({reason_of(error)}): compare on intact pictures"
      ) from error

  def _decode(self, file: tf.Tensor) -> tf.Tensor:
    def as_jpeg() -> tf.Tensor:
      return tf.io.decode_jpeg(file, self._channels, dct_method=JPEG_DECODING)

    if self._are_jpegs:
      return as_jpeg()
    # `decode_image` does not take a `dct_method`.
    others = functools.partial(tf.io.decode_image, file, self._channels, expand_animations=False)
    return tf.cond(tf.io.is_jpeg(file), as_jpeg, others)

  def _load(self, key: tf.Tensor) -> tf.Tensor:
    file, ops = self._read(key), list(self._ops)
    if self._are_jpegs and ops and ops[0][0] == _CROP:
      arguments = ops.pop(0)[1]
      rectangle = _random_rectangle(tf.io.extract_jpeg_shape(file), arguments["scale"])
      image = tf.io.decode_and_crop_jpeg(file, rectangle, self._channels, dct_method=JPEG_DECODING)
      image = _resize(image, _pair(arguments["size"]), arguments)
    else:
      image = self._decode(file)
    for name, arguments in ops:
      if name == _CROP:
        top, left, height, width = tf.unstack(_random_rectangle(tf.shape(image), arguments["scale"]))
        image = tf.slice(image, [top, left, 0], [height, width, self._channels])
        image = _resize(image, _pair(arguments["size"]), arguments)
      else:
        image = _OPS[name](image, arguments)
    return image


def _keys(spec: str, split: str, source: Source) -> tuple[tf.data.Dataset, Callable[[tf.Tensor], tf.Tensor]]:
  """Returns one epoch of keys of pictures, and a function that reads a key's file."""
  if spec == "digits":
    return tf.data.Dataset.from_tensor_slices(load_digits(split)[0]), tf.identity
  if spec.startswith("folder:"):
    paths = [source.describe(index) for index in range(source.size)]
    return tf.data.Dataset.from_tensor_slices(paths), tf.io.read_file
  return tf.data.Dataset.range(source.size), lambda index: source.fetch(index)["image"]


def _resize(image: tf.Tensor, size: Any, arguments: dict[str, Any]) -> tf.Tensor:
  resized = tf.image.resize(image, size, arguments["method"], antialias=arguments["antialias"])
  return tf.saturate_cast(tf.round(resized), tf.uint8)


def _random_rectangle(shape: tf.Tensor, scale: tuple[float, float]) -> tf.Tensor:
  """As large on average as the pipeline's; tf.image.sample_distorted_bounding_box's is a tenth smaller."""
  height, width = tf.cast(shape[0], tf.float32), tf.cast(shape[1], tf.float32)
  area = height * width * tf.random.uniform([], *scale)
  ratio = tf.exp(tf.random.uniform([], -math.log(4 / 3), math.log(4 / 3)))
  h = tf.minimum(tf.round(tf.sqrt(area / ratio)), height)
  w = tf.minimum(tf.round(tf.sqrt(area * ratio)), width)
  top = tf.floor(tf.random.uniform([]) * (height - h + 1))
  left = tf.floor(tf.random.uniform([]) * (width - w + 1))
  return tf.cast(tf.stack([top, left, h, w]), tf.int32)


def _resize_small(image: tf.Tensor, arguments: dict[str, Any]) -> tf.Tensor:
  sides = tf.cast(tf.shape(image)[:2], tf.float32)
  new_sides = tf.round(sides * (arguments["size"] / tf.reduce_min(sides)))
  return _resize(image, tf.cast(new_sides, tf.int32), arguments)


def _center_crop(image: tf.Tensor, arguments: dict[str, Any]) -> tf.Tensor:
  height, width = _pair(arguments["size"])
  top, left = (tf.shape(image)[0] - height) // 2, (tf.shape(image)[1] - width) // 2
  image = image[top : top + height, left : left + width]
  return tf.ensure_shape(image, [height, width, None])


def _random_crop(image: tf.Tensor, arguments: dict[str, Any]) -> tf.Tensor:
  return tf.image.random_crop(image, (*_pair(arguments["size"]), image.shape[-1]))


def _pad(image: tf.Tensor, arguments: dict[str, Any]) -> tf.Tensor:
  n = arguments["n"]
  return tf.pad(image, [[n, n], [n, n], [0, 0]], arguments["mode"])


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
  return size if isinstance(size, tuple) else (size, size)


# The only op that does not need the whole decoded picture.
_CROP = "random_resized_crop"
_OPS: dict[str, Callable[[tf.Tensor, dict[str, Any]], tf.Tensor]] = {
  "resize": lambda image, arguments: _resize(image, _pair(arguments["size"]), arguments),
  "resize_small": _resize_small,
  "center_crop": _center_crop,
  "random_crop": _random_crop,
  "pad": _pad,
  "flip_lr": lambda image, arguments: tf.image.random_flip_left_right(image),
}
