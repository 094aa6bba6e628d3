"""Synthetic pictures for tests and `:debug` configs: discs and squares in five colours."""

from maskgen.data.cpu_tf import tf
from maskgen.data.sources import Source, check_split, source

_SPLITS = {"train": range(256), "test": range(256, 320)}
_SHAPES = ("disc", "square")
_COLOURS = {
  "red": (230, 60, 60),
  "green": (60, 200, 80),
  "blue": (70, 90, 240),
  "yellow": (235, 215, 70),
  "white": (245, 245, 245),
}


@source("synthetic")
def open_synthetic(argument: str, split: str) -> Source:
  """Opens a split; pictures are drawn when they are fetched."""
  del argument
  check_split("synthetic", split, tuple(_SPLITS))
  numbers = _SPLITS[split]
  names = tuple(f"{colour} {shape}" for colour in _COLOURS for shape in _SHAPES)

  def fetch(index: tf.Tensor) -> dict[str, tf.Tensor]:
    number = index + numbers.start
    label = number % len(names)
    return {"image": _draw(number, label), "label": label}

  return Source("synthetic", len(numbers), names, fetch, split)


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
