"""Device meshes, and where each parameter lives on them.

The mesh has three axes: `data`, `fsdp` and `tensor`. A batch is split over `data` and `fsdp`. A parameter
goes where the first matching (regex, axes) rule puts it, such as `("mlp/up/kernel", ("fsdp", "tensor"))`,
one entry per dimension, `()` for replicated; without a matching rule a large parameter is split over
`fsdp` along its largest divisible dimension.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maskgen import config as config_lib
from maskgen import tree
from maskgen.errors import UserError

AXES = ("data", "fsdp", "tensor")
# Below this many scalars, gathering a parameter costs more than its replicas.
SMALL = 2**16


def make_mesh(section: config_lib.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """Makes the mesh of a config over the given devices, or over all there are.

  Raises:
    UserError: if the axes' product is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  shape = [section.data, section.fsdp, section.tensor]
  if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
    raise UserError(f"config.mesh is {_show(shape)}: sizes are positive, and one of them may be -1")
  if -1 in shape:
    rest = -math.prod(shape)
    shape[shape.index(-1)] = max(len(devices) // rest, 1)
  if math.prod(shape) != len(devices):
    raise UserError(
      f"config.mesh asks for {_show(shape)} devices, there are {len(devices)}: "
      "make the product of the axes the number of devices, or one axis -1"
    )
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def _show(shape: Sequence[int]) -> str:
  return " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Splits the leading axis over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """A full copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, accumulation: int, mesh: jax.sharding.Mesh) -> None:
  """Checks that micro-batches divide evenly over the mesh.

  Raises:
    UserError: if they do not.
  """
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  if ways % jax.process_count():
    raise UserError(
      f"config.mesh splits a batch {ways} ways (data x fsdp) over {jax.process_count()} processes: use a "
      "multiple, with tensor no larger than the devices of a process"
    )
  if accumulation < 1 or batch_size % (ways * accumulation):
    raise UserError(
      f"config.batch_size={batch_size} is not divisible by {ways} (mesh axes data x fsdp) times "
      f"{accumulation} (accumulation): use a multiple of {ways * max(accumulation, 1)}"
    )


def shard(shapes: Any, rules: Sequence[tuple[str, Sequence[Any]]], mesh: jax.sharding.Mesh) -> Any:
  """Chooses a `NamedSharding` for every leaf of a tree of shapes.

  The rules see full paths, so one rule covers a parameter, its average and its optimizer state.

  Raises:
    UserError: for a rule that is the first match of nothing or does not fit a shape, and for a large
      parameter that no rule matches and no dimension of which is divisible on an fsdp mesh.
  """
  chosen = tree.first_match(shapes, rules, None)
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(
      mesh, _spec(tree.path_name(path), leaf.shape, chosen[tree.path_name(path)], mesh)
    ),
    shapes,
  )


def _spec(
  name: str, shape: tuple[int, ...], axes: tuple[Any, ...] | None, mesh: jax.sharding.Mesh
) -> PartitionSpec:
  if axes is None:
    return _default_spec(name, shape, mesh)
  if not axes:
    return PartitionSpec()
  if len(axes) != len(shape):
    raise UserError(f"sharding rule {axes} has {len(axes)} entries, {name} has shape {shape}")
  names = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in axes]
  used = [axis for entry in names for axis in entry]
  for axis in used:
    if axis not in AXES:
      raise UserError(f"sharding rule {axes} names the axis '{axis}'; known: {', '.join(AXES)}")
    if used.count(axis) > 1:
      raise UserError(f"sharding rule {axes} names the axis '{axis}' twice: a dimension needs its own")
  for size, entry in zip(shape, names, strict=True):
    if size % math.prod(mesh.shape[axis] for axis in entry):
      ways = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in entry)
      raise UserError(
        f"sharding rule {axes} does not fit {name} of shape {shape}: {size} is not divisible by {ways}"
      )
  return PartitionSpec(*axes)


def _default_spec(name: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> PartitionSpec:
  ways = mesh.shape["fsdp"]
  if ways == 1 or math.prod(shape) < SMALL:
    return PartitionSpec()
  for dimension in np.argsort(shape, kind="stable")[::-1]:
    if shape[dimension] % ways == 0:
      return PartitionSpec(*(None,) * dimension, "fsdp")
  raise UserError(
    f"{name} of shape {shape} has no dimension divisible by fsdp={ways}: add a rule for it to "
    "config.sharding, () to replicate it"
  )
