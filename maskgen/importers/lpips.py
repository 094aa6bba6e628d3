"""LPIPS: a backbone of torchvision, and the published linear heads of the package `lpips`, version 0.1.

`alexnet-owt-7be5be79.pth` and `alex.pth`, `vgg16-397923af.pth` and `vgg.pth`, or the same as safetensors.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from maskgen.errors import UserError
from maskgen.importers import tensors
from maskgen.importers.torchvision import to_torchvision
from maskgen.models import lpips

LEVELS = 5


class Loaded(NamedTuple):
  """Backbone and heads.

  Attributes:
    name: "alex" or "vgg".
    network: the backbone.
    params: its parameters.
    heads: float32 [c] for each of its maps.
  """

  name: str
  network: nn.Module
  params: Any
  heads: tuple[np.ndarray, ...]


def load(trunk: epath.PathLike, heads: epath.PathLike) -> Loaded:
  """Reads both files; the heads tell which backbone the other file has.

  Raises:
    UserError: as `tensors.read` and `tensors.take` do, or if the heads are not those of version 0.1.
  """
  found = tensors.read(heads)
  names = [f"lin{level}.model.1.weight" for level in range(LEVELS)]
  if set(found) != set(names):
    raise UserError(
      f"{heads} does not have exactly the tensors lin0.model.1.weight to lin4: give alex.pth or vgg.pth"
    )
  weights = tuple(tensors.need(heads, found, name, 4)[0, :, 0, 0] for name in names)
  channels = tuple(map(len, weights))
  if channels not in lpips.BACKBONES:
    raise UserError(
      f"{heads} has heads for {channels} channels, those of no backbone: give alex.pth or vgg.pth"
    )
  name, network = lpips.BACKBONES[channels]
  shapes = jax.eval_shape(network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
  params = tensors.take(trunk, tensors.read(trunk), to_torchvision, shapes["params"])
  return Loaded(name, network, params, weights)
