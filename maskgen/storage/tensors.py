"""Flat files of arrays (safetensors), and arrays on their way between hosts and devices."""

import json
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
from etils import epath
from jax.experimental import multihost_utils

from maskgen.errors import UserError

WEIGHTS = "weights.safetensors"


def parse(data: bytes) -> dict[str, np.ndarray]:
  """The arrays of a safetensors file, bfloat16 included, which the library does not read as numpy."""
  return {
    name: np.frombuffer(found["data"], _dtype(found["dtype"])).reshape(found["shape"])
    for name, found in safetensors.deserialize(data)
  }


def read_file(path: epath.Path) -> dict[str, np.ndarray]:
  """The arrays of a safetensors file.

  Raises:
    UserError: if it is damaged.
  """
  try:
    return parse(path.read_bytes())
  except safetensors.SafetensorError as error:
    raise UserError(f"{path} is damaged: {error}") from None


def read_shapes(path: epath.Path) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes and types of a safetensors file's arrays, from its first bytes alone.

  Raises:
    UserError: if it is damaged.
  """
  try:
    with path.open("rb") as file:
      header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return {
      name: jax.ShapeDtypeStruct(found["shape"], _dtype(found["dtype"])) for name, found in header.items()
    }
  except (ValueError, AttributeError, KeyError) as error:
    raise UserError(f"{path} is damaged: {error}") from None


def _dtype(name: str) -> Any:  # such as F32
  names = {"BF16": ml_dtypes.bfloat16, "BOOL": np.bool_}
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
