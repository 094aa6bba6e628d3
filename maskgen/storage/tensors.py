"""Flat files of arrays (safetensors), and arrays on their way between hosts and devices."""

from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
from jax.experimental import multihost_utils

WEIGHTS = "weights.safetensors"


def parse(data: bytes) -> dict[str, np.ndarray]:
  """The arrays of a safetensors file, bfloat16 included, which the library does not read as numpy."""

  def dtype(name: str) -> Any:  # such as F32
    names = {"BF16": ml_dtypes.bfloat16, "BOOL": np.bool_}
    return names.get(name) or np.dtype(f"{name[0].lower()}{int(name[1:]) // 8}")

  return {
    name: np.frombuffer(found["data"], dtype(found["dtype"])).reshape(found["shape"])
    for name, found in safetensors.deserialize(data)
  }


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
