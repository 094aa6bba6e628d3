"""ResNet-50 and VGG16 from safetensors or PyTorch files of torchvision or timm, for perceptual losses."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from maskgen import tree
from maskgen.errors import UserError
from maskgen.importers import Converted, tensors, vqgan_pytorch
from maskgen.importers.torch_tensors import torch_name
from maskgen.models.imagenet import VGG16, ResNet50

# Counters, and VGG16's dense layers under both libraries' names.
UNUSED = r"\.num_batches_tracked$|^(classifier|pre_logits|head)\."


def convert(path: epath.PathLike) -> Converted:
  """Converts a whole file; its tensors tell which of the two networks it has; errors as in `load`."""
  found = tensors.read(path)
  name, network = ("vgg16", VGG16()) if "features.0.weight" in found else ("resnet50", ResNet50())
  params, dead = load(path, found, network)
  return Converted({"network": name}, {"params": {"main": params}}, dead=dead)


def load(
  path: epath.PathLike, found: tensors.Tensors, network: ResNet50 | VGG16
) -> tuple[Any, tuple[str, ...]]:
  """Takes a network's parameters from the tensors of a file.

  Args:
    path: of the file, for messages.
    found: its tensors.
    network: the architecture.

  Returns:
    The tree under "params", float32, and the names of the tensors that are not needed.

  Raises:
    UserError: as `tensors.take` does, or if the file has a tensor that the network does not have.
  """
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
  known = jax.eval_shape(to_torchvision, shapes)
  dead = tuple(sorted(name for name in found if name not in known and re.search(UNUSED, name)))
  if odd := sorted(found.keys() - known.keys() - set(dead)):
    raise UserError(
      f"{path} has a tensor '{odd[0]}' that the network does not have: give weights of a ResNet-50, or of "
      "a VGG16 without batch norm"
    )
  return tensors.take(path, found, to_torchvision, shapes), dead


def to_torchvision(params: Any) -> dict[str, Any]:
  """Renames our parameters to torchvision's names, which are also timm's, and PyTorch's layout."""
  return {
    torch_name(name): value.transpose(vqgan_pytorch.AXES[value.ndim])
    for name, value in tree.flatten(params).items()
  }
