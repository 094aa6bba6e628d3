"""LPIPS, a learned perceptual distance (Zhang et al. 2018), version 0.1, and AlexNet, a backbone of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen.models.imagenet import VGG16, normalise

EPSILON = 1e-10
# Of images, by the name of the backbone; on smaller ones its last map is empty.
SMALLEST_SIDE = {"alex": 31, "vgg": 16}


class AlexNet(nn.Module):
  """The convolutions of torchvision's AlexNet (Krizhevsky 2014), under its names.

  Attributes:
    channels: of each convolution.
  """

  channels: tuple[int, ...] = (64, 192, 384, 256, 256)

  @nn.compact
  def __call__(self, images: jax.Array) -> dict[str, Any]:
    """Computes features.

    Args:
      images: float32 [b, h, w, 3] in [0, 1], of at least 31 pixels.

    Returns:
      "maps": after each convolution and its ReLU, float32 [b, h_l, w_l, c_l].
    """
    x, maps = normalise(images), []
    layers = zip(
      (0, 3, 6, 8, 10), self.channels, (11, 5, 3, 3, 3), (4, 1, 1, 1, 1), (2, 2, 1, 1, 1), strict=True
    )
    for index, channels, kernel, stride, padding in layers:
      if index in (3, 6):
        x = nn.max_pool(x, (3, 3), (2, 2))
      conv = nn.Conv(channels, (kernel,) * 2, strides=stride, padding=padding, name=f"features_{index}")
      x = nn.relu(conv(x))
      maps.append(x)
    return {"maps": maps}


# Backbones by the channels of their maps, which the linear heads tell.
BACKBONES: dict[tuple[int, ...], tuple[str, nn.Module]] = {
  (64, 192, 384, 256, 256): ("alex", AlexNet()),
  (64, 128, 256, 512, 512): ("vgg", VGG16()),
}


def distance(
  network: nn.Module, params: Mapping[str, Any], heads: Sequence[jax.Array], a: jax.Array, b: jax.Array
) -> jax.Array:
  """The distance of pairs of images (equation 1).

  Args:
    network: a backbone.
    params: its parameters.
    heads: a weight for each channel of each map, float32 [c_l].
    a: float32 [b, h, w, 3] in [0, 1]; its scaling is that of ImageNet's pixels.
    b: images of the same shape.

  Returns:
    float32 [b], at least 0.
  """
  with jax.default_matmul_precision("highest"):
    outputs: list[Any] = [network.apply({"params": params}, images) for images in (a, b)]
  levels = [
    (jnp.square(_unit(x) - _unit(y)) * head[None, None, None]).sum(axis=-1).mean(axis=(1, 2))
    for x, y, head in zip(*(output["maps"] for output in outputs), heads, strict=True)
  ]
  return jnp.stack(levels).sum(axis=0)


def _unit(x: jax.Array) -> jax.Array:
  return x / (jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True)) + EPSILON)
