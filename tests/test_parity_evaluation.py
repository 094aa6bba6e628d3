"""The same numbers as torch-fidelity, prdc, lpips and pytorch-msssim.

PyTorch computes them in a separate process (evaluation_reference.py), which needs the extra `parity`; without
it, we compare with what that process once wrote.
"""

import importlib.util
import pathlib
import subprocess
import sys

import evaluation_reference as reference
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from maskgen.evaluators import frechet, paired, protocols, set_metrics
from maskgen.importers import inception, tensors, torchvision
from maskgen.importers import lpips as lpips_files
from maskgen.models import lpips

HERE = pathlib.Path(__file__).parent
PACKAGES = ("torch", "torch_fidelity", "prdc", "lpips", "pytorch_msssim")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
  path = HERE / "golden" / "evaluation.npz"
  if all(importlib.util.find_spec(package) for package in PACKAGES):
    path = tmp_path_factory.mktemp("evaluation") / "evaluation.npz"
    program = [sys.executable, str(HERE / "evaluation_reference.py"), str(path)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
  with np.load(path) as archive:
    return dict(archive)


@pytest.mark.parametrize("name", reference.FEATURES)
def test_sets_of_features(expected, name):
  generated, real = reference.features(name)
  distance = frechet.distance(frechet.fit([generated]), frechet.fit([real]))
  kid = set_metrics.kid(generated, real, subsets=20, size=30)
  closed = set_metrics.manifold_metrics(generated, real, k=3, strict=False)
  strict = set_metrics.manifold_metrics(generated, real, k=5, strict=True)
  found = {"fid": distance, "kid": kid.mean, "kid_std": kid.std}
  found |= {key: closed[key] for key in ("precision", "recall")}
  found |= {f"prdc_{key}": value for key, value in strict.items()}
  for key, value in found.items():
    np.testing.assert_allclose(value, expected[f"{name}/{key}"], rtol=1e-5, err_msg=key)


def test_inception_score(expected):
  found = set_metrics.inception_score(reference.logits())
  np.testing.assert_allclose(found, (expected["isc"], expected["isc_std"]), rtol=1e-5)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
  """Random weights in the published layout."""
  path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
  expected = jax.eval_shape(inception.to_pytorch, inception.shapes())
  save_file(reference.weights({name: leaf.shape for name, leaf in expected.items()}), path)
  return path


def test_inception(expected, inception_file):
  """Every tap, at random weights."""
  assert len(tensors.read(inception_file)) == 472
  extract = protocols.open_inception(inception.load(inception_file), "torch-fidelity")
  found = extract(reference.images())
  taps = dict(zip(("64", "192", "768", "2048", "spatial", "logits_unbiased", "logits"), found, strict=True))
  for name, value in taps.items():
    check(reference.sampled(np.asarray(value)), expected[f"inception/{name}"], name)


@pytest.mark.parametrize("channels", lpips.BACKBONES)
def test_lpips(expected, channels, tmp_path):
  """At random weights of backbone and heads."""
  name, network = lpips.BACKBONES[channels]
  shapes = jax.eval_shape(network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), "float32"))
  theirs = jax.eval_shape(torchvision.to_torchvision, shapes["params"])
  trunk = reference.weights({key: leaf.shape for key, leaf in theirs.items()})
  save_file(trunk | {"classifier.1.bias": np.zeros(2, np.float32)}, tmp_path / "trunk.safetensors")
  save_file(reference.heads(channels), tmp_path / "heads.safetensors")
  loaded = lpips_files.load(tmp_path / "trunk.safetensors", tmp_path / "heads.safetensors")
  found = paired.build(["lpips"], loaded)(*reference.pairs(64))
  np.testing.assert_allclose(found[f"lpips_{name}"], expected[f"lpips_{name}"], rtol=1e-5)


def test_structural_similarity(expected):
  originals, noisy = reference.pairs(171)
  found = paired.build(["ssim", "ms_ssim"], None)(noisy, originals)
  for name, value in found.items():
    np.testing.assert_allclose(value, expected[name], rtol=2e-5, err_msg=name)


def check(found, expected, name):
  """Compares relative to the largest value."""
  assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), name
