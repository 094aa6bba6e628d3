"""The base class of all models that `maskgen.load` returns."""

import copy
import functools
import logging
import os
import textwrap
from collections.abc import Mapping
from typing import Any, Self

import jax
import numpy as np
from etils import epath

from maskgen import __version__, files, objectives, plugins, sharding, storage, tree
from maskgen import config as config_lib
from maskgen import images as images_lib
from maskgen.errors import UserError, nearest
from maskgen.serving import requests

log = logging.getLogger("maskgen")

# The largest batch of a method: more images are computed in several, so that memory holds only results.
LARGEST = 256


class CannotError(UserError, AttributeError):
  """A model lacks a method; `hasattr` is False."""


class Model:
  """A trained model: the base of the classes that `maskgen.load` returns, one for each kind of model.

  ```python
  model = maskgen.load("runs/mine")
  features = model.features(images)  # float32 [b, d]
  losses = model.call("loss", {"image": images})
  ```

  Images are uint8 in 0..255 or floats in [0, 1], [b, h, w, c], or a list of images, including Pillow images.
  Paths of picture files are read, and prepared as by `preprocess` unless a method takes images of any size.
  A method that the model does not have raises a `UserError` that lists those that it has.

  Attributes:
    config: the plain config that the model was trained with.
    objective: the objective built from `config["objective"]`.
    variables: `{"params": {group: tree}, "frozen": tree, "extra": tree}`; moving averages replace parameters
      if the config has any.
    folder: where it was loaded from, or None.
  """

  def __init__(self, config: Mapping[str, Any], objective: objectives.Objective, variables: Any):
    self.config = config
    self.objective = objective
    self.variables = variables
    self.folder: epath.Path | None = None
    self._fns = objectives.compile_predict_fns(objective)
    self._mesh: jax.sharding.Mesh | None = None
    self._accepted: str | None = None  # the latest options of sampling: checking may read files

  def __getattr__(self, name: str) -> Any:
    if name.startswith("_"):  # Python and notebooks probe such names on any object
      raise AttributeError(name)
    raise CannotError(self._cannot(name))

  def __repr__(self) -> str:
    height, width, channels = self.objective.image_shape
    groups = {**self.variables.get("params", {}), **(self.variables.get("frozen") or {})}
    sizes = ", ".join(f"{name} {tree.count(group):,}" for name, group in groups.items())
    lines = [f"{type(self).__name__} of objective '{self.kind}'", f"  images: {height}x{width}x{channels}"]
    lines += [f"  parameters: {sizes}", f"  preprocessing: {self.preprocessing}"]
    if self.classes:
      lines.append(f"  classes: {len(self.classes)}, {textwrap.shorten(', '.join(self.classes), 80)}")
    return "\n".join([*lines, f"  functions: {', '.join(sorted(self._fns))}"])

  @property
  def kind(self) -> str:
    """The name of its objective, or of the network of a published model."""
    return str(self.config["objective"]["name"] if "objective" in self.config else self.config["network"])

  @property
  def classes(self) -> tuple[str, ...] | None:
    """The names of its classes, in the order of labels and probabilities; None if it does not store any."""
    return tuple(self.config.get("classes", ())) or None

  def call(self, name: str, batch: Mapping[str, Any], *, seed: int = 0, **options: Any) -> Any:
    """Calls a prediction function of the objective, including functions of your own.

    Args:
      name: a key of `objective.predict_fns()`.
      batch: the arrays of the batch, with leading axis b; they are not checked.
      seed: random seed of the function.
      **options: options of the function.

    Returns:
      The results of the function, as NumPy arrays.

    Raises:
      UserError: if the objective has no such function, or the seed is not a whole number of 32 bits.
    """
    if name not in self._fns:
      raise UserError(self._cannot(name))
    rng = requests.key(seed)
    if self._mesh is not None:
      sharding.check_batch(len(jax.tree.leaves(batch)[0]), 1, self._mesh)
      batch = jax.device_put(batch, sharding.batch_sharding(self._mesh))
    return jax.tree.map(np.asarray, self._fns[name](self.variables, batch, rng, **options))

  def _each(self, name: str, batch: Mapping[str, Any], **options: Any) -> Any:
    """Like `call`, for a function that computes each row for itself: in batches of few sizes.

    See `requests.padded`; on several devices only the last batch has another size, and none is padded.
    """
    count = len(jax.tree.leaves(batch)[0])
    devices = self._mesh.size if self._mesh else 1
    largest = max(LARGEST - LARGEST % devices, devices)
    parts = []
    for start in range(0, count, largest):
      size = min(count - start, largest)
      if self._mesh is None:
        size = min(requests.padded(size), largest)
      rows = np.arange(start, start + size).clip(max=count - 1)
      part = {key: requests.take(values, rows) for key, values in batch.items()}
      parts.append(self.call(name, part, **options))
    return jax.tree.map(lambda *values: np.concatenate(values)[:count], *parts)

  def on_local_devices(self) -> Self:
    """Returns this model on all devices of this process; each computes an equal part of every batch."""
    spread = copy.copy(self)
    spread._mesh = sharding.make_mesh(config_lib.Mesh(), jax.local_devices())
    spread.variables = jax.device_put(self.variables, sharding.replicated(spread._mesh))
    spread._fns = objectives.compile_predict_fns(self.objective, spread._mesh)
    return spread

  @property
  def preprocessing(self) -> str:
    """The preprocessing of its evaluations, see `maskgen.data.preprocess`.

    Of a model that does not store it: a square from the middle, or where images are not square, a stretched
    picture.
    """
    height, width, channels = self.objective.image_shape
    fitted = (
      f"resize_small({height})|center_crop({height})" if height == width else f"resize({height, width})"
    )
    return self.config.get("data", {}).get("eval_preprocess") or f"decode({channels})|{fitted}"

  def preprocess(self, pictures: images_lib.Pictures) -> np.ndarray:
    """Prepares pictures of any size as evaluations of the model did, see `preprocessing`.

    Args:
      pictures: paths of files, Pillow images, arrays uint8 or float in [0, 1], [h, w, c] or [h, w] each, one
        of these, or an array [b, h, w, c]. Pillow images are composited on white.

    Returns:
      uint8 [b, h, w, c], for any method of the model.

    Raises:
      UserError: if one is damaged or missing, or TensorFlow is not installed, which prepares them.
    """
    given: Any = pictures
    several = isinstance(given, list | tuple) or (not images_lib.is_path(given) and np.ndim(given) == 4)
    each = given if several else [given]
    if not len(each):
      raise UserError("pictures is empty: give at least one")
    try:
      from maskgen.data import eager
    except ImportError as error:
      height, width, _ = self.objective.image_shape
      raise UserError(
        f"model.preprocess needs TensorFlow ({error}): install tensorflow-cpu, or give images of "
        f"{height}x{width} pixels"
      ) from None
    names = [os.fspath(one) if images_lib.is_path(one) else f"picture {i}" for i, one in enumerate(each)]
    channels = self.objective.image_shape[-1]
    contents = [_content(one, name, channels) for one, name in zip(each, names, strict=True)]
    return eager.preprocess(self.preprocessing, contents, names)

  def save(self, path: epath.PathLike, *, dtype: str = "float32") -> None:
    """Writes an export for `maskgen.load`: weights, config, preprocessing, names of classes, own code.

    It warns if a module of your own is not in the model's folder.

    Args:
      path: a new folder.
      dtype: what float32 is stored as, and rounded to: float32, float16 (half the size) or int8 (a quarter).

    Raises:
      UserError: if the folder is not new or not writable, the model is a published one without training, or
        `dtype` is unknown or too narrow.
    """
    if dtype not in files.DTYPES:
      raise UserError(f"dtype '{dtype}' does not exist{nearest(dtype, files.DTYPES)}")
    if "objective" not in self.config:
      raise UserError("this is a published model without training: copy its folder instead")
    config = {"objective": self.config["objective"], "version": __version__}
    if stored := self.config.get("data", {}).get("eval_preprocess"):
      # Tokenizers have a kind before their path, and `preprocess` does not read them.
      config["data"] = {"eval_preprocess": files.hide_folders(stored, after=":")}
    if self.classes:
      config["classes"] = self.classes
    named = objectives.local_files(config["objective"])
    storage.write_export(path, config, self.variables, dtype=dtype, named=named)
    if self.folder is not None:
      plugins.copy_code(self.folder, epath.Path(path))
    if not plugins.has_code(epath.Path(path), name := config["objective"]["name"], objectives.__name__):
      log.warning(
        "the export does not contain the module '%s', because %s does not: whoever loads it needs that "
        "module on Python's path",
        name,
        self.folder or "the model",
      )

  def features(self, images: images_lib.Pictures, patches: bool = False) -> np.ndarray:
    """Returns features of images, float32 [b, d]: the normalised mean of the encoder's output tokens.

    With `patches`, the output tokens themselves after the encoder's own normalisation, float32 [b, n, d], row
    by row, one for each patch or code. A classifier on a MAGE encoder does not have these.
    """
    if patches and "features" in self._fns and "patches" not in self._fns:
      raise UserError(f"a model of objective '{self.kind}' has no patch tokens: leave patches out")
    return self._each("patches" if patches else "features", {"image": self.check_images(images)})

  def check_images(self, images: images_lib.Pictures, *, any_size: bool = False) -> np.ndarray:
    """Checks images given by a user and returns them as uint8 or float32 [b, h, w, c].

    Raises:
      UserError: if the model does not take them; with `any_size`, h and w may differ from the model's.
    """
    height, width, channels = self.objective.image_shape
    listed = images if isinstance(images, list | tuple) else [images]
    if not any_size and any(map(images_lib.is_path, listed)):
      images = self.preprocess(images)
    checked = images_lib.check_images(images, channels=channels)
    if not any_size and checked.shape[1:3] != (height, width):
      raise UserError(
        f"images are {checked.shape[1]}x{checked.shape[2]} pixels: this model takes {height}x{width}, "
        "give model.preprocess(images)"
      )
    return checked

  def generated_shape(self, options: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape (h, w, c) of an image that `generate` makes with these options."""
    generate = functools.partial(self._fns["generate"], **options)
    made = jax.eval_shape(generate, self.variables, {"key": requests.keys(0, 1)}, requests.key(0))
    return tuple(made.shape[1:])

  def _generate(self, request: Mapping[str, Any], options: dict[str, Any]) -> np.ndarray:
    return self._each("generate", request, **options)

  def _options(self, options: dict[str, Any]) -> dict[str, Any]:
    given = requests.options(options)
    if (described := repr(sorted(given.items()))) != self._accepted:
      objectives.check_sampling(self.objective, given)
      self._accepted = described
    return given

  def _cannot(self, name: str) -> str:
    known = sorted(self._fns)
    return f"a model of objective '{self.kind}' has no '{name}': call one of {', '.join(known)}"


def _content(picture: Any, name: str, channels: int) -> bytes | np.ndarray:
  """The content of a file, or uint8 [h, w, c]."""
  if images_lib.is_path(picture):
    try:
      return epath.Path(os.path.expanduser(picture)).read_bytes()
    except OSError as error:
      reason = error.strerror or error
      raise UserError(f"{name} cannot be read ({reason}): give the path of a picture") from None
  array = images_lib.as_array(picture, channels=channels)
  array = array[..., None] if array.ndim == 2 else array
  if array.ndim != 3 or array.shape[-1] not in (1, 3):
    raise UserError(f"{name} has shape {array.shape}: give [h, w], or [h, w, c] with 1 or 3 channels")
  return images_lib.to_uint8(images_lib.check_images(array[None], channels=array.shape[-1])[0])
