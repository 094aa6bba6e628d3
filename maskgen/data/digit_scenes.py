"""Pictures of one coloured digit: their captions, and their contents as read from pixels. No TensorFlow.

A picture shows a small or large bright digit at one of nine places on a dark background. A caption states all
of this in `WORDS`, but not how the digit is written: a picture holds more than its caption.
Letters: b batch, s side of a picture, g side of a glyph.
"""

import re
from collections.abc import Mapping

import numpy as np

SIDE = 16
GLYPH_SIDE = 8

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SIZES = ("small", "large")
# RGB of bright ink and of dark backgrounds, six hues each in the order of the colour circle: a picture with
# shifted hues looks like any other. No channel of an ink is darker than one of a background. If
# either could be the brighter one, the shape of a class would be light as often as dark, and models trained
# from scratch would learn classes last.
INKS = {
  "red": (250, 95, 95),
  "yellow": (250, 250, 95),
  "green": (95, 250, 95),
  "cyan": (95, 250, 250),
  "blue": (95, 95, 250),
  "pink": (250, 95, 250),
}
BACKGROUNDS = {
  "red": (90, 10, 10),
  "olive": (90, 90, 10),
  "green": (10, 90, 10),
  "teal": (10, 90, 90),
  "blue": (10, 10, 90),
  "purple": (90, 10, 90),
}
# Row by row.
_PLACES = (
  "at the top left",
  "at the top",
  "at the top right",
  "at the left",
  "in the middle",
  "at the right",
  "at the bottom left",
  "at the bottom",
  "at the bottom right",
)
# The attributes of a picture, with the words for each value.
KINDS: Mapping[str, tuple[str, ...]] = {
  "class": _DIGITS,
  "colour": tuple(INKS),
  "background": tuple(BACKGROUNDS),
  "size": _SIZES,
  "place": _PLACES,
}
# All words of captions.
WORDS = tuple(
  dict.fromkeys(" ".join(["a", *_SIZES, *INKS, *BACKGROUNDS, *_DIGITS, *_PLACES, "on", "background"]).split())
)
# The height in pixels of small and large digits.
HEIGHTS = (8, 12)

_CAPTION = re.compile(
  "a (?:(?P<size>{size}) )?(?:(?P<colour>{colour}) )?(?P<class>{class})(?: (?P<place>{place}))?"
  "(?: on a (?P<background>{background}) background)?".format_map(
    {kind: "|".join(words) for kind, words in KINDS.items()}
  )
)
# A pixel with a higher opacity counts as ink.
_INK = 0.35
# Thresholds in pixels: between the heights of small and large digits, and between the centres of the three
# places along a side.
_SIZE_BORDER = 9.75
_PLACE_BORDERS = (6.9, 9.1)
# The number of most opaque pixels that determine the colour.
_PIXELS_OF_COLOUR = 6


def describe(attributes: Mapping[str, int]) -> str:
  """Returns a caption, given the index of the value of `class` and of any others of `KINDS`."""
  words = {kind: KINDS[kind][value] for kind, value in attributes.items()}
  ground = f"on a {words['background']} background" if "background" in words else None
  parts = ["a", *(words.get(kind) for kind in ("size", "colour", "class", "place")), ground]
  return " ".join(filter(None, parts))


def parse(caption: str) -> dict[str, int] | None:
  """The inverse of `describe`; None for any other text."""
  match = _CAPTION.fullmatch(caption)
  if match is None:
    return None
  return {kind: KINDS[kind].index(word) for kind, word in match.groupdict().items() if word}


def contradict(attributes: Mapping[str, int], kind: str) -> dict[str, int]:
  """Returns the same description with another value of one kind."""
  number = len(KINDS[kind])
  return {**attributes, kind: (attributes[kind] + number // 2) % number}


def ink_box(opacity: np.ndarray) -> np.ndarray:
  """The bounding boxes of the ink of pictures float [b, s, s]: top, bottom, left, right, float32 [b, 4].

  The box of a picture without ink is the whole picture.
  """
  side = opacity.shape[-1]
  ink = opacity > _INK
  edges = []
  for axis in (2, 1):
    lines = np.any(ink, axis=axis)
    first, last = lines.argmax(axis=1), side - lines[:, ::-1].argmax(axis=1)
    edges += [first, last]
  return np.stack(edges, axis=1).astype(np.float32)


def read(images: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """Reads everything from pictures except the class, for which a classifier must look at the glyph.

  The background is the median of the border. The colour is that of the pixels farthest from the background. A
  pixel's opacity is its position between the two.

  Args:
    images: float32 [b, s, s, 3] in [0, 1], s being `SIDE`.

  Returns:
    The index of the value of each kind except `class`, int [b]; and the ink of the digit, cropped to a square
    of its height and rescaled: float32 [b, g, g].
  """
  border = np.concatenate([images[:, 0], images[:, -1], images[:, 1:-1, 0], images[:, 1:-1, -1]], axis=1)
  ground = np.median(border, axis=1)
  pixels = images.reshape(len(images), -1, 3) - ground[:, None]
  farthest = np.argsort(-np.square(pixels).sum(axis=-1), axis=1)[:, :_PIXELS_OF_COLOUR]
  contrast = np.take_along_axis(pixels, farthest[..., None], axis=1).mean(axis=1)
  scale = np.maximum(np.square(contrast).sum(axis=-1), 1e-6)
  opacity = np.clip(np.einsum("bpc,bc->bp", pixels, contrast) / scale[:, None], 0.0, 1.0)
  opacity = opacity.reshape(images.shape[:3])
  top, bottom, left, right = ink_box(opacity).T
  height = bottom - top
  row, column = (
    np.digitize((low + high) / 2, _PLACE_BORDERS) for low, high in ((top, bottom), (left, right))
  )
  values = {
    "colour": _nearest(INKS, ground + contrast),
    "background": _nearest(BACKGROUNDS, ground),
    "size": (height > _SIZE_BORDER).astype(int),
    "place": 3 * row + column,
  }
  rows = _shrink((top + bottom) / 2, height)
  columns = _shrink((left + right) / 2, height)
  return values, np.einsum("bgy,byx,bhx->bgh", rows, opacity, columns).astype(np.float32)


def _nearest(palette: Mapping[str, tuple[int, int, int]], colours: np.ndarray) -> np.ndarray:
  """Returns the indices of the palette colours nearest to colours [b, 3]."""
  known = np.array(list(palette.values()), np.float32) / 255.0
  return np.square(colours[:, None] - known).sum(axis=-1).argmin(axis=1)


def _shrink(centre: np.ndarray, length: np.ndarray) -> np.ndarray:
  """Weights [b, g, s] of g linearly interpolated samples of s pixels, over a length around a centre."""
  samples = (np.arange(GLYPH_SIDE) + 0.5) / GLYPH_SIDE - 0.5
  places = centre[:, None] + length[:, None] * samples - 0.5
  return np.maximum(1.0 - np.abs(places[..., None] - np.arange(SIDE)), 0.0)
