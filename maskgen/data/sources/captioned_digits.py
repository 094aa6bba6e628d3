"""The embedded digits in colour on coloured backgrounds, with captions; see `maskgen.data.digit_scenes`."""

import numpy as np

from maskgen.data import digit_scenes as scenes
from maskgen.data.cpu_tf import tf
from maskgen.data.sources import Source, check_split, source
from maskgen.data.sources.digits import SPLITS, Digits, load

# The number of pictures of each digit, by split.
_PICTURES = {"train": 64, "test": 4}
# The probability that a training caption omits a phrase.
_UNSAID = 0.05
# The variation of colours, in levels of 255.
_JITTER = 12.0
# The ink's opacity is that of the scan times a contrast, minus faint ink: crisp strokes differ more by class.
_CONTRAST, _FAINT = 2.0, 0.3
# The number of random numbers per picture.
_DRAWS = 15


@source("captioned_digits")
def open_captioned_digits(argument: str, split: str) -> Source:
  """Opens a split; pictures uint8 [16, 16, 3] are drawn when they are fetched.

  Record i shows digit i % n of the split's n digits. Training captions omit phrases at random, so that models
  also learn short captions; test captions are complete.
  """
  del argument
  check_split("captioned_digits", split, SPLITS)
  files, labels = load(split)
  glyphs = np.stack([tf.io.decode_png(file).numpy()[..., 0] for file in files]).astype(np.float32) / 255.0
  boxes = scenes.ink_box(glyphs)
  opacities, centres = tf.constant(glyphs), tf.constant((boxes[:, ::2] + boxes[:, 1::2]) / 2)
  unsaid = _UNSAID if split == "train" else 0.0

  def fetch(index: tf.Tensor) -> dict[str, tf.Tensor]:
    which = index % len(glyphs)
    seed = tf.stack([tf.constant(SPLITS.index(split), tf.int64), index])
    draws = tf.random.stateless_uniform([_DRAWS], seed)
    said = _choose(draws[:5]) | {"class": tf.gather(labels, which)}
    image = _draw(tf.gather(opacities, which), tf.gather(centres, which), said, draws[5:11])
    return {"image": image, "label": said["class"], "caption": _describe(said, draws[11:] >= unsaid)[None]}

  version = f"{Digits.VERSION} {split} 4"
  size = _PICTURES[split] * len(glyphs)
  return Source("captioned_digits", size, scenes.KINDS["class"], fetch, version)


def _choose(draws: tf.Tensor) -> dict[str, tf.Tensor]:
  """Chooses the values of all kinds except the class, int64 scalars."""

  def choose(draw: tf.Tensor, number: int) -> tf.Tensor:
    return tf.cast(draw * number, tf.int64)

  return {
    "colour": choose(draws[0], len(scenes.INKS)),
    "background": choose(draws[1], len(scenes.BACKGROUNDS)),
    "size": choose(draws[2], 2),
    "place": 3 * choose(draws[3], 3) + choose(draws[4], 3),
  }


def _draw(glyph: tf.Tensor, centre: tf.Tensor, said: dict[str, tf.Tensor], draws: tf.Tensor) -> tf.Tensor:
  """Draws a glyph float32 [g, g], whose ink has this centre [2], as described: uint8 [16, 16, 3]."""
  height = tf.cast(tf.gather(tf.constant(scenes.HEIGHTS), said["size"]), tf.float32)
  weights = []
  for axis, third in enumerate((said["place"] // 3, said["place"] % 3)):
    place = height / 2 + (scenes.SIDE - height) * tf.cast(third, tf.float32) / 2
    # The positions of the picture's pixels in the glyph.
    pixels = tf.range(scenes.SIDE, dtype=tf.float32) + 0.5 - place
    samples = pixels * scenes.GLYPH_SIDE / height + centre[axis] - 0.5
    weights.append(tf.nn.relu(1.0 - tf.abs(samples[:, None] - tf.range(scenes.GLYPH_SIDE, dtype=tf.float32))))
  grey = weights[0] @ glyph @ tf.transpose(weights[1])
  opacity = tf.clip_by_value(_CONTRAST * grey - _FAINT, 0.0, 1.0)[..., None]
  colour, background = (
    tf.gather(tf.constant(list(palette.values()), tf.float32), value) + _JITTER * (2.0 * draw - 1.0)
    for palette, value, draw in (
      (scenes.INKS, said["colour"], draws[:3]),
      (scenes.BACKGROUNDS, said["background"], draws[3:]),
    )
  )
  image = background + opacity * (colour - background)
  return tf.cast(tf.round(tf.clip_by_value(image, 0.0, 255.0)), tf.uint8)


def _describe(said: dict[str, tf.Tensor], is_said: tf.Tensor) -> tf.Tensor:
  """The caption, as `scenes.describe` writes it; is_said bool [4] selects phrases other than the class."""
  empty = tf.constant("")

  def phrase(kind: str, form: str) -> tf.Tensor:
    return tf.gather(tf.constant([form.format(word) for word in scenes.KINDS[kind]]), said[kind])

  def perhaps(which: int, text: tf.Tensor) -> tf.Tensor:
    return tf.where(is_said[which], text, empty)

  return tf.strings.join(
    [
      "a ",
      perhaps(0, phrase("size", "{} ")),
      perhaps(1, phrase("colour", "{} ")),
      phrase("class", "{}"),
      perhaps(2, phrase("place", " {}")),
      perhaps(3, phrase("background", " on a {} background")),
    ]
  )
