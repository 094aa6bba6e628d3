"""Converts tensors of PyTorch modules in safetensors files to parameter trees of Linen modules.

The modules have the names of their PyTorch counterparts, with an underscore instead of a dot before an index:
`blocks_0/conv1/kernel` is the tensor `blocks.0.conv1.weight`.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from maskgen import tree
from maskgen.errors import UserError
from maskgen.importers.tensors import without_prefixes

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
LEAVES |= {"mean": "running_mean", "var": "running_var"}


def torch_name(path: str) -> str:
  """The tensor of a parameter: `linear_1` is a name, while `blocks_1` and `net_2` are indices of a list."""
  *modules, leaf = path.split("/")
  modules = [re.sub(r"(?<!linear)_(\d+)$", r".\1", module) for module in modules]
  return ".".join([*modules, LEAVES[leaf]])


def fit(
  found: Mapping[str, tuple[int, ...]],
  expected: Any,
  what: str,
  *,
  rename: Callable[[str], str] = str,
  buffers: Collection[str] = (),
) -> dict[str, str]:
  """Finds the tensor of each parameter by name and shape, without reading tensors.

  Args:
    found: the shapes of the available tensors.
    expected: the tree of parameter shapes.
    what: names the source in errors.
    rename: maps older or longer names of tensors to those of the modules.
    buffers: renamed tensors that are not parameters and may be present.

  Returns:
    The name of the available tensor for each parameter's path name.

  Raises:
    UserError: if a tensor is missing, unused, duplicate, or of another shape.
  """
  names: dict[str, str] = {}
  for name in sorted(found):
    new = rename(name)
    if new in names:
      raise UserError(
        f"{what} has the tensors '{names[new]}' and '{name}' for the same parameter: remove one"
      )
    if new not in buffers:
      names[new] = name
  parameters = tree.flatten(expected)
  paths = {torch_name(path): path for path in parameters}
  if missing := sorted(paths.keys() - names.keys()):
    others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
    raise UserError(f"{what} lacks the tensor '{missing[0]}'{others}: give complete weights of this config")
  if unused := sorted(names.keys() - paths.keys()):
    others = f" and {len(unused) - 1} others" if len(unused) > 1 else ""
    raise UserError(
      f"{what} has a tensor '{names[unused[0]]}'{others} that its config does not use: "
      "give weights and config of the same model"
    )
  for name, path in paths.items():
    shape, leaf = tuple(found[names[name]]), parameters[path]
    if _linen_shape(shape, len(leaf.shape), path) != leaf.shape:
      raise UserError(
        f"{what}: tensor '{names[name]}' of shape {list(shape)} does not fit the parameter '{path}' of shape "
        f"{list(leaf.shape)}: give weights and config of the same model"
      )
  return {path: names[name] for name, path in paths.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a file that has not been read yet.

  Attributes:
    file: where it is, for messages.
    name: in the file, likewise.
    shape: its shape.
    read: reads it.
  """

  file: pathlib.Path
  name: str
  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


def open_files(files: Collection[pathlib.Path]) -> dict[str, Tensor]:
  """The tensors of safetensors files by name, without the prefixes of wrappers.

  Raises:
    UserError: if a file cannot be read.
  """
  found = {}
  for file in files:
    archive = _guard(file, functools.partial(safe_open, str(file), framework="numpy"))
    for name in archive.keys():  # noqa: SIM118  (it is not a dictionary)
      read = functools.partial(_guard, file, functools.partial(archive.get_tensor, name))
      found[name] = Tensor(file, name, tuple(archive.get_slice(name).get_shape()), read)
  return dict(without_prefixes(found))


def load(
  stored: Mapping[str, Tensor],
  expected: Any,
  what: str,
  *,
  dtype: Any = np.float32,
  rename: Callable[[str], str] = str,
  buffers: Collection[str] = (),
) -> Any:
  """Reads a tree of parameters, one tensor at a time.

  Args:
    stored: the available tensors.
    expected: the tree of parameter shapes.
    what: names the source in errors.
    dtype: of the returned arrays.
    rename: see `fit`.
    buffers: see `fit`.

  Returns:
    A tree of numpy arrays.

  Raises:
    UserError: if a file cannot be read, or a tensor does not fit or contains values that are not finite.
  """
  shapes = {name: tensor.shape for name, tensor in stored.items()}
  names = fit(shapes, expected, what, rename=rename, buffers=buffers)
  ranks = {path: len(leaf.shape) for path, leaf in tree.flatten(expected).items()}
  params = {}
  for path, name in names.items():
    tensor, file = stored[name].read(), stored[name].file
    if not np.isfinite(tensor.astype(np.float32)).all():
      raise UserError(f"{file}: tensor '{name}' contains values that are not finite: download the file again")
    params[tuple(path.split("/"))] = np.ascontiguousarray(to_linen(tensor, ranks[path], path), dtype)
  return traverse_util.unflatten_dict(params)


def to_linen(tensor: np.ndarray, rank: int, path: str) -> np.ndarray:
  """Transposes a tensor to the layout of a parameter: PyTorch's kernels have outputs first.

  1x1 convolutions fit dense layers, which are equivalent.
  """
  if not path.endswith("/kernel"):
    return tensor
  if tensor.ndim == 4 and rank == 2 and tensor.shape[2:] == (1, 1):
    tensor = tensor[:, :, 0, 0]
  return np.transpose(tensor, (2, 3, 1, 0)) if tensor.ndim == 4 else tensor.T


def find(folder: pathlib.Path, stem: str) -> list[pathlib.Path]:
  """The safetensors files of a network: a single one, those of an index, or a 16-bit one.

  Raises:
    UserError: if there are none, or a file that the index names is missing.
  """
  single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
  half = folder / f"{stem}.fp16.safetensors"
  if single.exists():
    return [single]
  if index.exists():
    named = read_json(index).get("weight_map", {})
    files = [folder / name for name in sorted(set(named.values()))]
    for file in files:
      if not file.exists():
        raise UserError(f"{file}, which {index.name} names, is missing: download the folder again")
    if files:
      return files
  if half.exists():
    return [half]
  pickled = sorted(folder.glob("*.bin"))
  if pickled:
    raise UserError(f"{pickled[0]} is a pickle, which can run code: give the folder with {single.name}")
  raise UserError(f"{folder} does not contain {single.name}: download the weights, or give another folder")


def read_json(path: epath.Path | pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    UserError: if the file cannot be read or does not contain one.
  """
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error.strerror}): give a complete folder") from error
  except ValueError as error:
    raise UserError(f"{path} is not an intact JSON file: download it again") from error
  if not isinstance(content, dict):
    raise UserError(f"{path} does not contain a JSON object: download it again")
  return content


def _linen_shape(shape: tuple[int, ...], rank: int, path: str) -> tuple[int, ...]:
  return to_linen(np.broadcast_to(np.float32(0), shape), rank, path).shape


def _guard(file: pathlib.Path, read: Callable[[], Any]) -> Any:
  try:
    return read()
  except OSError as error:
    raise UserError(f"{file} cannot be read ({error}): check the path") from error
  except SafetensorError as error:
    raise UserError(f"{file} is not an intact safetensors file: download it again") from error
