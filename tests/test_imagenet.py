"""ResNet-50 and VGG16: the same features as torchvision's, and what is refused.

PyTorch computes them in a separate process (torchvision_reference.py), which needs the extra `parity`;
without it, we compare with what that process once wrote.
"""

import importlib.util
import pathlib
import subprocess
import sys

import evaluation_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torchvision_reference as reference
from safetensors.numpy import save_file

from maskgen.errors import UserError
from maskgen.importers import torchvision
from maskgen.models import perceptual
from maskgen.models.imagenet import VGG16, ResNet50

HERE = pathlib.Path(__file__).parent
TINY = {
  "resnet50": ResNet50(channels=4, blocks=(2, 1), num_classes=5),
  "vgg16": VGG16(channels=((4, 4), (8,))),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
  path = HERE / "golden" / "torchvision.npz"
  if all(importlib.util.find_spec(package) for package in ("torch", "torchvision")):
    path = tmp_path_factory.mktemp("torchvision") / "torchvision.npz"
    program = [sys.executable, str(HERE / "torchvision_reference.py"), str(path)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
  with np.load(path) as archive:
    return dict(archive)


def random_file(network):
  """Random tensors of a network under torchvision's names."""
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
  named = jax.eval_shape(torchvision.to_torchvision, shapes)
  return evaluation_reference.weights({name: leaf.shape for name, leaf in named.items()})


@pytest.mark.parametrize("name", reference.NAMES)
def test_features_are_those_of_torchvision(name, expected):
  network = perceptual.build_network(name)
  params, _ = torchvision.load("file", random_file(network), network)
  found = jax.jit(network.apply)({"params": params}, reference.images())
  arrays = {f"map_{i}": value for i, value in enumerate(found["maps"])}
  if name == "resnet50":
    arrays["logits"] = found["logits"]
    np.testing.assert_allclose(found["pooled"], found["maps"][-1].mean(axis=(1, 2)), rtol=1e-5)
  assert {key.partition("/")[2] for key in expected if key.startswith(name)} == arrays.keys()
  for key, value in arrays.items():
    wanted = expected[f"{name}/{key}"]
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(reference.sampled(np.asarray(value)) / scale, wanted / scale, atol=2e-5)


@pytest.mark.parametrize("name", TINY)
def test_counters_and_dense_layers_are_left_out_and_nothing_else(name):
  tensors = random_file(TINY[name])
  unused = {
    "resnet50": ["bn1.num_batches_tracked", "layer1.0.bn1.num_batches_tracked"],
    "vgg16": ["classifier.0.weight", "head.fc.bias", "pre_logits.fc1.weight"],
  }[name]
  params, dead = torchvision.load("file", tensors | dict.fromkeys(unused, np.zeros(1)), TINY[name])
  assert dead == tuple(unused)
  first = "conv1" if name == "resnet50" else "features.0"
  kernel = params[first.replace(".", "_")]["kernel"]
  np.testing.assert_array_equal(np.transpose(kernel, (3, 2, 0, 1)), tensors[f"{first}.weight"])
  with pytest.raises(UserError, match=r"'features\.1\.running_mean' .* VGG16 without batch norm"):
    torchvision.load("file", tensors | {"features.1.running_mean": np.zeros(4, np.float32)}, TINY[name])
  with pytest.raises(UserError, match=f"no tensor '{first}.weight'"):
    torchvision.load("file", {k: v for k, v in tensors.items() if k != f"{first}.weight"}, TINY[name])
  with pytest.raises(UserError, match=r"shape \(3,\)"):
    torchvision.load("file", tensors | {f"{first}.weight": np.zeros(3, np.float32)}, TINY[name])


@pytest.mark.parametrize(
  ("first", "missing"), [("conv1.weight", "bn1.bias"), ("features.0.weight", "0.bias")]
)
def test_a_file_tells_its_network(first, missing, tmp_path):
  save_file({first: np.zeros((64, 3, 3, 3), np.float32)}, tmp_path / "weights.safetensors")
  with pytest.raises(UserError, match=f"no tensor '.*{missing}'"):
    torchvision.convert(tmp_path / "weights.safetensors")


def test_the_last_map_is_compared_at_224_pixels():
  network = TINY["resnet50"]
  params, _ = torchvision.load("file", random_file(network), network)
  a, b = jax.random.uniform(jax.random.key(0), (2, 2, 32, 32, 3))

  @jax.jit
  def distance(a, b):
    return perceptual.last_map_distance(network, params, a, b)

  resized = (jax.image.resize(x, (2, 224, 224, 3), "bilinear") for x in (a, b))
  maps = [jax.jit(network.apply)({"params": params}, x)["maps"][-1] for x in resized]
  assert maps[0].shape == (2, 28, 28, 32)
  np.testing.assert_allclose(distance(a, b), np.square(maps[0] - maps[1]).mean(axis=(1, 2, 3)), rtol=1e-4)
  np.testing.assert_array_equal(distance(a, a), 0)
