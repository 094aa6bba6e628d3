"""Image towers of transformers: folders with config.json, model.safetensors and preprocessor_config.json.

The towers themselves are in `dino`, `dinov2`, `dinov3`, `clip`, `siglip` and `siglip2`. Sizes are those of
the tensors; config.json must agree, and says what tensors do not.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from maskgen.errors import UserError
from maskgen.importers import Converted, tensors, torch_tensors, vqgan_pytorch
from maskgen.models.transformer import SWIGLU
from maskgen.models.vit import ViT
from maskgen.numerics import positions, resizing

CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
# Pillow's numbers of filters.
_FILTERS = {2: "bilinear", 3: "bicubic"}
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
# From the old and the new length of an axis of positions to weights [new, old].
Weigh = Callable[[int, int], np.ndarray]
# Keys of config.json that must agree with the tensors, by field of `ViT`.
SIZES = {"width": "hidden_size", "depth": "num_hidden_layers", "patch": "patch_size"}
SIZES |= {"hidden": "intermediate_size"}


class Stored(NamedTuple):
  """What is stored of a tower.

  Attributes:
    path: for messages.
    tensors: of the image tower, and others.
    config: that of the image tower; empty for a single file.
    processor: how its input is prepared; empty if it is not stored.
  """

  path: str
  tensors: tensors.Tensors
  config: Mapping[str, Any]
  processor: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Preparation:
  """How pictures become the input of a tower.

  Attributes:
    size: what pictures are resized to: the shorter side, (height, width), or None for nothing.
    crop: (height, width) of the centre that is cut out, or None for all.
    filter: Pillow's, a name in `resizing.FILTERS`.
  """

  size: int | tuple[int, int] | None
  crop: tuple[int, int] | None
  filter: str = "bicubic"

  @property
  def side(self) -> tuple[int, int] | None:
    """(height, width) of the result; None if it depends on the picture."""
    return self.crop or (self.size if isinstance(self.size, tuple) else None)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Pictures uint8 [b, h, w, c] to float32 [b, *side, c] in [0, 1].

    Raises:
      UserError: if a picture is smaller than the crop.
    """
    height, width = images.shape[1:3]
    images = self._resample(images, *self._resized(height, width))
    if self.crop is not None:
      top, left = ((have - want) // 2 for have, want in zip(images.shape[1:3], self.crop, strict=True))
      if top < 0 or left < 0:
        raise UserError(f"pictures of {height} x {width} pixels are too small for a crop of {self.crop}")
      images = images[:, top : top + self.crop[0], left : left + self.crop[1]]
    return images.astype(jnp.float32) / 255.0

  def _resized(self, height: int, width: int) -> tuple[int, int]:
    """(height, width) to which a picture of this one is resized."""
    if isinstance(self.size, int):
      short, long = self.size, int(self.size * max(height, width) / min(height, width))
      return (short, long) if height <= width else (long, short)
    return self.size or (height, width)

  def _resample(self, images: jax.Array, height: int, width: int) -> jax.Array:
    return resizing.pillow(images, height, width, self.filter)


class FloatPreparation(Preparation):
  """Resizes floats, as torchvision does with tensors: nothing is rounded."""

  def _resample(self, images: jax.Array, height: int, width: int) -> jax.Array:
    return resizing.antialiased(images.astype(jnp.float32), height, width, self.filter)


class Tower(NamedTuple):
  """A feature network for pictures.

  Attributes:
    model: the network, whose method `embed` computes the features.
    params: its parameters, float32.
    preparation: of its input.
    weigh: see `resize`, for pictures that are not prepared to the network's size.
  """

  model: ViT
  params: Any
  preparation: Preparation
  weigh: Weigh = resizing.bicubic_torch_weights

  def embed(self, params: Any, images: jax.Array) -> jax.Array:
    """Features, float32 [b, d], of pictures uint8 [b, h, w, c]."""
    prepared = self.preparation(images)
    height, width = prepared.shape[1:3]
    model, params = resize(self.model, params, (height, width), self.weigh)
    features: Any = model.apply({"params": params}, prepared, method="embed")
    return features


def read(path: epath.PathLike, prefixes: tuple[str, ...] = ()) -> Stored:
  """Reads a folder of transformers, or a file of its tensors alone.

  Args:
    path: of the folder or file.
    prefixes: of tower names in files of larger models; the first that occurs is dropped.

  Raises:
    UserError: if a file is missing or damaged, see also `tensors.read`.
  """
  folder = pathlib.Path(path).expanduser()
  if folder.is_dir():
    files = torch_tensors.find(folder, "model")
    whole = torch_tensors.read_json(folder / CONFIG)
    config = whole.get("vision_config", whole)
    has_processor = (folder / PROCESSOR).exists()
    processor = torch_tensors.read_json(folder / PROCESSOR) if has_processor else {}
  else:
    files, config, processor = [folder], {}, {}
  found: tensors.Tensors = {}
  for file in files:
    found |= tensors.read(file)
  for prefix in prefixes:
    if any(name.startswith(prefix) for name in found):
      found = {name.removeprefix(prefix): value for name, value in found.items()}
      break
  return Stored(str(path), found, config, processor)


def settle(stored: Stored, section: Mapping[str, Any], heads: int | None, known: Mapping[int, int]) -> dict:
  """Completes the fields of `ViT` that tensors say by what config.json says.

  Args:
    stored: the tower.
    section: the fields.
    heads: the number of heads, if it is given.
    known: of the published models by width, for files without config.json.

  Raises:
    UserError: if both differ, or the number of heads is unknown or does not divide the width.
  """
  path, config, width = stored.path, stored.config, section["width"]
  for field, key in SIZES.items():
    if key in config and config[key] != section[field]:
      raise UserError(
        f"{path} has {key}={config[key]} in {CONFIG}, but {section[field]} by its tensors: give files of one "
        "model"
      )
  named = "" if section.get("activation") == SWIGLU else str(config.get("hidden_act", ""))
  if named and named not in ACTIVATIONS:
    raise UserError(f"{path} has the activation '{named}': this network has {', '.join(ACTIVATIONS)}")
  heads = heads or config.get("num_attention_heads") or known.get(width, 0)
  if not isinstance(heads, int) or heads < 1:
    raise UserError(f"{path} has no head count, and none is known for width {width}: give --encoder_heads")
  if width % heads:
    raise UserError(f"--encoder_heads={heads} does not divide the width of {width}: give one that does")
  found = {**section, "heads": heads}
  found |= {name: value for name, value in _read_standard(stored).items() if value != _field(section, name)}
  if named and ACTIVATIONS[named] != _field(section, "activation"):
    found["activation"] = ACTIVATIONS[named]
  if config.get("layer_norm_eps", _field(section, "epsilon")) != _field(section, "epsilon"):
    found["epsilon"] = config["layer_norm_eps"]
  return found


def _field(section: Mapping[str, Any], name: str) -> Any:
  return section.get(name, getattr(ViT, name))


def join(flat: dict[str, Any], parent: str, names: tuple[str, ...]) -> dict[str, Any]:
  """Takes dense layers from a flat tree and joins them to one, `joined/kernel` and `joined/bias`."""
  return {
    f"joined/{leaf}": jnp.concatenate([flat.pop(f"{parent}/{name}/{leaf}") for name in names], axis=-1)
    for leaf in ("kernel", "bias")
  }


def side_of(path: str, positions: int, patch: int) -> tuple[int, int]:
  """(height, width) of square images with this number of patches.

  Raises:
    UserError: if they form no square.
  """
  side = math.isqrt(max(positions, 0))
  if side * side != positions or not side:
    raise UserError(f"{path}: its {positions} positions do not form a square, as patches of images must")
  return (side * patch, side * patch)


def take(
  stored: Stored,
  section: Mapping[str, Any],
  rename: Callable,
  used: tuple[str, ...],
  ignored: tuple[str, ...],
) -> tuple[ViT, Any, tuple[str, ...]]:
  """Takes a tower's parameters from its tensors.

  Args:
    stored: the tower.
    section: the fields of `ViT`.
    rename: (parameters, model=network) -> {their name: array in their layout}.
    used: beginnings of the names that belong to the tower.
    ignored: beginnings of names that it does not need.

  Returns:
    The network, its parameters, and the names of unused tensors that are not among those.

  Raises:
    UserError: if a tensor of the tower is missing, unused or of another shape, see `tensors.take`.
  """
  model = ViT(**section)
  image = jax.ShapeDtypeStruct((1, *model.image_size, model.channels), jnp.float32)
  shapes = jax.eval_shape(lambda key, x: model.init(key, x, method="embed"), jax.random.key(0), image)
  fixed = functools.partial(rename, model=model)
  params = tensors.take(stored.path, stored.tensors, fixed, shapes["params"])
  unused = sorted(stored.tensors.keys() - jax.eval_shape(fixed, params).keys())
  unknown = tuple(name for name in unused if not name.startswith(ignored))
  vqgan_pytorch.refuse_left_over(stored.path, unknown, used)
  return model, params, unknown


def export(model: ViT, section: Mapping[str, Any], params: Any, unused: tuple[str, ...]) -> Converted:
  """A tower as an image encoder, without the projection that only `embed` has."""
  params = {name: value for name, value in params.items() if name != "embedding"}
  section = {name: value for name, value in section.items() if name != "projection"}
  return Converted({"network": "vit", "vit": section}, {"params": {"main": params}}, unknown=unused)


def fixed_table(grid: tuple[int, int], width: int) -> np.ndarray:
  """MAE's embeddings of a class position and a grid (h, w) of patches, float32 [1 + h * w, width]."""
  return np.pad(positions.sines(grid, width), ((1, 0), (0, 0)))


def is_fixed(table: np.ndarray, grid: tuple[int, int]) -> bool:
  """Whether embeddings of positions are those of `fixed_table`."""
  width = table.shape[-1]
  return width % 4 == 0 and bool(np.abs(table - fixed_table(grid, width)).max() < 1e-5)


def resize(
  model: ViT,
  params: Any,
  size: tuple[int, int],
  weigh: Weigh = resizing.bicubic_torch_weights,
) -> tuple[ViT, Any]:
  """A network for images of another size, whose embeddings of positions, if it has some, are interpolated.

  Args:
    model: the network.
    params: its parameters.
    size: (height, width).
    weigh: how; by default as transformers does without antialiasing.

  Raises:
    UserError: if patches do not divide the size.
  """
  if size == model.image_size:
    return model, params
  resized = model.clone(image_size=size)
  if "position" in params:
    old, new = (positions.Positions(one.grid, one.leading) for one in (model, resized))
    params = {**params, "position": positions.interpolate(params["position"], old, new, weigh)}
  return resized, params


def prepare(
  stored: Stored,
  model: ViT,
  params: Any,
  default: Preparation,
  weigh: Weigh = resizing.bicubic_torch_weights,
) -> Tower:
  """A tower for the pictures of its preprocessor_config.json, or of the published one.

  Args:
    stored: the tower.
    model: its network.
    params: its parameters.
    default: the published preparation.
    weigh: see `resize`.

  Raises:
    UserError: if the file asks for something that is not supported.
  """
  preparation = read_processor(stored, default)
  side = preparation.side
  if side is None:
    raise UserError(f"{stored.path}: {PROCESSOR} must set a crop_size, or a size with height and width")
  model, params = resize(model, params, side, weigh)
  return Tower(model, params, preparation)


def read_processor(stored: Stored, default: Preparation) -> Preparation:
  """The preparation that preprocessor_config.json says, of the kind of the default, the published one.

  Raises:
    UserError: if the file asks for something that is not supported.
  """
  given, where = stored.processor, f"{stored.path}: {PROCESSOR}"
  if not given:
    return default
  if not given.get("do_rescale", True) or abs(given.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
    raise UserError(f"{where} does not divide pixels by 255, as this network needs: use the published one")
  resample = given.get("resample", 3 if default.filter == "bicubic" else 2)
  if resample not in tuple(_FILTERS):
    raise UserError(f"{where} has resample={resample}: give 2 (bilinear) or 3 (bicubic)")
  size, crop = given.get("size", default.size), given.get("crop_size", default.crop)
  cut = _read_size(crop, where) if given.get("do_center_crop", crop is not None) else None
  return dataclasses.replace(
    default,
    size=_read_size(size, where) if given.get("do_resize", True) else None,
    crop=None if cut is None else square(cut),
    filter=_FILTERS[resample],
  )


def _read_standard(stored: Stored) -> dict[str, tuple[float, ...]]:
  """The mean and standard deviation of pixels, where preprocessor_config.json says them."""
  given, standard, channels = stored.processor, {}, stored.config.get("num_channels", 3)
  if not given.get("do_normalize", True):
    return dict(mean=(0.0,) * channels, std=(1.0,) * channels)
  for field, key in (("mean", "image_mean"), ("std", "image_std")):
    value = given.get(key)
    if value is not None:
      numbers = isinstance(value, list) and all(isinstance(x, int | float) for x in value)
      if not numbers or len(value) != channels:
        raise UserError(f"{stored.path}: {PROCESSOR} has {key}={value}: give {channels} numbers")
      standard[field] = tuple(value)
  return standard


def _read_size(given: Any, where: str) -> int | tuple[int, int] | None:
  found = given
  if isinstance(given, Mapping):
    names = ("shortest_edge",) if given.keys() == {"shortest_edge"} else ("height", "width")
    found = tuple(given.get(name) for name in names)
    found = found[0] if len(found) == 1 else found
  sides = found if isinstance(found, tuple) else (found,)
  if found is not None and not all(isinstance(side, int) and side > 0 for side in sides):
    raise UserError(f"{where} has the size {given}: give shortest_edge, or height and width")
  return found


def square(size: int | tuple[int, int]) -> tuple[int, int]:
  """(height, width) of a size, of which one number is a square."""
  return (size, size) if isinstance(size, int) else size
