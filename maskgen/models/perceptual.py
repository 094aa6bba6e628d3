"""Perceptual distance between images on a frozen, pluggable feature network.

Johnson et al. 2016, "Perceptual Losses for Real-Time Style Transfer and Super-Resolution"; the
channel normalisation is that of LPIPS (Zhang et al. 2018, equation 1), with all channel weights one.

A network is a Linen module that takes float32 images [b, h, w, 3] in [0, 1] and returns a dict with
"maps", a list of feature maps [b, h_l, w_l, c_l].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen.errors import UserError, nearest
from maskgen.models.imagenet import VGG16, ResNet50
from maskgen.models.mobilenet import MobileNetV2

NETWORKS: dict[str, Callable[[], nn.Module]] = {
  "mobilenet_v2": MobileNetV2,
  "resnet50": ResNet50,
  "vgg16": VGG16,
}

# Below 64 px the coarsest map of a network with stride 32 is a single pixel, mostly padding, and
# the distance often rates a shift by one pixel as worse than a blur.
SMALLEST_SIDE = 64

# Keeps the gradient bounded where no channel responds. On photos, feature vectors of MobileNetV2
# have norms of 8 to 100, so there it changes nothing.
EPSILON = 1e-4

# The side to which `last_map_distance` resizes images.
LAST_MAP_SIDE = 224


def build_network(name: str) -> nn.Module:
  """Returns the feature network registered under `name`, or raises a UserError."""
  if name not in NETWORKS:
    raise UserError(f"there is no feature network '{name}'{nearest(name, NETWORKS)}")
  return NETWORKS[name]()


def feature_maps(network: nn.Module, params: Mapping[str, Any], images: jax.Array) -> list[jax.Array]:
  """Computes the feature maps of images of any size.

  Networks are convolutional, so images keep their size, except that a shorter side below
  `SMALLEST_SIDE` is enlarged to it (bilinear, with the same aspect ratio).

  Args:
    network: a feature network.
    params: its parameters, the tree under "params".
    images: float32 [b, h, w, c] in [0, 1], with c = 3, or c = 1 for grey.

  Returns:
    The network's maps, float32 [b, h_l, w_l, c_l] each.
  """
  batch, height, width, channels = images.shape
  if channels == 1:
    images = jnp.repeat(images, 3, axis=-1)
  if (side := min(height, width)) < SMALLEST_SIDE:
    height, width = (round(size * SMALLEST_SIDE / side) for size in (height, width))
    images = jax.image.resize(images, (batch, height, width, 3), "bilinear")
  outputs: Any = network.apply({"params": params}, images)
  return outputs["maps"]


def perceptual_distance(maps_a: Sequence[jax.Array], maps_b: Sequence[jax.Array]) -> jax.Array:
  """Squared distance of channel-unit-normalised features, averaged over space, then over levels.

  At each pixel of a map this is 2 - 2 cos of the angle between the two feature vectors,
  regardless of the number of channels.

  Args:
    maps_a: float32 [b, h_l, w_l, c_l] for each level l.
    maps_b: maps of the same shapes.

  Returns:
    float32 [b], in [0, 4]; at most 2 for maps without negative values.
  """
  levels = [
    jnp.square(_unit(a) - _unit(b)).sum(axis=-1).mean(axis=(1, 2))
    for a, b in zip(maps_a, maps_b, strict=True)
  ]
  return jnp.stack(levels).mean(axis=0)


def all_maps_distance(network: nn.Module, params: Mapping[str, Any], a: jax.Array, b: jax.Array) -> jax.Array:
  """The `perceptual_distance` of the `feature_maps` of images; arguments as there, result float32 [b]."""
  maps_a, maps_b = (feature_maps(network, params, images) for images in (a, b))
  return perceptual_distance(maps_a, maps_b)


def last_map_distance(network: nn.Module, params: Mapping[str, Any], a: jax.Array, b: jax.Array) -> jax.Array:
  """Mean squared error of the last feature maps of images that are resized to 224 x 224 pixels (bilinear).

  This is the loss in the published training code of MAGVIT, whose authors include MaskGIT's. Arguments as of
  `feature_maps`, result float32 [b].
  """
  shape = (a.shape[0], LAST_MAP_SIDE, LAST_MAP_SIDE, a.shape[-1])
  resized = (jax.image.resize(images, shape, "bilinear") for images in (a, b))
  last_a, last_b = (feature_maps(network, params, images)[-1] for images in resized)
  return jnp.square(last_a - last_b).mean(axis=(1, 2, 3))


DISTANCES = {"all_maps": all_maps_distance, "last_map": last_map_distance}


def _unit(x: jax.Array) -> jax.Array:
  return x * jax.lax.rsqrt(jnp.square(x).sum(axis=-1, keepdims=True) + EPSILON)
