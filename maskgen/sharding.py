"""Device meshes, and the sharding of parameters over them.

The mesh has three axes: `data`, `fsdp` and `tensor`. A batch is sharded over `data` and `fsdp`. A parameter
is sharded by the first matching (regex, axes) rule, such as `("mlp/up/kernel", ("fsdp", "tensor"))`, with one
entry per dimension and `()` for replicated; without a matching rule, a large parameter is sharded over `fsdp`
along its largest divisible dimension.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maskgen import config as config_lib
from maskgen import tree
from maskgen.errors import UserError

AXES = ("data", "fsdp", "tensor")
# Below this number of scalars, gathering a parameter costs more than replicating it.
SMALL = 2**16
# A mesh without devices, for `on_mesh`: the shapes of a function's results, before JAX has any devices.
SHAPES_ONLY = jax.sharding.AbstractMesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3)


def make_mesh(section: config_lib.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """Makes the mesh of a config over the given devices, by default all.

  Where a slower network connects several slices, `data` is split over the slices first, so that only sums of
  gradients cross the network.

  Raises:
    UserError: if the axes' product is not the number of devices, or `data` does not divide over the slices.
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
  types = (AxisType.Auto,) * len(AXES)
  slices = num_slices(devices)
  if slices == 1:
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
  if shape[0] % slices:
    raise UserError(
      f"config.mesh.data={shape[0]} does not divide over {slices} slices: give a multiple of {slices}"
    )
  inner = (shape[0] // slices, *shape[1:])
  grid = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices)
  return jax.sharding.Mesh(grid, AXES, axis_types=types)


def num_slices(devices: Sequence[jax.Device]) -> int:
  """The number of slices among the devices; a slower network connects slices."""
  return len({getattr(device, "slice_index", 0) for device in devices})


def _show(shape: Sequence[int]) -> str:
  return " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))


def batch_ways(mesh: Any) -> int:
  """The number of parts into which a mesh splits a batch."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Shards the leading axis over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """A full copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def platform() -> str:
  """The platform that a function is traced for, "cpu", "gpu" or "tpu": the mesh's, if there is one.

  A program may be compiled ahead of time for devices that are not the default backend. Under `SHAPES_ONLY` it
  is "cpu", and no backend starts.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh == SHAPES_ONLY:
    return "cpu"
  name = jax.default_backend() if mesh.abstract_device is None else mesh.abstract_device.platform
  return "gpu" if name in ("cuda", "rocm") else name


def attach(shapes: Any, shardings: Any) -> Any:
  """A tree of shapes with the shardings of another tree."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    shapes,
    shardings,
  )


def on_mesh(
  fn: Callable[..., Any], mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> Callable[..., Any]:
  """Returns `fn`, traced under a mesh that `platform`, `constrain_batch` and `gather` see."""

  @functools.wraps(fn)
  def traced(*args: Any, **options: Any) -> Any:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return fn(*args, **options)

  return traced


def constrain_batch(x: jax.Array, features: str | None = None) -> jax.Array:
  """Constrains activations [b, ..., d] to be sharded like a batch, with d sharded over an axis or replicated.

  Products need the constraint on both sides: the compiler then gathers a parameter that is sharded over
  `fsdp`, which is cheap, instead of resharding the activations.
  """
  return _constrain(x, PartitionSpec(("data", "fsdp"), *(None,) * (x.ndim - 2), features))


def gather(tree: Any) -> Any:
  """Constrains parameters to be replicated before use, such as lookup tables."""
  return jax.tree.map(lambda x: _constrain(x, PartitionSpec()), tree)


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  for size, axes in zip(x.shape, spec, strict=False):
    if size % math.prod(mesh.shape[axis] for axis in _names(axes)):
      return x  # such as a small batch of samples
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def check_batch(batch_size: int, accumulation: int, mesh: jax.sharding.Mesh) -> None:
  """Checks that micro-batches divide evenly over the mesh.

  Raises:
    UserError: if they do not.
  """
  ways = batch_ways(mesh)
  processes = len({device.process_index for device in mesh.devices.flat})
  if ways % processes:
    raise UserError(
      f"config.mesh splits a batch {ways} ways (data x fsdp) over {processes} processes: use a "
      "multiple, with tensor no larger than the devices of a process"
    )
  if accumulation < 1 or batch_size % (ways * accumulation):
    raise UserError(
      f"config.batch_size={batch_size} is not divisible by {ways} (mesh axes data x fsdp) times "
      f"{accumulation} (accumulation): use a multiple of {ways * max(accumulation, 1)}"
    )


def shard(
  shapes: Any, rules: Sequence[tuple[str, Sequence[Any]]], mesh: jax.sharding.Mesh, over_data: bool = False
) -> Any:
  """Chooses a `NamedSharding` for every leaf of a tree of shapes.

  The rules see full paths, so one rule covers a parameter, its average and its optimizer state.

  Args:
    shapes: the tree.
    rules: see the module.
    mesh: the devices.
    over_data: whether large leaves are also sharded over `data`, along the largest dimension that divides.

  Raises:
    UserError: for a rule that is the first match of no parameter or does not fit a shape, and on an fsdp mesh
      for a large parameter that no rule matches and that has no divisible dimension.
  """
  chosen = tree.first_match(shapes, rules, None)

  def choose(path: Any, leaf: Any) -> NamedSharding:
    name = tree.path_name(path)
    spec = _spec(name, leaf.shape, chosen[name], mesh)
    return NamedSharding(mesh, _over_data(spec, leaf.shape, mesh) if over_data else spec)

  return jax.tree_util.tree_map_with_path(choose, shapes)


def coverage(targets: Any, rules: Sequence[tuple[str, Sequence[Any]]]) -> str:
  """A table of what each rule covers: number of arrays, their bytes, and the bytes on each device.

  Args:
    targets: a tree of shapes with shardings, as `shard` chose them by the rules.
    rules: those rules.
  """
  labels = [(pattern, " x ".join(map(_show_axes, axes)) or "replicated") for pattern, axes in rules]
  chosen = tree.first_match(targets, [(pattern, i) for i, (pattern, _) in enumerate(rules)], None)
  sums: dict[tuple[str, str], list[int]] = {label: [0, 0, 0] for label in labels}
  for name, leaf in tree.flatten(targets).items():
    if chosen[name] is not None:
      label = labels[chosen[name]]
    else:
      split = "fsdp" in jax.tree.leaves(tuple(leaf.sharding.spec))
      label = ("others", "fsdp" if split else "replicated")
    row = sums.setdefault(label, [0, 0, 0])
    bytes_each = leaf.dtype.itemsize
    row[0] += 1
    row[1] += bytes_each * math.prod(leaf.shape)
    row[2] += bytes_each * math.prod(leaf.sharding.shard_shape(leaf.shape))
  total = [sum(column) for column in zip(*sums.values(), strict=True)]
  rows = [("rule", "axes", "arrays", "MB", "MB per device")]
  for (pattern, axes), (arrays, size, local) in (*sums.items(), (("all", ""), total)):
    rows.append((pattern, axes, f"{arrays}", f"{size / 1e6:,.1f}", f"{local / 1e6:,.1f}"))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  aligned = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust)
  return "\n".join(
    "".join("  " + align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True))
    for row in rows
  )


def _names(entry: Any) -> tuple[str, ...]:
  """The axes of one dimension; a rule gives a name, several names or None."""
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _show_axes(entry: Any) -> str:
  return "*".join(_names(entry)) or "-"


def _spec(
  name: str, shape: tuple[int, ...], axes: tuple[Any, ...] | None, mesh: jax.sharding.Mesh
) -> PartitionSpec:
  if axes is None:
    return _default_spec(name, shape, mesh)
  if not axes:
    return PartitionSpec()
  if len(axes) != len(shape):
    raise UserError(f"sharding rule {axes} has {len(axes)} entries, {name} has shape {shape}")
  names = [_names(entry) for entry in axes]
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


def _over_data(spec: PartitionSpec, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> PartitionSpec:
  if math.prod(shape) < SMALL:
    return spec
  names = [_names(entry) for entry in (*spec, *(None,) * (len(shape) - len(spec)))]
  for dimension in np.argsort(shape, kind="stable")[::-1]:
    axes = (*names[dimension], "data")
    if "data" not in sum(names, ()) and shape[dimension] % math.prod(mesh.shape[axis] for axis in axes) == 0:
      return PartitionSpec(*names[:dimension], axes, *names[dimension + 1 :])
  return spec


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
