"""Feature spaces for comparing images, by name."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from maskgen import images as images_lib
from maskgen import objectives, storage, tree
from maskgen.config import fields
from maskgen.data import digit_scenes as scenes
from maskgen.errors import UserError, nearest
from maskgen.evaluators.batches import gather
from maskgen.evaluators.context import Context
from maskgen.importers import clip, dino, dinov2, dinov3, mobilenet_v2, siglip, siglip2, towers
from maskgen.models import perceptual
from maskgen.models.mobilenet import MobileNetV2

# From global images [b, h, w, c], uint8 or float32 in [0, 1], to float32 [b, d].
Features = Callable[[jax.Array], jax.Array | np.ndarray]


@dataclasses.dataclass(frozen=True)
class Space:
  """A feature space: a function from images to features.

  Attributes:
    name: in the names of metrics.
    weights: the fingerprint of its weights and of how pictures are prepared for them; "" if it has none.
    features: the function.
  """

  name: str
  weights: str
  features: Features

  def __call__(self, images: jax.Array) -> jax.Array | np.ndarray:
    return self.features(images)


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


def of_network(name: str, weights: str, params: Any, apply: Callable[[Any, jax.Array], jax.Array]) -> Space:
  """A space of a network, whose parameters are copied to the devices of the images once.

  Args:
    name: see `Space`.
    weights: likewise.
    params: the parameters, arrays of the host.
    apply: (parameters, images) -> features.
  """
  placed: dict[Any, Any] = {}
  compiled = jax.jit(apply)

  def features(images: jax.Array) -> jax.Array:
    where = None if isinstance(images, jax.core.Tracer) else images.sharding
    if isinstance(where, jax.sharding.NamedSharding):
      where = jax.sharding.NamedSharding(where.mesh, jax.sharding.PartitionSpec())
    elif not isinstance(where, jax.sharding.SingleDeviceSharding):
      return compiled(params, images)
    if where not in placed:
      placed.clear()
      placed[where] = jax.tree.map(lambda leaf: _place(leaf, where), params)
    return compiled(placed[where], images)

  return Space(name, weights, features)


def _place(array: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
  return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def _open_pixels(path: str, context: Context | None) -> Space:
  return Space("pixels", "", pixels)


def _open_drawing(path: str, context: Context | None) -> Space:
  return Space("drawing", "", drawing)


def _open_glyphs(path: str, context: Context | None) -> Space:
  if context is None or context.class_names != scenes.KINDS["class"]:
    raise UserError("feature space 'glyphs' is for data.source='captioned_digits': use 'pixels'")
  return Space("glyphs", "", glyphs)


def _open_mobilenet(path: str, context: Context | None) -> Space:
  def apply(params: Any, images: jax.Array) -> jax.Array:
    maps = perceptual.feature_maps(MobileNetV2(), params, images_lib.to_float(images))
    return maps[-1].mean(axis=(1, 2))

  weights = hashlib.sha256(epath.Path(path).expanduser().read_bytes()).hexdigest()
  return of_network("mobilenet_v2", weights, mobilenet_v2.load(path), apply)


def _tower_opener(name: str, load: Callable[[str], towers.Tower]) -> Callable[[str, Context | None], Space]:
  def open_tower(path: str, context: Context | None) -> Space:
    tower = load(path)
    model, params, preparation = tower.model, tower.params, tower.preparation

    def apply(params: Any, images: jax.Array) -> jax.Array:
      return tower.embed(params, images_lib.to_rgb_on_devices(images))

    # Without defaults: a field that is added later changes no hash.
    described = fields.of(type(model)).items()
    network = {key: getattr(model, key) for key, field in described if getattr(model, key) != field.default}
    weights = _digest([dataclasses.asdict(preparation), network, tree.fingerprint(params)])
    return of_network(name, weights, params, apply)

  return open_tower


def _open_model(path: str, context: Context | None) -> Space:
  section = storage.model_section(storage.load_config(path))
  part = objectives.encoder_part(section, f"the model {path}")
  variables = jax.device_get(storage.load_variables(path, part.shapes()))
  channels = part.encoder.image_shape[-1]

  def apply(variables: Any, images: jax.Array) -> jax.Array:
    images = images_lib.to_float(images)
    images = _colours(images) if channels > 1 else images
    if images.shape[-1] != channels:
      raise UserError(f"the model {path} takes images with {channels} channel: give one for colours")
    return part.features(variables, {"image": images})

  weights = _digest([section, tree.fingerprint(variables)])
  return of_network(name_of(f"model:{path}"), weights, variables, apply)


def _colours(images: jax.Array) -> jax.Array:
  """Grey images with three channels, others unchanged."""
  return jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def _digest(described: Any) -> str:
  return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


SPACES: Mapping[str, Callable[[str, Context | None], Space]] = {
  "pixels": _open_pixels,
  "drawing": _open_drawing,
  "glyphs": _open_glyphs,
  "mobilenet_v2": _open_mobilenet,
  "dino": _tower_opener("dino", dino.load),
  "dinov2": _tower_opener("dinov2", dinov2.load),
  "dinov3": _tower_opener("dinov3", dinov3.load),
  "clip": _tower_opener("clip", clip.load),
  "siglip": _tower_opener("siglip", siglip.load),
  "siglip2": _tower_opener("siglip2", siglip2.load),
  "model": _open_model,
}
_WITHOUT_WEIGHTS = ("pixels", "drawing", "glyphs")


def name_of(spec: str) -> str:
  """The name of a feature space, for metrics: for a trained model that of its folder."""
  name, _, path = spec.partition(":")
  return storage.locate(path)[0].name if name == "model" else name


def check_space(spec: str) -> None:
  """Checks that a feature space exists, and its weights if it has some, without reading them.

  Raises:
    UserError: if not.
  """
  name, _, path = spec.partition(":")
  if name not in SPACES:
    raise UserError(f"feature space '{spec}' does not exist{nearest(name, SPACES)}")
  if name in _WITHOUT_WEIGHTS:
    if path:
      raise UserError(f"feature space '{name}' has no weights: leave {path} out")
  elif not path:
    raise UserError(f"feature space '{name}' needs weights: write it as '{name}:PATH'")
  elif name == "model":
    storage.load_config(path)
    if name_of(spec) in SPACES:
      raise UserError(f"feature space '{spec}' would have the name of another: rename the folder")
  elif not epath.Path(path).expanduser().exists():
    raise UserError(f"feature space '{name}': {path} does not exist, give the path of its weights")


def open_space(spec: str, context: Context | None) -> Space:
  """Opens a feature space.

  Args:
    spec: "pixels"; "drawing", all pixels and outlines; "glyphs" for captioned digits;
      "mobilenet_v2:FILE.npz", the last hidden layer of a network for photographs, see
      `importers.mobilenet_v2`; "dino:PATH", "dinov2:PATH", "dinov3:PATH", "clip:PATH", "siglip:PATH"
      or "siglip2:PATH", an image tower of transformers, a folder or a file of tensors, see
      `importers.towers`; or "model:PATH", the `features` of a trained encoder: a workdir, a step in it, an
      export, or a name of `maskgen.available()`.
    context: the context of the run whose images are compared, if it is a run; the space is added to its
      `networks`.

  Raises:
    UserError: if the space does not exist, its file is missing or malformed, or it is for other data.
  """
  check_space(spec)
  name, _, path = spec.partition(":")
  space = SPACES[name](path, context)
  if context is not None:
    network = {"protocol": "", "weights": space.weights}
    if context.networks.setdefault(space.name, network) != network:
      raise UserError(
        f"{spec} and another feature space are both called '{space.name}': use them in two evaluations"
      )
  return space
