"""Compares pictures one by one with the originals that they reconstruct."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from maskgen import images as images_lib
from maskgen import sheet
from maskgen.errors import UserError
from maskgen.evaluators.picture_sets import PictureSet
from maskgen.evaluators.reconstruction import compare
from maskgen.importers.lpips import Loaded
from maskgen.models import lpips
from maskgen.numerics import similarity

METRICS = ("psnr", "ssim", "ms_ssim", "lpips")
# Of pictures on a page: their number, and the side of their crops.
_SHOWN, _CROP = 12, 192

# From made and original images, uint8 [b, h, w, 3], to float32 [b] by metric.
Measure = Callable[[np.ndarray, np.ndarray], Mapping[str, jax.Array]]


def check(metrics: Sequence[str], made: PictureSet, originals: PictureSet, perceptual: Loaded | None) -> None:
  """Checks that there is an original for each picture, and that they are large enough.

  Args:
    metrics: names in `METRICS`.
    made: the pictures.
    originals: their originals.
    perceptual: the networks of LPIPS, if it is among the metrics.

  Raises:
    UserError: if not.
  """
  if len(made) != len(originals):
    raise UserError(
      f"{made.name} has {len(made):,} pictures and {originals.name} {len(originals):,}: '{metrics[0]}' needs "
      "one original for each"
    )
  for pair in zip(made.names, originals.names, strict=True):
    stems = [pathlib.PurePath(name).with_suffix("").as_posix() for name in pair]
    if stems[0] != stems[1] and not any(name.startswith("arr_0[") for name in pair):
      raise UserError(
        f"'{pair[0]}' of {made.name} would be compared with '{pair[1]}' of {originals.name}: give pictures "
        "and originals the same names"
      )
  smallest = {"ms_ssim": similarity.SMALLEST_SIDE}
  if perceptual is not None:
    smallest["lpips"] = lpips.SMALLEST_SIDE[perceptual.name]
  for name in metrics:
    if min(made.shape) < smallest.get(name, 1):
      raise UserError(
        f"'{name}' needs sides of at least {smallest[name]} pixels, but {made.name} has {min(made.shape)}: "
        "leave it out"
      )


def build(metrics: Sequence[str], perceptual: Loaded | None) -> Measure:
  """Returns the function that computes metrics of pairs; LPIPS has its backbone in its name.

  Args:
    metrics: names in `METRICS`.
    perceptual: the networks of LPIPS, if it is among them.
  """

  @jax.jit
  def measure(weights, made: jax.Array, originals: jax.Array) -> dict[str, jax.Array]:
    found = compare(originals, made)
    pair = images_lib.to_float(originals), images_lib.to_float(made)
    if "ms_ssim" in metrics:
      found["ms_ssim"] = similarity.ms_ssim(*pair)
    result = {name: found[name] for name in metrics if name != "lpips"}
    if perceptual is not None:
      params, heads = weights
      result[f"lpips_{perceptual.name}"] = lpips.distance(perceptual.network, params, heads, *pair)
    return result

  weights = None if perceptual is None else jax.device_put((perceptual.params, perceptual.heads))
  return functools.partial(measure, weights)


def collect(
  measure: Measure, made: PictureSet, originals: PictureSet, batch_size: int
) -> dict[str, np.ndarray]:
  """The metrics of each picture, float32 [n] by name."""
  pairs = zip(made.read(batch_size), originals.read(batch_size), strict=True)
  parts = [jax.device_get(measure(*pair)) for pair in pairs]
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def reconstructed(
  originals: PictureSet, reconstruct: Callable[[np.ndarray], np.ndarray], side: tuple[int, int], name: str
) -> PictureSet:
  """Pictures that a model makes of originals, in tiles of its own size.

  Args:
    originals: the originals.
    reconstruct: from images uint8 [b, *side, 3] to images of the same type and shape.
    side: height and width that the model takes.
    name: of the model, for messages.

  Raises:
    UserError: if the originals are not made of whole tiles.
  """
  if any(size % tile for size, tile in zip(originals.shape, side, strict=True)):
    raise UserError(
      f"pictures of {originals.name} have {originals.shape} (height, width) pixels, and {name} takes {side}: "
      "crop or resize them to multiples of that"
    )

  def read(batch_size: int) -> Iterator[np.ndarray]:
    for batch in originals.read(batch_size):
      made = reconstruct(tiles(batch, side))
      rows, columns = (size // tile for size, tile in zip(originals.shape, side, strict=True))
      made = made.reshape(len(batch), rows, columns, *side, 3).swapaxes(2, 3)
      yield made.reshape(batch.shape)

  return dataclasses.replace(originals, name=name, read=read)


def tiles(batch: np.ndarray, side: tuple[int, int]) -> np.ndarray:
  """Cuts images [b, h, w, c] into tiles [b * rows * columns, *side, c], row by row."""
  count, height, width, channels = batch.shape
  cut = batch.reshape(count, height // side[0], side[0], width // side[1], side[1], channels)
  return cut.swapaxes(2, 3).reshape(-1, *side, channels)


def page(made: PictureSet, originals: PictureSet, numbers: Mapping[str, np.ndarray]) -> np.ndarray:
  """Draws the centres of the first originals and pictures side by side, with metrics: uint8 [h, w, 3].

  Args:
    made: the pictures.
    originals: their originals.
    numbers: of each picture, by metric.
  """
  first, second = (next(pictures.read(_SHOWN))[:_SHOWN] for pictures in (originals, made))
  cards = [
    sheet.Card(
      [images_lib.enlarge(_centre(image), _CROP) for image in pair],
      [", ".join(f"{name} {values[i]:.4g}" for name, values in numbers.items())],
      originals.names[i],
    )
    for i, pair in enumerate(zip(first, second, strict=True))
  ]
  means = ", ".join(f"{name} {values.mean(dtype=np.float64):.4g}" for name, values in numbers.items())
  return sheet.draw({f"originals and {made.name} ({len(made):,} pictures: {means})": cards})


def _centre(image: np.ndarray) -> np.ndarray:
  top, left = (max(size - _CROP, 0) // 2 for size in image.shape[:2])
  return image[top : top + _CROP, left : left + _CROP]
