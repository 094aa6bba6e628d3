"""Pictures as a page sends and shows them: PNG files in base64."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from maskgen import images
from maskgen.errors import UserError
from maskgen.serving import Model

MOST_SIDE = 1536  # pixels


def decode(value: Any, name: str, mode: str = "RGB") -> Image.Image:
  """Reads a PNG file in base64 and converts it to a mode of Pillow.

  Raises:
    UserError: if it is none, or larger than `MOST_SIDE`; only the head of a larger one is read.
  """
  if not isinstance(value, str):
    raise UserError(f"{name} is missing: give a PNG file in base64")
  try:
    picture: Image.Image = Image.open(io.BytesIO(base64.b64decode(value, validate=True)), formats=["PNG"])
    width, height = picture.size
    if max(width, height) <= MOST_SIDE:
      picture = picture.convert(mode)
  except Exception as error:  # Pillow raises many kinds.
    raise UserError(f"{name} is not a PNG file in base64: save the picture again") from error
  if max(width, height) > MOST_SIDE:
    raise UserError(f"{name} has {width} x {height} pixels: give at most {MOST_SIDE} along each side")
  return picture


def encode(picture: np.ndarray) -> str:
  """The picture, uint8 or float32 [h, w, 1 or 3], as a PNG file in base64."""
  return base64.b64encode(images.png(images.to_rgb(picture))).decode()


def fit(picture: Image.Image, model: Model) -> np.ndarray:
  """The centre of a picture at the model's size, uint8 [h, w, c]."""
  height, width, channels = model.objective.image_shape
  fitted = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
  return images.as_array(fitted, channels=channels)
