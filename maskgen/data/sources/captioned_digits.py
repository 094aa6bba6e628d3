"""The embedded digits in colour on coloured backgrounds, with captions; see `maskgen.data.digit_scenes`."""

import numpy as np

from maskgen.data import digit_scenes as scenes
from maskgen.data.cpu_tf import tf
from maskgen.data.sources import Source, check_split, source
from maskgen.data.sources.digits import SPLITS, Digits, load

# The number of pictures of each digit, by split.
_PICTURES = {"train": 64, "test": 4}
# The probability that a training caption omits a phrase.
_OMITTED = 0.05
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
  omitted = _OMITTED if split == "train" else 0.0

  def fetch(index: tf.Tensor) -> dict[str, tf.Tensor]:
    which = index % len(glyphs)
    seed = tf.stack([tf.constant(SPLITS.index(split), tf.int64), index])
    draws = tf.random.stateless_uniform([_DRAWS], seed)
    attributes = _choose(draws[:5]) | {"class": tf.gather(labels, which)}
    image = _draw(tf.gather(opacities, which), tf.gather(centres, which), attributes, draws[5:11])
    return {
      "image": image,
      "label": attributes["class"],
      "caption": _describe(attributes, draws[11:] >= omitted)[None],
    }

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


def _draw(
  glyph: tf.Tensor, centre: tf.Tensor, attributes: dict[str, tf.Tensor], draws: tf.Tensor
) -> tf.Tensor:
  """Draws a glyph float32 [g, g], whose ink has this centre [2], as described: uint8 [16, 16, 3]."""
  height = tf.cast(tf.gather(tf.constant(scenes.HEIGHTS), attributes["size"]), tf.float32)
  weights = []
  for axis, third in enumerate((attributes["place"] // 3, attributes["place"] % 3)):
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
      (scenes.INKS, attributes["colour"], draws[:3]),
      (scenes.BACKGROUNDS, attributes["background"], draws[3:]),
    )
  )
  image = background + opacity * (colour - background)
  return tf.cast(tf.round(tf.clip_by_value(image, 0.0, 255.0)), tf.uint8)


def _describe(attributes: dict[str, tf.Tensor], is_mentioned: tf.Tensor) -> tf.Tensor:
  """The caption, as by `scenes.describe`; is_mentioned bool [4] selects the phrases besides the class."""
  empty = tf.constant("")

  def phrase(kind: str, form: str) -> tf.Tensor:
    return tf.gather(tf.constant([form.format(word) for word in scenes.KINDS[kind]]), attributes[kind])

  def if_mentioned(which: int, text: tf.Tensor) -> tf.Tensor:
    return tf.where(is_mentioned[which], text, empty)

  return tf.strings.join(
    [
      "a ",
      if_mentioned(0, phrase("size", "{} ")),
      if_mentioned(1, phrase("colour", "{} ")),
      phrase("class", "{}"),
      if_mentioned(2, phrase("place", " {}")),
      if_mentioned(3, phrase("background", " on a {} background")),
    ]
  )
