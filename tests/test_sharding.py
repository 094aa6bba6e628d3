import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from maskgen import sharding
from maskgen.config import Mesh
from maskgen.errors import UserError

SHAPES = {
  "encoder": {"kernel": (512, 256), "bias": (256,)},
  "decoder": {"kernel": (3, 3, 96, 256), "scale": (256,)},
}


def shapes(tree):
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=lambda leaf: isinstance(leaf, tuple)
  )


def specs(tree, rules, mesh):
  return jax.tree.map(lambda leaf: leaf.spec, sharding.shard(shapes(tree), rules, mesh))


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2))


# Meshes


@pytest.mark.parametrize(
  "section,expected",
  [
    (Mesh(), (8, 1, 1)),
    (Mesh(data=2, fsdp=-1), (2, 4, 1)),
    (Mesh(data=1, fsdp=2, tensor=-1), (1, 2, 4)),
    (Mesh(data=2, fsdp=2, tensor=2), (2, 2, 2)),
  ],
)
def test_mesh_shape(section, expected):
  assert tuple(sharding.make_mesh(section).shape.values()) == expected
  assert sharding.make_mesh(section).axis_names == sharding.AXES


def test_mesh_over_given_devices():
  assert sharding.make_mesh(Mesh(), jax.devices()[:3]).size == 3


@pytest.mark.parametrize(
  "section,message",
  [
    (Mesh(data=3), "data=3 x fsdp=1 x tensor=1 devices, there are 8"),
    (Mesh(data=-1, fsdp=3), "fsdp=3.*there are 8"),
    (Mesh(data=-1, fsdp=16), "fsdp=16.*there are 8"),
    (Mesh(data=-1, fsdp=-1), "one of them may be -1"),
    (Mesh(data=0), "sizes are positive"),
    (Mesh(data=-2), "sizes are positive"),
  ],
)
def test_wrong_mesh_is_refused(section, message):
  with pytest.raises(UserError, match=message):
    sharding.make_mesh(section)


def test_batches_are_split_over_data_and_fsdp(mesh):
  placed = jax.device_put(np.arange(8), sharding.batch_sharding(mesh))
  assert {len(shard.data) for shard in placed.addressable_shards} == {2}
  whole = jax.device_put(np.arange(8), sharding.replicated(mesh))
  assert whole.is_fully_replicated


def test_batch_must_divide(mesh):
  sharding.check_batch(8, 2, mesh)
  with pytest.raises(UserError, match=r"batch_size=6 .*by 4 .*times 1 .*multiple of 4"):
    sharding.check_batch(6, 1, mesh)
  with pytest.raises(UserError, match=r"batch_size=12 .*by 4 .*times 2 .*multiple of 8"):
    sharding.check_batch(12, 2, mesh)
  with pytest.raises(UserError, match="accumulation"):
    sharding.check_batch(8, 0, mesh)


# Rules


def test_large_parameters_are_split_along_their_largest_divisible_dimension(mesh):
  found = specs(SHAPES, (), mesh)
  assert found == {
    "encoder": {"kernel": PartitionSpec("fsdp"), "bias": PartitionSpec()},
    "decoder": {"kernel": PartitionSpec(None, None, None, "fsdp"), "scale": PartitionSpec()},
  }
  assert specs({"w": (70_001, 2)}, (), mesh) == {"w": PartitionSpec(None, "fsdp")}
  assert specs({"w": (256, 256)}, (), mesh) == {"w": PartitionSpec(None, "fsdp")}
  assert specs({"w": (255, 256)}, (), mesh) == {"w": PartitionSpec()}  # just too small
  assert specs({"count": ()}, (), mesh) == {"count": PartitionSpec()}


def test_without_an_fsdp_axis_everything_is_replicated():
  mesh = sharding.make_mesh(Mesh())
  assert set(jax.tree.leaves(specs(SHAPES | {"odd": (70_001, 3)}, (), mesh))) == {PartitionSpec()}


def test_the_first_matching_rule_decides(mesh):
  rules = (("encoder/kernel", (("fsdp", "tensor"), None)), ("decoder", ()), ("kernel|bias", ("tensor",)))
  found = specs(SHAPES, rules, mesh)
  assert found["encoder"]["kernel"] == PartitionSpec(("fsdp", "tensor"), None)
  assert found["encoder"]["bias"] == PartitionSpec("tensor")
  assert found["decoder"] == {"kernel": PartitionSpec(), "scale": PartitionSpec()}


@pytest.mark.parametrize(
  "rules,message",
  [
    ((("decodr/kernel", ()),), "rule 'decodr/kernel' applies to no parameter"),
    ((("kernel", ()), ("encoder/kernel", ("fsdp", None))), "rule 'encoder/kernel' applies to no"),
    (
      (("decoder/kernel", ("fsdp", None, None, None)),),
      r"does not fit decoder/kernel of shape \(3, 3, 96, 256\): 3 is not divisible by fsdp=2",
    ),
    ((("encoder/kernel", ("fsdp",)),), r"1 entries, encoder/kernel has shape \(512, 256\)"),
    ((("encoder/kernel", ("fsdp", "fsdp")),), "names the axis 'fsdp' twice"),
    ((("encoder/bias", ("model",)),), "names the axis 'model'; known: data, fsdp, tensor"),
  ],
)
def test_wrong_rules_are_refused(rules, message, mesh):
  with pytest.raises(UserError, match=message):
    specs(SHAPES, rules, mesh)


@pytest.mark.parametrize("shape", [(2, 512), (512,), (1024,)])
def test_an_entry_of_two_axes_needs_a_multiple_of_their_product(shape, mesh):
  two = ("fsdp", "tensor")
  axes = (None,) * (len(shape) - 1) + (two,)
  assert specs({"w": shape}, (("w", axes),), mesh) == {"w": PartitionSpec(*axes)}
  odd = (*shape[:-1], shape[-1] + 2)  # divisible by each axis, not by both
  with pytest.raises(UserError, match=r"w of shape .*not divisible by fsdp=2 x tensor=2"):
    specs({"w": odd}, (("w", axes),), mesh)


def test_a_large_parameter_that_cannot_be_split_needs_a_rule(mesh):
  odd = {"encoder": {"kernel": (333, 333)}}
  with pytest.raises(UserError, match=r"encoder/kernel of shape \(333, 333\).*fsdp=2.*\(\) to replicate"):
    specs(odd, (), mesh)
  assert specs(odd, (("encoder/kernel", ()),), mesh)["encoder"]["kernel"] == PartitionSpec()


def test_one_rule_covers_a_parameter_and_its_optimizer_state(mesh):
  state = {"params": {"w": (4, 4)}, "opt_state": {"mu": {"w": (4, 4)}}, "ema": {"w": (4, 4)}}
  found = specs(state, (("w$", (None, "tensor")),), mesh)
  assert set(jax.tree.leaves(found)) == {PartitionSpec(None, "tensor")}


def test_coverage_counts_every_array_once(mesh):
  rules = (("encoder/kernel", ("fsdp", "tensor")), ("scale", ()))
  tree = shapes(SHAPES)
  where = sharding.shard(tree, rules, mesh)
  targets = jax.tree.map(
    lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, where
  )
  rows = [line.split() for line in sharding.coverage(targets, rules).splitlines()]
  kernel, conv = 4 * 512 * 256 / 1e6, 4 * 9 * 96 * 256 / 1e6
  assert rows[1] == ["encoder/kernel", "fsdp", "x", "tensor", "1", f"{kernel:.1f}", f"{kernel / 4:.1f}"]
  assert rows[2][:3] == ["scale", "replicated", "1"]
  assert ["others", "fsdp", "1", f"{conv:.1f}", f"{conv / 2:.1f}"] in rows
  assert rows[-1][:2] == ["all", "4"]
