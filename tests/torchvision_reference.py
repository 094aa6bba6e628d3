"""Features of torchvision's networks at random weights, for tests/test_imagenet.py.

A separate program, which writes its arrays to the npz file OUT: python torchvision_reference.py OUT. What it
once wrote lies in tests/golden/torchvision.npz, for machines without torchvision.
"""

import sys

import numpy as np
from evaluation_reference import import_torchvision, weights

NAMES = ("resnet50", "vgg16")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images() -> np.ndarray:
  """float32 [1, 48, 40, 3] in [0, 1]."""
  return np.random.default_rng(12).uniform(size=(1, 48, 40, 3)).astype(np.float32)


def sampled(features: np.ndarray) -> np.ndarray:
  """128 or fewer of the numbers of an array, in the order of [b, h, w, c]."""
  return features.reshape(-1)[:: -(-features.size // 128)]


def main(out: str) -> None:
  import_torchvision()
  import torch
  import torchvision

  pixels = (images() - np.float32(MEAN)) / np.float32(STD)
  arrays = {}
  for name in NAMES:
    network = getattr(torchvision.models, name)(weights=None).eval()
    state = {key: value for key, value in network.state_dict().items() if value.is_floating_point()}
    made = weights({key: tuple(value.shape) for key, value in state.items() if "classifier" not in key})
    missing = network.load_state_dict({key: torch.tensor(value) for key, value in made.items()}, strict=False)
    assert not missing.unexpected_keys
    stages = [
      *([network.relu] if name == "resnet50" else []),
      *([getattr(network, f"layer{i}") for i in range(1, 5)] if name == "resnet50" else []),
      *([network.features[i] for i in (3, 8, 15, 22, 29)] if name == "vgg16" else []),
    ]
    maps: list[torch.Tensor] = []
    for stage in stages:
      stage.register_forward_hook(lambda module, inputs, output, maps=maps: maps.append(output.clone()))
    with torch.no_grad():
      logits = network(torch.tensor(pixels).permute(0, 3, 1, 2))
    for i, found in enumerate(maps):
      arrays[f"{name}/map_{i}"] = sampled(found.permute(0, 2, 3, 1).numpy())
    if name == "resnet50":
      arrays[f"{name}/logits"] = sampled(logits.numpy())
  np.savez(out, **arrays)


if __name__ == "__main__":
  main(sys.argv[1])
