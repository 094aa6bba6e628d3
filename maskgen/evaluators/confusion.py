"""Which classes a classifier takes for which: tables and a picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import stats

_SIDE = 640  # of all cells together, in pixels, at least
_CELL = 34  # of a cell with a number, at least
_NAMED = 40  # classes; of more, only colours are drawn
_LINE, _GAP = 24, 6
_RIGHT, _WRONG, _PAPER = (31, 99, 176), (200, 76, 28), (255, 255, 255)


def count(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
  """How many images of each true class (rows) were taken for each class: int [classes, classes]."""
  counts = np.zeros((classes, classes), np.int64)
  np.add.at(counts, (labels, predicted), 1)
  return counts


def per_class(counts: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
  """A row for each class: its accuracy with Wilson's 95% interval, and the class it is mostly taken for."""
  rows = []
  for i, name in enumerate(names):
    total, right = int(counts[i].sum()), int(counts[i, i])
    row: dict[str, Any] = {"class": name, "images": total, "top1": "", "low": "", "high": ""}
    if total:
      low, high = stats.binomtest(right, total).proportion_ci(0.95, method="wilson")
      row |= {"top1": round(right / total, 4), "low": round(float(low), 4), "high": round(float(high), 4)}
    wrong = np.where(np.arange(len(names)) == i, 0, counts[i])
    most = int(wrong.argmax())
    rows.append({**row, "taken_for": names[most] if wrong[most] else "", "as_often": int(wrong[most])})
  return rows


def table(counts: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
  """The counts as rows, a column for each predicted class; equal names are numbered."""
  if len(set(names)) < len(names):
    names = [f"{name} ({i})" for i, name in enumerate(names)]
  return [
    {"true class": name, **dict(zip(names, row, strict=True))}
    for name, row in zip(names, counts.tolist(), strict=True)
  ]


def draw(counts: np.ndarray, names: Sequence[str]) -> np.ndarray:
  """Draws the matrix as uint8 [h, w, 3], each cell with its percentage of the row; large ones without text.

  Colours grow with the square root of the share, so that rare confusions show.
  """
  classes = len(names)
  shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  full = np.where(np.eye(classes, dtype=bool)[..., None], _RIGHT, _WRONG)
  colours = _PAPER + np.sqrt(shares)[..., None] * (full - np.asarray(_PAPER))
  if classes > _NAMED:
    side = max(1, _SIDE // classes)
    return np.kron(colours.round().astype(np.uint8), np.ones((side, side, 1), np.uint8))
  cell = max(_CELL, _SIDE // classes)
  font = ImageFont.load_default(13)
  margin = int(max(font.getlength(name) for name in names)) + 2 * _GAP
  upright = margin > cell  # names of columns that do not fit above them
  top = _LINE + (margin if upright else _LINE)
  image = Image.new("RGB", (margin + classes * cell + 1, top + classes * cell + 1), _PAPER)
  pen = ImageDraw.Draw(image)
  pen.text((_GAP, _GAP), "row: true class, column: predicted class, % of the row", "black", font)
  for i, name in enumerate(names):
    middle = i * cell + cell // 2
    pen.text((margin - _GAP, top + middle), name, "black", font, anchor="rm")
    if upright:
      strip = Image.new("RGB", (margin, _LINE), _PAPER)
      ImageDraw.Draw(strip).text((_GAP, _LINE // 2), name, "black", font, anchor="lm")
      image.paste(strip.rotate(90, expand=True), (margin + middle - _LINE // 2, _LINE))
    else:
      pen.text((margin + middle, top - _GAP), name, "black", font, anchor="ms")
    for j in range(classes):
      left, upper = margin + j * cell, top + i * cell
      colour = tuple(colours[i, j].round().astype(int).tolist())
      pen.rectangle((left, upper, left + cell, upper + cell), colour, (225, 225, 225))
      if counts[i, j]:
        percent = round(100 * shares[i, j])
        ink = "white" if shares[i, j] > 0.3 else "black"
        pen.text((left + cell // 2, upper + cell // 2), str(percent or "<1"), ink, font, anchor="mm")
  return np.asarray(image)
