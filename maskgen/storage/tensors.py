"""Flat files of arrays (safetensors), and arrays on their way between hosts and devices."""

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from jax.experimental import multihost_utils

from maskgen import files
from maskgen.errors import UserError

WEIGHTS = "weights.safetensors"
# Ends the name of the scales of an array that is stored as int8.
_SCALES = ":scales"

log = logging.getLogger("maskgen")


def write_weights(folder: epath.Path, arrays: Mapping[str, np.ndarray], dtype: str = "float32") -> None:
  """Writes arrays as `weights.safetensors`, and its checksum as `manifest.json`.

  Args:
    folder: where to.
    arrays: by name.
    dtype: one of `files.DTYPES`, for float32 arrays. As int8, matrices have a scale for each row or column,
      whichever is more precise, and vectors are float16.

  Raises:
    UserError: if a number is too large for float16, or not finite and to be rounded.
  """
  rounding = {"float32": _same, "float16": _to_half, "int8": _to_int8}[dtype]
  stored: dict[str, np.ndarray] = {}
  for name, array in arrays.items():
    stored |= rounding(name, array) if array.dtype == np.float32 else {name: array}
  data = safetensors.numpy.save(stored, None if dtype == "float32" else {"float32": f"stored as {dtype}"})
  folder.mkdir(parents=True, exist_ok=True)
  files.replace(folder / WEIGHTS, data)
  files.replace(folder / files.MANIFEST, files.make_manifest({WEIGHTS: data}))


def has_weights(folder: epath.Path) -> bool:
  """Whether a folder is one that `write_weights` has written, and holds no run."""
  return (folder / WEIGHTS).exists() or (folder / files.MANIFEST).exists()


def read_weights(folder: epath.Path) -> dict[str, np.ndarray]:
  """Reads `weights.safetensors`, and checks that not a bit has changed since it was written.

  Raises:
    UserError: if one has, or the file is missing.
  """
  remedy = f"restore {folder} from a copy"
  try:
    data = (folder / WEIGHTS).read_bytes()
  except FileNotFoundError:
    raise UserError(f"{folder / WEIGHTS} is missing: {remedy}") from None
  if not files.check_manifest(folder / files.MANIFEST, WEIGHTS, data, remedy):
    log.warning("%s has no %s: its weights are used unchecked", folder, files.MANIFEST)
  try:
    return parse(data)
  except safetensors.SafetensorError as error:
    raise files.damaged(folder / WEIGHTS, error, remedy) from None


def _same(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
  return {name: array}


def _check_finite(name: str, array: np.ndarray) -> None:
  if not np.isfinite(array).all():
    raise UserError(f"{name} has numbers that are not finite: store an earlier checkpoint, or use float32")


def _to_half(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
  _check_finite(name, array)
  if np.abs(array).max(initial=0) > np.finfo(np.float16).max:
    raise UserError(f"{name} has numbers that are too large for float16: store this model as float32")
  return {name: array.astype(np.float16)}


def _to_int8(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
  if array.size <= max(array.shape, default=1):  # a vector, perhaps with axes of length 1
    return _to_half(name, array)
  _check_finite(name, array)

  def rounded(axis: int) -> tuple[np.ndarray, np.ndarray]:
    others = tuple(i for i in range(array.ndim) if i != axis % array.ndim)
    scales = np.abs(array).max(axis=others, keepdims=True) / 127
    half = _to_half(name, scales)[name]
    half = np.where((half < scales) | (half == 0), np.nextafter(half, np.float16(np.inf)), half)  # round up
    return np.rint(array / half).astype(np.int8), half

  def error(found: tuple[np.ndarray, np.ndarray]) -> float:
    return float(np.square(found[0] * found[1].astype(np.float32) - array).sum())

  small, scales = min((rounded(0), rounded(-1)), key=error)
  return {name: small, name + _SCALES: scales}


def parse(data: bytes) -> dict[str, np.ndarray]:
  """Returns the arrays of a safetensors file, bfloat16 included.

  Raises:
    safetensors.SafetensorError: if it is damaged.
    KeyError: with the type of numbers that NumPy and ml_dtypes lack.
  """
  arrays = {
    name: np.frombuffer(found["data"], _dtype(found["dtype"])).reshape(found["shape"])
    for name, found in safetensors.deserialize(data)
  }
  shapes = _parse_header(data[8 : 8 + int.from_bytes(data[:8], "little")])
  read = {name: arrays[name].astype(shape.dtype, copy=False) for name, shape in shapes.items()}
  scales = arrays.keys() - read.keys()
  return {
    name: a * arrays[name + _SCALES].astype(a.dtype) if name + _SCALES in scales else a
    for name, a in read.items()
  }


def read_shapes(path: epath.Path) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes and types of a safetensors file's arrays, from its first bytes alone.

  Raises:
    UserError: if it is damaged.
  """
  try:
    with path.open("rb") as file:
      return _parse_header(file.read(int.from_bytes(file.read(8), "little")))
  except (ValueError, AttributeError, KeyError, FileNotFoundError) as error:
    raise files.damaged(path, error, f"restore {path.parent} from a copy") from None


def _parse_header(header: bytes) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of a file's arrays, and the types that they are read as."""
  entries = json.loads(header)
  stored = entries.pop("__metadata__", {}).get("float32", "")

  scaled = {name for name in entries if stored == "stored as int8" and name + _SCALES in entries}

  def dtype(name: str) -> str:
    half = stored in ("stored as float16", "stored as int8") and entries[name]["dtype"] == "F16"
    return "F32" if half or name in scaled else entries[name]["dtype"]

  scales = {name + _SCALES for name in scaled}
  return {
    name: jax.ShapeDtypeStruct(found["shape"], _dtype(dtype(name)))
    for name, found in entries.items()
    if name not in scales
  }


def _dtype(name: str) -> Any:  # such as F32
  names = {"BF16": ml_dtypes.bfloat16, "BOOL": np.bool_}
  if name not in names and not re.fullmatch(r"[FIU](8|16|32|64)", name):
    raise KeyError(name)
  return names.get(name) or np.dtype(f"{name[0].lower()}{int(name[1:]) // 8}")


def place(array: Any, leaf: Any) -> jax.Array:
  """Puts an array where the sharding of `leaf` says, if it has one; a JAX array stays where it is."""
  if isinstance(array, jax.Array):
    return array
  if leaf.sharding is None:
    return jax.numpy.asarray(array)
  return jax.make_array_from_callback(array.shape, leaf.sharding, lambda index: array[index])


def to_host(arrays: Any) -> Any:
  """Copies a tree of arrays, however sharded, to every host as numpy arrays."""
  if jax.process_count() > 1:
    arrays = multihost_utils.process_allgather(arrays, tiled=True)
  return jax.tree.map(np.asarray, jax.device_get(arrays))
