"""Contact sheets: sections of pictures with captions."""

import bisect
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maskgen import images

# In pixels. A sheet is only wider than this if two cards need it.
_WIDTH = 1280
_MARGIN, _SEAM, _LINE = 16, 4, 18
# Sizes of the fonts.
_TITLE, _TEXT = 18, 13
# The longer side of a picture that `fit` gives: about this, or at least this.
_MOST, _LEAST = 384, 192
_BLACK, _GREY, _PAPER = (20, 20, 20), (120, 120, 120), (255, 255, 255)


@dataclasses.dataclass(frozen=True)
class Card:
  """Pictures of one record side by side, with text below.

  Attributes:
    pictures: uint8 [h, w, c] with 1 or 3 channels; all cards of a section have as many, of the same size.
    texts: in black; each takes up to two lines and is truncated.
    name: in grey, the last line; truncated at the front, since paths differ at their ends.
  """

  pictures: Sequence[np.ndarray]
  texts: Sequence[str]
  name: str


def draw(sections: Mapping[str, Sequence[Card]]) -> np.ndarray:
  """Draws sections of cards, each under its title, as one picture uint8 [h, w, 3]."""
  width = max(_WIDTH, *(2 * (_card_width(cards) + _MARGIN) + _MARGIN for cards in sections.values()))
  drawn = [_draw_section(title, cards, width) for title, cards in sections.items()]
  sheet = Image.new("RGB", (max(s.width for s in drawn), sum(s.height for s in drawn)), _PAPER)
  top = 0
  for section in drawn:
    sheet.paste(section, (0, top))
    top += section.height
  return np.asarray(sheet)


def fit(picture: np.ndarray) -> np.ndarray:
  """Scales a picture of any size, [h, w, c] as for `to_uint8`, for a card: uint8 [h, w, 3]."""
  pixels = np.broadcast_to(images.to_uint8(picture), (*picture.shape[:2], 3))
  shown = Image.fromarray(images.enlarge(pixels, _LEAST))
  shown.thumbnail((_MOST, _MOST))
  return np.asarray(shown)


def page(text: str, height: int, width: int) -> np.ndarray:
  """Renders text in place of a picture: uint8 [height, width, 3], truncated to fit."""
  image = Image.new("RGB", (width, height), (235, 235, 235))
  pen = ImageDraw.Draw(image)
  for number, line in enumerate(_wrap(text, width - 2 * _SEAM, (height - _SEAM) // _LINE)):
    pen.text((_SEAM, _SEAM + number * _LINE), line, _BLACK, _font(_TEXT))
  return np.asarray(image)


def heat(picture: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Shows weights float [h', w'] over a picture, uint8 [h, w, 3]: grey up to the mean, red at the largest."""
  above = np.maximum(weights - weights.mean(), 0.0)
  scaled = Image.fromarray((above / max(above.max(), 1e-12)).astype(np.float32))
  share = np.asarray(scaled.resize(picture.shape[1::-1], Image.Resampling.BILINEAR))[..., None]
  grey = 0.35 * picture.mean(axis=-1, keepdims=True) + 0.65 * 255
  return images.to_uint8(((1 - share) * grey + share * (225, 30, 30)).astype(np.float32) / 255)


def _card_width(cards: Sequence[Card]) -> int:
  return len(cards[0].pictures) * (cards[0].pictures[0].shape[1] + _SEAM) - _SEAM


def _draw_section(title: str, cards: Sequence[Card], sheet_width: int) -> Image.Image:
  height, width = cards[0].pictures[0].shape[:2]
  card_width = _card_width(cards)
  rows = -(-len(cards) // ((sheet_width - _MARGIN) // (card_width + _MARGIN)))
  columns = -(-len(cards) // rows)
  texts = [[line for text in card.texts for line in _wrap(text, card_width, 2)] for card in cards]
  card_height = height + _SEAM + _LINE * (1 + max(map(len, texts))) + _MARGIN
  inner = max(columns * (card_width + _MARGIN) - _MARGIN, _length(title, _TITLE))
  first = 2 * _MARGIN + _LINE  # the top of the first row
  image = Image.new("RGB", (inner + 2 * _MARGIN, first + rows * card_height), _PAPER)
  pen = ImageDraw.Draw(image)
  pen.text((_MARGIN, _MARGIN), title, _BLACK, _font(_TITLE))
  for number, (card, lines) in enumerate(zip(cards, texts, strict=True)):
    row, column = divmod(number, columns)
    left, top = _MARGIN + column * (card_width + _MARGIN), first + row * card_height
    for place, picture in enumerate(card.pictures):
      pixels = np.ascontiguousarray(np.broadcast_to(picture, (height, width, 3)))
      image.paste(Image.fromarray(pixels), (left + place * (width + _SEAM), top))
    top += height + _SEAM
    for line in lines:
      pen.text((left, top), line, _BLACK, _font(_TEXT))
      top += _LINE
    pen.text((left, top), _cut(card.name, card_width, in_front=True), _GREY, _font(_TEXT))
  return image


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
  return ImageFont.load_default(size)


def _length(text: str, size: int) -> int:
  """The width of a line in pixels."""
  return math.ceil(_font(size).getlength(text))


def _wrap(text: str, width: int, most: int) -> list[str]:
  """Wraps a text into at most `most` lines."""
  words, lines = text.split(), list[str]()
  while words and len(lines) < most - 1:
    more = bisect.bisect(range(2, len(words) + 1), width, key=lambda n: _length(" ".join(words[:n]), _TEXT))
    lines.append(_cut(" ".join(words[: more + 1]), width))
    words = words[more + 1 :]
  return [*lines, _cut(" ".join(words), width)] if words else lines


def _cut(text: str, width: int, *, in_front: bool = False) -> str:
  """Truncates a line to a width in pixels, with an ellipsis."""
  if _length(text, _TEXT) <= width:
    return text

  def shortened(count: int) -> str:
    return "…" + text[len(text) - count :] if in_front else text[:count] + "…"

  return shortened(bisect.bisect(range(1, len(text)), width, key=lambda n: _length(shortened(n), _TEXT)))
