"""Feature spaces for comparing images, by name."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from maskgen import images as images_lib
from maskgen.data import digit_scenes as scenes
from maskgen.errors import UserError, nearest
from maskgen.evaluators.batches import gather
from maskgen.evaluators.context import Context
from maskgen.importers import mobilenet_v2
from maskgen.models import perceptual
from maskgen.models.mobilenet import MobileNetV2

# Maps global images [b, h, w, c], uint8 or float32 in [0, 1], to float32 features [b, d].
Space = Callable[[jax.Array], jax.Array | np.ndarray]

_PIXELS_SIDE = 8
_EDGES_WEIGHT = 2.0


def area_weights(size: int, target: int) -> np.ndarray:
  """The matrix [target, size] that averages `size` samples over `target` equal intervals."""
  ends = np.arange(target + 1) * (size / target)
  starts = np.arange(size)
  overlap = np.minimum(ends[1:, None], starts + 1) - np.maximum(ends[:-1, None], starts)
  return np.maximum(overlap, 0.0) * (target / size)


def area_average(images: jax.Array, height: int, width: int) -> jax.Array:
  """Images float32 [b, h, w, c] averaged over equal areas to [b, height, width, c]."""
  rows = area_weights(images.shape[1], height).astype(np.float32)
  columns = area_weights(images.shape[2], width).astype(np.float32)
  return jnp.einsum("yh,bhwc,xw->byxc", rows, images, columns, precision="highest")


@jax.jit
def pixels(images: jax.Array) -> jax.Array:
  """Images averaged over areas to 8 x 8: float32 [b, 64 * c]."""
  small = area_average(images_lib.to_float(images), _PIXELS_SIDE, _PIXELS_SIDE)
  return small.reshape(len(images), -1)


@jax.jit
def drawing(images: jax.Array) -> jax.Array:
  """All pixels, and the differences of neighbouring grey pixels times 2: float32 [b, about (c + 2) * h * w].

  For drawings, in which shapes are told apart by their outlines and equal shapes by their colours.
  """
  colours = images_lib.to_float(images)
  grey = _EDGES_WEIGHT * colours.mean(axis=-1)
  parts = (colours, jnp.diff(grey, axis=1), jnp.diff(grey, axis=2))
  return jnp.concatenate([part.reshape(len(images), -1) for part in parts], axis=1)


def glyphs(images: jax.Array) -> np.ndarray:
  """The shapes of the digits of `data.digit_scenes`, without colour, size and place: float32 [b, 64]."""
  _, ink = scenes.read(gather(images_lib.to_float(images)))
  return ink.reshape(len(ink), -1)


@jax.jit
def _pooled(params, images: jax.Array) -> jax.Array:
  maps = perceptual.feature_maps(MobileNetV2(), params, images_lib.to_float(images))
  return maps[-1].mean(axis=(1, 2))


def _open_pixels(path: str, context: Context | None) -> Space:
  return pixels


def _open_drawing(path: str, context: Context | None) -> Space:
  return drawing


def _open_glyphs(path: str, context: Context | None) -> Space:
  if context is None or context.class_names != scenes.KINDS["class"]:
    raise UserError("feature space 'glyphs' is for data.source='captioned_digits': use 'pixels'")
  return glyphs


def _open_mobilenet(path: str, context: Context | None) -> Space:
  if not path:
    raise UserError("feature space 'mobilenet_v2' needs weights: write it as 'mobilenet_v2:/path/to.npz'")
  return functools.partial(_pooled, mobilenet_v2.load(path))


SPACES: dict[str, Callable[[str, Context | None], Space]] = {
  "pixels": _open_pixels,
  "drawing": _open_drawing,
  "glyphs": _open_glyphs,
  "mobilenet_v2": _open_mobilenet,
}
_WITHOUT_WEIGHTS = ("pixels", "glyphs")


def name_of(spec: str) -> str:
  """The name of a feature space, for metrics."""
  return spec.partition(":")[0]


def check_space(spec: str) -> None:
  """Checks that a feature space exists, and its file if it has one.

  Raises:
    UserError: if not.
  """
  name, _, path = spec.partition(":")
  if name not in SPACES:
    raise UserError(f"feature space '{spec}' does not exist{nearest(name, SPACES)}")
  if path and name in _WITHOUT_WEIGHTS:
    raise UserError(f"feature space '{name}' has no weights: leave {path} out")
  if path and not epath.Path(path).exists():
    raise UserError(f"feature space '{name}': {path} does not exist, give the path of its weights")


def open_space(spec: str, context: Context | None) -> Space:
  """Opens a feature space.

  Args:
    spec: "pixels"; "drawing", all pixels and outlines; "glyphs" for captioned digits; or
      "mobilenet_v2:/path/to.npz", the last hidden layer of a network for photographs, see
      `importers.mobilenet_v2`.
    context: the context of the run whose images are compared, if it is a run.

  Raises:
    UserError: if the space does not exist, its file is missing or malformed, or it is for other data.
  """
  check_space(spec)
  name, _, path = spec.partition(":")
  return SPACES[name](path, context)
