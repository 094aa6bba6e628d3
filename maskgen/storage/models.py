"""Trained models, from the workdir of a run or an export: their configs and variables."""

import contextlib
import json
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from contextvars import ContextVar
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from maskgen import files, pretrained, tree
from maskgen.config import fields
from maskgen.errors import TransientError, UserError, nearest
from maskgen.pretrained import locate
from maskgen.storage.assets import use_assets, write_assets
from maskgen.storage.checkpoints import open_to_read
from maskgen.storage.frozen import read_frozen_arrays
from maskgen.storage.tensors import (
  WEIGHTS,
  has_weights,
  place,
  read_shapes,
  read_weights,
  to_host,
  write_weights,
)

CONFIG = "config.json"
# From the shapes of stored arrays by path name, to targets for those to read.
Choose = Callable[[dict[str, Any]], Mapping[str, Any]]
_found_first: ContextVar[Callable[[str], dict[str, Any]]] = ContextVar("found_first", default=lambda path: {})


def resolve(path: str, workdir: epath.Path) -> epath.Path:
  """The folder of a model that a config names; `stage:NAME` is beside the run's workdir."""
  kind, _, name = path.partition(":")
  return workdir.parent / name if kind == "stage" else pretrained.find(path)


def is_export(path: epath.PathLike) -> bool:
  """Whether a model is an export, and no run."""
  return has_weights(locate(path)[0])


def load_config(path: epath.PathLike) -> dict[str, Any]:
  """Reads the `config.json` of a trained model, in which the model's own copies of local files are named.

  Args:
    path: a workdir, a step in it (`WORKDIR/checkpoints/STEP`), an export, or the name of a model that comes
      with maskgen.

  Raises:
    UserError: if there is no such model, or the folder holds several stages.
  """
  folder = locate(path)[0]
  if not folder.exists():
    choices = ", or an export"
    if pretrained.is_name(path):
      choices = f", an export, or a name{nearest(str(path), pretrained.available())}"
    raise UserError(f"model {path} does not exist: give the workdir of a run{choices}")
  try:
    config = files.read_json(folder / CONFIG, "restore it from a copy")
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(
      f"{path} is not a model (it has no {CONFIG}): give the workdir of a run, or an export"
    ) from None
  if "stages" in config:
    choices = " or ".join(str(folder / stage) for stage in config["stages"])
    raise UserError(f"{path} holds several stages: give {choices}")
  return use_assets(config, folder)


def model_section(config: Mapping[str, Any]) -> dict[str, Any]:
  """The section that describes a model of this `config.json`: its objective, or its network by name.

  Raises:
    UserError: if it describes neither.
  """
  if "objective" in config:
    return dict(config["objective"])
  name = str(config.get("network"))
  if name not in config:
    raise UserError("its config.json describes no model: give the workdir of a run, or an export")
  return {"name": name, **config[name]}


def find_section(path: str) -> dict[str, Any]:
  """As `model_section`, of a model's folder; empty where there is not a model.

  While a run's config is loaded again, what its workdir says of the model comes first: the model may be gone.

  Raises:
    TransientError: if it cannot be told whether there is a model, as without a network.
  """
  try:
    return _found_first.get()(path) or model_section(load_config(path)) if path else {}
  except TransientError:
    raise
  except UserError:
    return {}


@contextlib.contextmanager
def found_first(find: Callable[[str], dict[str, Any]]) -> Generator[None]:
  """Makes `find_section` ask `find` first, whose result for a path that it does not know is empty."""
  token = _found_first.set(find)
  try:
    yield
  finally:
    _found_first.reset(token)


def load_variables(path: epath.PathLike, target: Any) -> Any:
  """Reads a model's variables, with moving averages in the place of the parameters that have one.

  Args:
    path: see `load_config`.
    target: the part that is wanted, a tree of shapes, with shardings or without, under `params`, `frozen` and
      `extra`, and of a workdir also `step`. An export's float32 is rounded where it is of a smaller type.

  Raises:
    UserError: if the path is not a model, has no checkpoint yet, or differs in a name, shape or dtype.
  """
  load_config(path)
  folder, step = locate(path)
  flat = tree.flatten(target)
  if has_weights(folder):
    arrays: dict[str, Any] = read_weights(folder)
  else:
    arrays = read_frozen_arrays(folder) | _checkpoint_arrays(folder, step, flat)
  found = {
    name: _rounded(array, flat.get(name))
    for name, array in arrays.items()
    if name in flat or _beside(name, flat)
  }
  tree.check_same(found, flat, f"model {path}")
  placed = [place(found[name], leaf) for name, leaf in flat.items()]
  return jax.tree.unflatten(jax.tree.structure(target), placed)


def _rounded(array: Any, leaf: Any) -> Any:
  """An array of an export as frozen parameters may be kept: in 16 bits."""
  small = leaf is not None and leaf.dtype in (ml_dtypes.bfloat16, np.float16)
  return array.astype(leaf.dtype) if small and isinstance(array, np.ndarray) else array


def _beside(name: str, flat: Mapping[str, Any]) -> bool:
  """Whether `name` belongs to a module (`params/main/encoder`) of which something is wanted."""
  module = name.split("/")[:3]
  return any(other.split("/")[:3] == module for other in flat)


def _checkpoint_arrays(folder: epath.Path, step: int | None, flat: Mapping[str, Any]) -> dict[str, Any]:
  """The wanted arrays of a workdir's checkpoint, averages substituted; shapes alone of the others."""
  default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shapes: dict[str, Any] = {}

  def choose(stored: dict[str, Any]) -> dict[str, Any]:
    shapes.update(stored)
    return {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or default)
      for name, leaf in flat.items()
      if name in stored and stored[name].shape == leaf.shape
    }

  return shapes | _read_checkpoint(folder, step, choose, ("params/", "extra/", "step"))


def _read_checkpoint(
  folder: epath.Path, step: int | None, choose: Choose, parts: tuple[str, ...] = ("params/", "extra/")
) -> dict[str, Any]:
  """What is chosen of a workdir's checkpoint, averages in the place of parameters that have one."""
  averages: dict[str, str] = {}

  def choose_stored(stored: dict[str, Any]) -> dict[str, Any]:
    averages.update({name.replace("ema/", "params/", 1): name for name in stored if name.startswith("ema/")})
    wanted = choose({name: leaf for name, leaf in stored.items() if name.startswith(parts)})
    return {averages.get(name, name): leaf for name, leaf in wanted.items()}

  with closing(open_to_read(folder.absolute())) as checkpoints:
    restored = checkpoints.read(choose_stored, step)
  names = {average: name for name, average in averages.items()}
  return {names.get(name, name): array for name, array in restored.items()}


def read_chosen(path: epath.PathLike, choose: Choose) -> dict[str, Any]:
  """Reads arrays of a model by path name, with moving averages in the place of parameters that have one.

  Args:
    path: see `load_config`.
    choose: from the shapes of all trained arrays, under `params/` and `extra/`, to targets for those to read,
      shapes with shardings; nothing is read for none.

  Raises:
    UserError: if the path is not a model or has no checkpoint yet, or by `choose`.
  """
  load_config(path)
  folder, step = locate(path)
  if not has_weights(folder):
    return _read_checkpoint(folder, step, choose)
  shapes = read_shapes(folder / WEIGHTS)
  wanted = choose({name: leaf for name, leaf in shapes.items() if not name.startswith("frozen/")})
  arrays = read_weights(folder) if wanted else {}
  return {name: place(arrays[name], leaf) for name, leaf in wanted.items()}


def averages(path: epath.PathLike) -> list[str] | None:
  """The groups of a run's parameters that have moving averages; None for an export, which does not say.

  Raises:
    UserError: if the path is not a model, or has no checkpoint yet.
  """
  load_config(path)
  folder, step = locate(path)
  if has_weights(folder):
    return None
  groups: set[str] = set()

  def note(stored: dict[str, Any]) -> dict[str, Any]:
    groups.update(name.split("/")[1] for name in stored if name.startswith("ema/"))
    return {}

  with closing(open_to_read(folder.absolute())) as checkpoints:
    checkpoints.read(note, step)
  return sorted(groups)


def write_export(
  path: epath.PathLike,
  config: Mapping[str, Any],
  variables: Any,
  dtype: str = "float32",
  named: Mapping[str, fields.Files] | None = None,
) -> None:
  """Writes a model as `config.json`, `weights.safetensors`, its checksum in `manifest.json`, and `assets/`.

  Args:
    path: a new folder.
    config: of the model.
    variables: of the model.
    dtype: what float32 is stored as, one of `files.DTYPES`.
    named: the local files that the config names, by the value that names them; the export names its copies.

  Raises:
    UserError: if the path exists and is not an empty folder, or cannot be written.
  """
  folder = epath.Path(path)
  arrays = to_host(tree.flatten(variables))
  try:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
      raise UserError(f"{path} is not an empty folder: give a new one for the export")
    write_weights(folder, arrays, dtype)
    config = write_assets(folder, named or {}, config)
    files.replace(folder / CONFIG, json.dumps(config, indent=2))  # last: without it this is not a model
  except OSError as error:
    raise UserError(f"{path} is not writable ({error.strerror or error}): give another folder") from None
