"""What torch-fidelity and prdc compute, for tests/test_parity_evaluation.py.

A separate program, which writes its arrays to the npz file OUT: python evaluation_reference.py OUT. What it
once wrote lies in tests/golden/evaluation.npz, for machines without these packages. The inputs depend only on
seeds, and the test makes the same.
"""

import contextlib
import importlib.util
import io
import pathlib
import sys
from unittest import mock

import numpy as np

# Names of sets of features: rows of two sets, dimensions.
FEATURES = {"many": (400, 300, 24), "singular": (40, 50, 64)}


def features(name: str) -> tuple[np.ndarray, np.ndarray]:
  """A generated and a real set, float32, correlated, of different mean and spread."""
  *rows, width = FEATURES[name]
  rng = np.random.default_rng(7)
  mix = rng.normal(size=(width, width)) / np.sqrt(width)
  generated, real = (np.maximum(rng.normal(size=(n, width)) @ mix, 0) for n in rows)
  return (0.9 * generated + 0.1).astype(np.float32), real.astype(np.float32)


def logits() -> np.ndarray:
  """[203, 11], sorted by class."""
  rng = np.random.default_rng(8)
  classes = np.sort(rng.integers(11, size=203))
  return (rng.normal(size=(203, 11)) + 4 * np.eye(11)[classes]).astype(np.float32)


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """Random weights of a network in PyTorch's names and layout, whose activations keep their size."""
  rng = np.random.default_rng(9)
  made = {}
  for name, shape in sorted(shapes.items()):
    if len(shape) > 1:
      value = rng.normal(size=shape, scale=(2 / np.prod(shape[1:])) ** 0.5)
    elif name.endswith(("bias", "mean")):
      value = rng.normal(size=shape, scale=0.1)
    else:
      value = rng.uniform(0.5, 1.5, size=shape)
    made[name] = value.astype(np.float32)
  return made


def images() -> np.ndarray:
  """uint8 [1, 96, 80, 3]."""
  return np.random.default_rng(10).integers(256, size=(1, 96, 80, 3), dtype=np.uint8)


def sampled(features: np.ndarray) -> np.ndarray:
  """At most 256 features per image, which keeps the stored file small."""
  return features[:, :: -(-features.shape[1] // 256)]


def import_torchvision() -> None:
  """Imports it even if its compiled ops, which nothing here uses, do not fit this build of torch."""
  import torch

  (folder,) = importlib.util.find_spec("torchvision").submodule_search_locations
  try:
    for library in pathlib.Path(folder).glob("_C*.so"):
      torch.ops.load_library(library)
  except OSError:
    for name in ("nms", "qnms"):
      torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float limit) -> Tensor")
  import torchvision  # noqa: F401


def set_metrics() -> dict[str, float]:
  import torch
  from prdc import compute_prdc
  from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

  found = {}
  for name in FEATURES:
    generated, real = features(name)
    tensors = torch.from_numpy(generated), torch.from_numpy(real)
    statistics = (metric_fid.fid_features_to_statistics(x) for x in tensors)
    found[f"{name}/fid"] = metric_fid.fid_statistics_to_metric(*statistics, False)[metric_fid.KEY_METRIC_FID]
    options = dict(kid_subsets=20, kid_subset_size=30, rng_seed=2020, verbose=False)
    kid = metric_kid.kid_features_to_metric(*tensors, **options)
    found |= {
      f"{name}/kid": kid[metric_kid.KEY_METRIC_KID_MEAN],
      f"{name}/kid_std": kid[metric_kid.KEY_METRIC_KID_STD],
    }
    prc = metric_prc.prc_features_to_metric(*tensors, verbose=False)
    found |= {f"{name}/{key}": prc[key] for key in ("precision", "recall")}
    with contextlib.redirect_stdout(io.StringIO()):
      prdc = compute_prdc(real, generated, nearest_k=5)
    found |= {f"{name}/prdc_{key}": value for key, value in prdc.items()}
  isc = metric_isc.isc_features_to_metric(torch.from_numpy(logits()))
  return found | {"isc": isc[metric_isc.KEY_METRIC_ISC_MEAN], "isc_std": isc[metric_isc.KEY_METRIC_ISC_STD]}


def load(network) -> None:
  import torch

  shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
  made = weights({name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked")})
  network.load_state_dict({name: torch.from_numpy(value) for name, value in made.items()})


def inception() -> dict[str, np.ndarray]:
  import torch
  from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

  names = FeatureExtractorInceptionV3.get_provided_features_list()
  with mock.patch.object(torch, "load"), mock.patch.object(torch.nn.Module, "load_state_dict"):
    network = FeatureExtractorInceptionV3("inception", list(names), "no file")
  load(network)
  spatial = []
  network.Mixed_6d.register_forward_hook(lambda module, inputs, output: spatial.append(output[:, :7]))
  found = dict(zip(names, network(torch.from_numpy(images()).permute(0, 3, 1, 2)), strict=True))
  found["spatial"] = spatial[0].permute(0, 2, 3, 1).flatten(1)
  return {f"inception/{name}": sampled(value.numpy()) for name, value in found.items()}


def pairs(side: int) -> tuple[np.ndarray, np.ndarray]:
  """Smooth images and noisy copies, uint8 [2, side, side + 8, 3]."""
  rng = np.random.default_rng(11)
  coarse = rng.integers(256, size=(2, -(-side // 8), side // 8 + 1, 3)).astype(np.float32)
  images = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :side, : side + 8]
  noisy = images + rng.normal(size=images.shape, scale=40)
  return images.astype(np.uint8), noisy.clip(0, 255).astype(np.uint8)


def heads(channels: tuple[int, ...]) -> dict[str, np.ndarray]:
  """Random linear heads of LPIPS under the published names."""
  rng = np.random.default_rng(12)
  return {
    f"lin{i}.model.1.weight": rng.uniform(size=(1, c, 1, 1)).astype(np.float32)
    for i, c in enumerate(channels)
  }


def similarities() -> dict[str, np.ndarray]:
  import pytorch_msssim
  import torch
  from lpips import LPIPS

  found = {}
  for name in ("alex", "vgg"):
    with mock.patch("builtins.print"):
      model = LPIPS(net=name, pnet_rand=True, pretrained=False)
    trunk = {f"features.{key.split('.', 1)[1]}": key for key in model.net.state_dict()}
    made = weights({key: tuple(model.net.state_dict()[own].shape) for key, own in trunk.items()})
    model.net.load_state_dict({trunk[key]: torch.from_numpy(value) for key, value in made.items()})
    state = {key: torch.from_numpy(value) for key, value in heads(model.chns).items()}
    missing, _ = model.load_state_dict(state, strict=False)
    assert not [key for key in missing if key.startswith("lin") and "lins" not in key]
    images = (torch.from_numpy(x).permute(0, 3, 1, 2) / 255 for x in pairs(64))
    with torch.no_grad():
      found[f"lpips_{name}"] = model(*images, normalize=True).flatten().numpy()
  images = [torch.from_numpy(x).permute(0, 3, 1, 2).double() for x in pairs(171)]
  found["ms_ssim"] = pytorch_msssim.ms_ssim(*images, data_range=255, size_average=False).numpy()
  found["ssim"] = pytorch_msssim.ssim(*images, data_range=255, size_average=False).numpy()
  return found


if __name__ == "__main__":
  import_torchvision()
  np.savez(sys.argv[1], **set_metrics(), **inception(), **similarities())
