"""MobileNetV2 weights from an npz file of 8-bit convolutions.

The file numbers the convolutions from 00 in the order of the forward pass, and has four tensors
for each: `NN.q` uint8 [kh, kw, in / groups, out], scalars `NN.scale` and `NN.zero`, and `NN.b`
float [out], with kernel = (q - zero) * scale and batch norm folded in.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from maskgen.errors import UserError
from maskgen.importers import Converted
from maskgen.importers import tensors as tensors_lib
from maskgen.models.mobilenet import MobileNetV2

PARTS = ("q", "scale", "zero", "b")


def convert(path: epath.PathLike) -> Converted:
  """Converts the file of the full-width ImageNet network; errors as in `load`."""
  return Converted({"network": "mobilenet_v2"}, {"params": {"main": load(path)}})


def load(path: epath.PathLike, network: MobileNetV2 | None = None) -> dict[str, Any]:
  """Reads the parameters of a MobileNetV2.

  Args:
    path: the npz file, local or anything etils.epath opens.
    network: the architecture that the file should fit; the full-width ImageNet network by default.

  Returns:
    The tree under "params" of `network.init`, float32 numpy arrays.

  Raises:
    UserError: if the file cannot be read as npz, or a tensor is missing, unused, of another shape
      or type than the network's, or not finite.
  """
  network = network or MobileNetV2()
  tensors = tensors_lib.read_npz(path)
  layers = convolutions(network)
  expected = {f"{i:02}.{part}" for i in range(len(layers)) for part in PARTS}
  if missing := sorted(expected - tensors.keys()):
    raise UserError(f"{path} has no tensor '{missing[0]}': give a file of {len(layers)} convolutions")
  if unused := sorted(tensors.keys() - expected):
    raise UserError(
      f"{path} has a tensor '{unused[0]}' that the network does not have: give a file"
      f" of {len(layers)} convolutions"
    )

  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = traverse_util.flatten_dict(jax.eval_shape(network.init, jax.random.key(0), image)["params"])
  params = {}
  for i, layer in enumerate(layers):
    kernel, bias = shapes[*layer, "kernel"].shape, shapes[*layer, "bias"].shape
    for part, shape in zip(PARTS, (kernel, (), (), bias), strict=True):
      _check(path, f"{i:02}.{part}", tensors[f"{i:02}.{part}"], shape)
    q, scale, zero, b = (tensors[f"{i:02}.{part}"].astype(np.float32) for part in PARTS)
    params[*layer, "kernel"] = (q - zero) * scale
    params[*layer, "bias"] = b
  return traverse_util.unflatten_dict(params)


def convolutions(network: MobileNetV2) -> list[tuple[str, ...]]:
  """Returns the parameter path of every convolution, in the order of the forward pass."""
  layers: list[tuple[str, ...]] = [("stem",)]
  for i, block in enumerate(network.blocks):
    expand = ("expand",) if block.expansion > 1 else ()
    layers += [(f"block_{i:02}", name) for name in (*expand, "depthwise", "project")]
  return [*layers, ("head",), ("classifier",)]


def _check(path: epath.PathLike, name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> None:
  if tensor.shape != shape:
    raise UserError(
      f"{path}: tensor '{name}' has shape {tensor.shape}, but the network needs {shape}:"
      " give weights of the same width and number of classes"
    )
  if name.endswith(".q") and tensor.dtype != np.uint8:
    raise UserError(f"{path}: tensor '{name}' is {tensor.dtype}: quantized kernels must be uint8")
  if not (np.issubdtype(tensor.dtype, np.number) and np.isfinite(tensor).all()):
    raise UserError(f"{path}: tensor '{name}' contains values that are not finite: give another file")
