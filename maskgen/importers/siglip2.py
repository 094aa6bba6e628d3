"""SigLIP 2's image encoders of variable size, NaFlex (Tschannen et al. 2025), from transformers.

They read squares of pixels by a linear layer, which is a convolution, and interpolate one table of positions
to the grid of each picture. An encoder here has one size, any height and width that its patches divide; the
feature network takes every picture at its own. SigLIP 2's other encoders are SigLIP's: see `siglip`.
"""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
from etils import epath

from maskgen.errors import UserError
from maskgen.importers import Converted, siglip, tensors, towers
from maskgen.numerics import resizing

# How positions are interpolated.
WEIGH = functools.partial(resizing.antialiased_weights, filter="bilinear")
# The most patches of a picture, if preprocessor_config.json does not say it, and how exact the scale is.
PATCHES, SCALES = 256, (1e-6, 100.0, 1e-5)


@dataclasses.dataclass(frozen=True)
class NaflexPreparation(towers.Preparation):
  """Resizes pictures to as many patches as fit, and nearly keeps their shape.

  Attributes:
    patch: side of a patch, in pixels.
    patches: the most patches of a picture.
  """

  patch: int = 16
  patches: int = PATCHES

  def _resized(self, height: int, width: int) -> tuple[int, int]:
    """The largest scale by bisection, as published; sides are rounded up to patches."""

    def scaled(scale: float) -> tuple[int, int]:
      rows, columns = (max(1, math.ceil(side * scale / self.patch)) for side in (height, width))
      return rows, columns

    low, high, tolerance = SCALES
    while high - low >= tolerance:
      middle = (low + high) / 2
      low, high = (middle, high) if math.prod(scaled(middle)) <= self.patches else (low, middle)
    rows, columns = scaled(low)
    return rows * self.patch, columns * self.patch


def convert(
  path: epath.PathLike, encoder_heads: int | None = None, image_size: int | tuple[int, int] | None = None
) -> Converted:
  """Converts an image encoder, or that of a whole model, for images of one size.

  Args:
    path: of the folder, or of its file of tensors.
    encoder_heads: the number of heads, by default that of config.json or the published models.
    image_size: the side or (height, width) of images, to which positions are interpolated; by default that
      of the tensors.

  Raises:
    UserError: if the tensors are those of another network, see `towers.take` and `towers.settle`.
  """
  stored = _read(path)
  section = siglip.infer(stored, encoder_heads)
  ignored = ("head.", *siglip.IGNORED)
  model, params, unused = towers.take(stored, section, siglip.to_transformers, siglip.USED, ignored)
  if image_size is not None:
    model, params = towers.resize(model, params, towers.square(image_size), WEIGH)
    section["image_size"] = model.image_size
  return towers.export(model, section, params, unused)


def load(path: epath.PathLike) -> towers.Tower:
  """Loads the feature network, whose features are those of the head.

  Raises:
    UserError: as `convert`, or if preprocessor_config.json asks for something that is not supported.
  """
  stored = _read(path)
  model, params = siglip.with_head(stored)
  given = stored.processor
  side, patches = given.get("patch_size", model.patch), given.get("max_num_patches", PATCHES)
  if not given.get("do_resize", True) or side != model.patch or not isinstance(patches, int) or patches < 1:
    raise UserError(
      f"{path}: {towers.PROCESSOR} does not resize to a number of patches of {model.patch} pixels, as this "
      "network needs: use the published one"
    )
  default = NaflexPreparation(None, None, "bilinear", model.patch, patches)
  return towers.Tower(model, params, towers.read_processor(stored, default), WEIGH)


def _read(path: epath.PathLike) -> towers.Stored:
  """What is stored, with the linear layer as a convolution."""
  stored = towers.read(path, siglip.PREFIXES)
  if getattr(stored.tensors.get(siglip.KERNEL), "ndim", 2) == 4:
    raise UserError(f"{path} is of SigLIP 2's fixed size, or SigLIP's: give --format=siglip, or siglip:PATH")
  linear = tensors.need(path, stored.tensors, siglip.KERNEL, 2)
  channels = stored.config.get("num_channels", 3)
  side = math.isqrt(linear.shape[1] // channels)
  if linear.shape[1] != side**2 * channels:
    raise UserError(f"{path}: its patches of {linear.shape[1]} numbers are no squares of {channels} channels")
  kernel = linear.reshape(-1, side, side, channels).transpose(0, 3, 1, 2)
  found: dict[str, Any] = {**stored.tensors, siglip.KERNEL: np.ascontiguousarray(kernel)}
  return stored._replace(tensors=found)
