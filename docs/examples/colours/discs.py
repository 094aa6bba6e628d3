"""A data source: `discs:1000` is a thousand pictures of one coloured disc each."""

from maskgen.data.cpu_tf import tf
from maskgen.data.sources import Source, check_split, source
from maskgen.errors import UserError

SPLITS = ("train", "test")
SIDE = 16


@source("discs:count")
def open_discs(argument: str, split: str) -> Source:
  """Opens a split of `argument` pictures uint8 [16, 16, 3]; picture i is drawn from random numbers of i."""
  check_split("discs", split, SPLITS)
  if not argument.isdecimal():
    raise UserError(f"data source 'discs:{argument}': give a number of pictures, such as 'discs:1000'")

  def fetch(index: tf.Tensor) -> dict[str, tf.Tensor]:
    seed = tf.stack([tf.constant(SPLITS.index(split), tf.int64), index])
    draws = tf.random.stateless_uniform([9], seed)
    centre, radius = SIDE * draws[:2], SIDE * (0.2 + 0.3 * draws[2])
    pixels = tf.stack(tf.meshgrid(*[tf.range(SIDE, dtype=tf.float32)] * 2, indexing="ij"), axis=-1)
    inside = tf.norm(pixels - centre, axis=-1, keepdims=True) < radius
    return {"image": tf.cast(255.0 * tf.where(inside, draws[3:6], draws[6:]), tf.uint8)}

  return Source(f"discs:{argument}", int(argument), None, fetch, fingerprint=f"1 {argument} {split}")
