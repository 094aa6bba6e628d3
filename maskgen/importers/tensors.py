"""Reads named tensors from weights files and converts them to our parameters.

A format is described in one direction, by a function that renames our parameters to theirs. It only moves
numbers, so it is linear, and its transpose is its inverse.
"""

import argparse
import io
import math
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath
from flax import traverse_util

from maskgen import tree
from maskgen.errors import UserError
from maskgen.storage.tensors import parse

# Keys under which checkpoints store their weights, in order of preference: averages first.
WRAPPERS = ("model_ema", "model", "state_dict")
# In front of every name if a model was saved inside DataParallel or after torch.compile.
_PREFIXES = ("module.", "_orig_mod.")
# How PyTorch's files begin: as zip archives or, in older versions, as pickles.
_TORCH_BEGINS = (b"PK\3\4", b"\x80")

# What numpy and zipfile raise on bytes that are not an npz file, or a damaged one.
DAMAGE = (ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)

Tensors = dict[str, np.ndarray]
# From our parameters to {their name: array in their layout}.
Rename = Callable[[Any], dict[str, Any]]


def read(path: epath.PathLike) -> Tensors:
  """Reads a safetensors or PyTorch file; floats become float32, and prefixes of all names are dropped.

  A PyTorch file may wrap its weights in a dictionary (see `WRAPPERS`). Only tensors, containers and the
  arguments of the training command are unpickled; a file with anything else is rejected.

  Raises:
    UserError: if the file cannot be read, has neither format, is damaged, or contains a pickle with code.
  """
  data = _bytes(path)
  if data[8:9] == b"{":
    try:
      found: Mapping[str, Any] = parse(data)
    except KeyError as error:
      raise UserError(
        f"{path} has numbers of type {error}: save them as float32, float16 or bfloat16"
      ) from None
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
      raise UserError(f"{path} is not an intact safetensors file ({error}): download it again") from None
  else:
    found = _read_torch(path, data)
  return {name: _float32(value) for name, value in without_prefixes(found).items()}


def read_msgpack(path: epath.PathLike) -> Tensors:
  """Reads the parameters of a Flax msgpack file, under path names such as `encoder/Conv_0/kernel`.

  Raises:
    UserError: if the file cannot be read, or contains no parameters.
  """
  data = _bytes(path)
  try:
    found = flax.serialization.msgpack_restore(data)
    flat = traverse_util.flatten_dict(found.get("params", found), sep="/")
    return {name: _float32(value) for name, value in flat.items() if isinstance(value, np.ndarray)}
  except Exception as error:  # msgpack raises many kinds of errors on other bytes.
    raise UserError(f"{path} is not an intact Flax msgpack file: download it again") from error


def read_npz(path: epath.PathLike) -> Tensors:
  """Reads the arrays of an npz file, unchanged.

  Raises:
    UserError: if the file cannot be read, or is not an npz file.
  """
  try:
    with epath.Path(path).expanduser().open("rb") as file:
      archive = np.load(file, allow_pickle=False)
      if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("a single array")
      return {name: np.asarray(archive[name]) for name in archive.files}
  except OSError as error:
    raise UserError(f"{path} cannot be read ({error}): give the path of an npz file") from error
  except DAMAGE as error:
    raise UserError(f"{path} is not an intact npz file: download or convert it again") from error


def need(path: epath.PathLike, tensors: Mapping[str, np.ndarray], name: str, ndim: int) -> np.ndarray:
  """Returns a tensor from which sizes are inferred, after checking its number of axes.

  Raises:
    UserError: if it is missing or has another number of axes.
  """
  if name not in tensors:
    raise UserError(f"{path} has no tensor '{name}': give a file of the format that --format names")
  if tensors[name].ndim != ndim:
    raise UserError(f"{path}: tensor '{name}' has {tensors[name].ndim} axes, but it should have {ndim}")
  return tensors[name]


def image_size(path: epath.PathLike, positions: int, strides: Sequence[int]) -> int:
  """The side in pixels of square images whose tokens have this many positions.

  Args:
    path: of the file, for messages.
    positions: the number of tokens.
    strides: of the tokenizer.

  Raises:
    UserError: if the positions form no square.
  """
  side = math.isqrt(max(positions, 0))
  if side * side != positions or not side:
    raise UserError(f"{path}: its {positions} positions do not form a square, as tokens of images must")
  return side * math.prod(strides)


def count(tensors: Mapping[str, np.ndarray], pattern: str) -> int:
  """The number of different values of a pattern's group, matched at the beginning of names."""
  return len({found[1] for name in tensors if (found := re.match(pattern, name))})


def take(path: epath.PathLike, tensors: Mapping[str, np.ndarray], rename: Rename, shapes: Any) -> Any:
  """Converts their tensors to our parameters.

  Args:
    path: of the file, for messages.
    tensors: its content.
    rename: the format.
    shapes: our parameters, a tree of shapes.

  Returns:
    A tree like `shapes`, with exactly the numbers of the file.

  Raises:
    UserError: if a tensor is missing, has another shape or type, or contains values that are not finite.
  """
  expected = jax.eval_shape(rename, shapes)
  if missing := sorted(expected.keys() - tensors.keys()):
    more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
    raise UserError(f"{path} has no tensor '{missing[0]}'{more}: give a file of the whole network")
  for name, leaf in expected.items():
    found = tensors[name]
    if found.shape != leaf.shape:
      raise UserError(
        f"{path}: tensor '{name}' has shape {found.shape}, but other tensors' sizes require {leaf.shape}"
      )
    if found.dtype != np.float32:
      raise UserError(f"{path}: tensor '{name}' has type {found.dtype}, but weights must be floats")
    if not np.isfinite(found).all():
      raise UserError(f"{path}: tensor '{name}' contains values that are not finite: give another file")
  (params,) = jax.linear_transpose(rename, shapes)({name: tensors[name] for name in expected})
  tree.check_same(params, shapes, str(path))
  return params


def _bytes(path: epath.PathLike) -> bytes:
  try:
    return epath.Path(path).expanduser().read_bytes()
  except OSError as error:
    reason = error.strerror or error
    raise UserError(f"{path} cannot be read ({reason}): give the path of a weights file") from None


def _float32(value: Any) -> np.ndarray:
  """Converts floats to float32, exactly if they have 16 bits; leaves other types unchanged."""
  value = np.asarray(value)
  return value.astype(np.float32, copy=False) if jnp.issubdtype(value.dtype, jnp.floating) else value


def without_prefixes(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
  """Drops prefixes that all names have because a model was saved inside a wrapper."""
  for prefix in _PREFIXES * 2:  # in any order
    if tensors and all(name.startswith(prefix) for name in tensors):
      tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
  return tensors


def _not_intact(path: epath.PathLike) -> UserError:
  return UserError(f"{path} is not an intact safetensors or PyTorch file: give another, or download it again")


def _read_torch(path: epath.PathLike, data: bytes) -> Tensors:
  if not data.startswith(_TORCH_BEGINS):
    raise _not_intact(path)
  try:
    import torch
  except ImportError:
    raise UserError(
      f"{path} is not a safetensors file, and PyTorch files need PyTorch: pip install -e '.[parity]'"
    ) from None
  if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 6):
    raise UserError(f"PyTorch {torch.__version__} does not unpickle safely: install 2.6 or newer")
  try:
    with torch.serialization.safe_globals([argparse.Namespace]):
      found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
  except Exception as error:  # PyTorch raises many kinds of errors on other bytes.
    code = re.search(r"GLOBAL ([\w.]+)|instantiate|[Uu]nsupported (?:global|class|operand)", str(error))
    if isinstance(error, pickle.UnpicklingError) and code:
      what = f" ({code[1]})" if code[1] else ""
      raise UserError(
        f"{path} would run code{what} when read, so it was rejected: give a file of tensors"
      ) from None
    raise _not_intact(path) from None
  for wrapper in WRAPPERS:
    if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
      found = found[wrapper]
      break
  if not isinstance(found, Mapping):
    raise UserError(f"{path} contains a {type(found).__name__}, not a dictionary of tensors")
  tensors = {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
  return {
    name: value.detach().float().numpy() if value.is_floating_point() else value.numpy()
    for name, value in tensors.items()
  }
