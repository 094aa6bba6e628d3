"""Where records come from: `digits`, `folder:/path`, `synthetic`.

To add a source, decorate a function with `@source("name")`, or with `@source("name:what")` if it
takes an argument. It is called as `open(argument, split)`, raises `UserError` on an argument or
split that does not exist, and returns a `Source`, which offers random access: `fetch(index)` gives
the same record for the same index, whatever was fetched before. Everything else (shuffling,
epochs, resuming, slices per process) is the pipeline's.
"""

import dataclasses
import os
from collections.abc import Callable

from maskgen.data.cpu_tf import tf
from maskgen.data.folder import list_pictures
from maskgen.errors import UserError, nearest


def _record_number(index: int) -> str:
  return f"record {index}"


@dataclasses.dataclass(frozen=True)
class Source:
  """One split of a data set.

  Attributes:
    name: how error messages call it.
    size: the number of records.
    class_names: the name of each label, or None if the records have no labels.
    fetch: a TensorFlow-traceable function from an int64 scalar in [0, size) to a record: "image",
      either a scalar string (an encoded picture) or uint8 [h, w, c], and "label", an int64 scalar,
      if there are labels.
    describe: the name of one record in error messages, such as the path of its file.
  """

  name: str
  size: int
  class_names: tuple[str, ...] | None
  fetch: Callable[[tf.Tensor], dict[str, tf.Tensor]]
  describe: Callable[[int], str] = _record_number


SOURCES: dict[str, tuple[str, Callable[[str, str], Source]]] = {}


def source(usage: str) -> Callable[[Callable[[str, str], Source]], Callable[[str, str], Source]]:
  """Registers the function that opens the sources written as `usage`."""

  def register(function: Callable[[str, str], Source]) -> Callable[[str, str], Source]:
    SOURCES[usage.partition(":")[0]] = (usage, function)
    return function

  return register


def open_source(spec: str, split: str) -> Source:
  """Opens one split of the source that `spec` names, such as "digits" or "folder:/path".

  Raises:
    UserError: if the source or the split is unknown, malformed or empty.
  """
  prefix, _, argument = spec.partition(":")
  if prefix not in SOURCES:
    raise UserError(f"data source '{spec}' is unknown{nearest(prefix, SOURCES)}")
  usage, function = SOURCES[prefix]
  if bool(argument) != (":" in usage):
    raise UserError(f"data source '{spec}' is malformed: write it as '{usage}'")
  opened = function(argument, split)
  if not opened.size:
    raise UserError(f"split '{split}' of data source '{spec}' is empty: choose another split")
  return opened


def _check_split(name: str, split: str, splits: tuple[str, ...]) -> None:
  if split not in splits:
    raise UserError(f"split '{split}' of {name} is unknown{nearest(split, splits)}")


@source("digits")
def _digits(argument: str, split: str) -> Source:
  del argument
  # Here, since it imports scikit-learn and TFDS, which other sources don't need.
  from maskgen.data import digits

  _check_split("digits", split, digits.SPLITS)
  images, labels = digits.load(split)

  def fetch(index: tf.Tensor) -> dict[str, tf.Tensor]:
    return {"image": tf.gather(images, index), "label": tf.gather(labels, index)}

  return Source("digits", len(images), tuple(str(digit) for digit in range(10)), fetch)


@source("folder:/path")
def _folder(root: str, split: str) -> Source:
  paths, labels, class_names = list_pictures(os.path.expanduser(root), split)
  path_table = tf.constant([os.fsencode(path) for path in paths], tf.string)
  label_table = None if labels is None else tf.constant(labels, tf.int64)

  def fetch(index: tf.Tensor) -> dict[str, tf.Tensor]:
    record = {"image": tf.io.read_file(tf.gather(path_table, index))}
    if label_table is not None:
      record["label"] = tf.gather(label_table, index)
    return record

  return Source(f"folder '{root}'", len(paths), class_names, fetch, lambda index: paths[index])


_SYNTHETIC_SPLITS = {"train": range(256), "test": range(256, 320)}
_SHAPES = ("disc", "square")
_COLOURS = {
  "red": (230, 60, 60),
  "green": (60, 200, 80),
  "blue": (70, 90, 240),
  "yellow": (235, 215, 70),
  "white": (245, 245, 245),
}


@source("synthetic")
def _synthetic(argument: str, split: str) -> Source:
  del argument
  _check_split("synthetic", split, tuple(_SYNTHETIC_SPLITS))
  numbers = _SYNTHETIC_SPLITS[split]
  names = tuple(f"{colour} {shape}" for colour in _COLOURS for shape in _SHAPES)

  def fetch(index: tf.Tensor) -> dict[str, tf.Tensor]:
    number = index + numbers.start
    label = number % len(names)
    return {"image": _draw(number, label), "label": label}

  return Source("synthetic", len(numbers), names, fetch)


def _draw(number: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
  """Draws uint8 [64, 64, 3]: one disc or square of one colour on a dark grey gradient."""
  size = 64
  seed = tf.stack([tf.zeros_like(number), number])
  x, y, radius, grey, slope = tf.unstack(tf.random.stateless_uniform([5], seed))
  axis = (tf.range(size, dtype=tf.float32) + 0.5) / size
  radius = 0.15 + 0.15 * radius
  across = tf.abs(axis - (0.3 + 0.4 * x))[None, :]
  down = tf.abs(axis - (0.3 + 0.4 * y))[:, None]
  disc = tf.sqrt(across**2 + down**2)
  square = tf.maximum(across, down)
  distance = tf.where(label % len(_SHAPES) == 0, disc, square)
  inside = tf.clip_by_value((radius - distance) * size + 0.5, 0.0, 1.0)[..., None]
  background = (20.0 + 60.0 * grey + 40.0 * slope * axis)[:, None, None]
  colours = tf.constant(list(_COLOURS.values()), tf.float32)
  colour = tf.gather(colours, label // len(_SHAPES))
  return tf.cast(tf.round(background + inside * (colour - background)), tf.uint8)
