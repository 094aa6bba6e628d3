"""ResNet-50 and VGG16, frozen feature networks for perceptual losses.

He et al. 2016, "Deep Residual Learning for Image Recognition", table 1, in the variant of torchvision and
timm, whose 3x3 convolutions have the stride; Simonyan and Zisserman 2015, "Very Deep Convolutional
Networks", column D, without its dense layers. Modules have torchvision's names, with an underscore instead of
a dot before an index.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen.models.inception import BatchNorm

# Mean and standard deviation of ImageNet's pixels, with which torchvision's networks are trained.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
EPSILON = 1e-5


def normalise(images: jax.Array) -> jax.Array:
  """Images float32 [b, h, w, 3] in [0, 1] to the networks' input."""
  return (images - jnp.array(MEAN)[None, None, None]) / jnp.array(STD)[None, None, None]


def conv(channels: int, size: int, name: str, stride: int = 1, use_bias: bool = False) -> nn.Conv:
  """A convolution that pads all sides alike."""
  return nn.Conv(channels, (size, size), strides=stride, padding=size // 2, use_bias=use_bias, name=name)


def batch_norm(name: str) -> BatchNorm:
  """Batch norm with the stored statistics."""
  return BatchNorm(EPSILON, name=name)


class Bottleneck(nn.Module):
  """A residual block of three convolutions; the output has four times the channels of the middle one."""

  channels: int
  stride: int
  project: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = nn.relu(batch_norm("bn1")(conv(self.channels, 1, "conv1")(x)))
    y = nn.relu(batch_norm("bn2")(conv(self.channels, 3, "conv2", self.stride)(y)))
    y = batch_norm("bn3")(conv(4 * self.channels, 1, "conv3")(y))
    if self.project:
      x = batch_norm("downsample_1")(conv(4 * self.channels, 1, "downsample_0", self.stride)(x))
    return nn.relu(x + y)


class ResNet50(nn.Module):
  """ResNet-50 on images of any size.

  Attributes:
    channels: of the stem; the middle convolutions of stage i have 2^i times as many.
    blocks: in each stage.
    num_classes: number of logits.
  """

  channels: int = 64
  blocks: tuple[int, ...] = (3, 4, 6, 3)
  num_classes: int = 1000

  @nn.compact
  def __call__(self, images: jax.Array) -> dict[str, Any]:
    """Computes features and logits.

    Args:
      images: float32 [b, h, w, 3] in [0, 1].

    Returns:
      "maps": after the stem and each stage, at strides 2, 4, 8, 16 and 32, float32
        [b, ceil(h / stride), ceil(w / stride), c] with c = 64, 256, 512, 1024, 2048;
      "pooled": float32 [b, 2048], the spatial mean of the last map;
      "logits": float32 [b, num_classes].
    """
    x = nn.relu(batch_norm("bn1")(conv(self.channels, 7, "conv1", 2)(normalise(images))))
    maps = [x]
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for stage, blocks in enumerate(self.blocks):
      for i in range(blocks):
        stride = 2 if stage and not i else 1
        x = Bottleneck(self.channels * 2**stage, stride, not i, name=f"layer{stage + 1}_{i}")(x)
      maps.append(x)
    pooled = x.mean(axis=(1, 2))
    return {"maps": maps, "pooled": pooled, "logits": nn.Dense(self.num_classes, name="fc")(pooled)}


class VGG16(nn.Module):
  """The convolutions of VGG16 on images of any size.

  Attributes:
    channels: of the convolutions in each stage.
  """

  channels: tuple[tuple[int, ...], ...] = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)

  @nn.compact
  def __call__(self, images: jax.Array) -> dict[str, Any]:
    """Computes features.

    Args:
      images: float32 [b, h, w, 3] in [0, 1], of at least 16 pixels.

    Returns:
      "maps": the last activations of each stage, at strides 1, 2, 4, 8 and 16, float32
        [b, floor(h / stride), floor(w / stride), c] with c = 64, 128, 256, 512, 512.
    """
    x, index = normalise(images), 0
    maps: list[jax.Array] = []
    for stage in self.channels:
      if maps:
        x = nn.max_pool(x, (2, 2), (2, 2))
        index += 1
      for channels in stage:
        x = nn.relu(conv(channels, 3, f"features_{index}", use_bias=True)(x))
        index += 2  # the convolution and its ReLU
      maps.append(x)
    return {"maps": maps}
