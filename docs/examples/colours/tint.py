"""A preprocessing op: `tint.tint(0.2)` in a specification."""

from maskgen.data.cpu_tf import tf
from maskgen.data.ops import op


@op
def tint(image: tf.Tensor, strength: float = 0.2, *, seed: tf.Tensor) -> tf.Tensor:
  """Moves each channel up or down at random, by at most `strength` of its range."""
  if not 0.0 <= strength <= 1.0:
    raise ValueError(f"strength is {strength!r}, not a number from 0 to 1")
  shift = tf.random.stateless_uniform([image.shape[-1]], seed, -255.0 * strength, 255.0 * strength)
  return tf.cast(tf.clip_by_value(tf.round(tf.cast(image, tf.float32) + shift), 0.0, 255.0), tf.uint8)
