"""The Inception-v3 network of 5 December 2015, whose features define FID (Heusel et al. 2017).

Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", table 1, as TensorFlow
released it: 1008 classes, averages over real pixels only, a maximum in the last block for an average. Layers
have the names of the PyTorch state dict in which its weights are common.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

SIDE = 299
CLASSES = 1008
FEATURES = 2048  # of the pooled ones, in which FID is computed
EPSILON = 1e-3
SPATIAL_CHANNELS = 7  # of which sFID uses (Nash et al. 2021, section 4.3)


class Outputs(NamedTuple):
  """What the network computes of images, float32.

  Attributes:
    pooled_64: [b, 64], the mean over space after the first maximum.
    pooled_192: [b, 192], after the second.
    pooled_768: [b, 768], before the last reduction of the resolution.
    pooled: [b, 2048], of the last layer: the features of FID.
    spatial: [b, 17 * 17 * 7], row, column, channel: the features of sFID.
    logits_unbiased: [b, 1008], without the bias of the last layer: the logits of the inception score.
    logits: [b, 1008].
  """

  pooled_64: jax.Array
  pooled_192: jax.Array
  pooled_768: jax.Array
  pooled: jax.Array
  spatial: jax.Array
  logits_unbiased: jax.Array
  logits: jax.Array


class BatchNorm(nn.Module):
  """Batch norm with the stored statistics, over the last axis."""

  epsilon: float = EPSILON

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale, var = (self.param(name, nn.initializers.ones, (x.shape[-1],)) for name in ("scale", "var"))
    bias, mean = (self.param(name, nn.initializers.zeros, (x.shape[-1],)) for name in ("bias", "mean"))
    factor = scale / jnp.sqrt(var + self.epsilon)
    return x * _over_channels(factor, x) + _over_channels(bias - mean * factor, x)


def _over_channels(vector: jax.Array, x: jax.Array) -> jax.Array:
  return vector.reshape((1,) * (x.ndim - 1) + (-1,))


class Unit(nn.Module):
  """Convolution, batch norm, ReLU."""

  channels: int
  kernel: tuple[int, int]
  stride: int = 1
  padding: str = "SAME"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    conv = nn.Conv(
      self.channels,
      self.kernel,
      strides=self.stride,
      padding=self.padding,
      use_bias=False,
      precision="highest",
      name="conv",
    )
    return nn.relu(BatchNorm(name="bn")(conv(x)))


# The units of a branch in order: (name, channels, (kernel height, kernel width)).
Units = tuple[tuple[str, int, tuple[int, int]], ...]


def _branch(x: jax.Array, units: Units, reduce: bool = False) -> jax.Array:
  """Applies units within a compact module; with `reduce` the last one halves the resolution."""
  for i, (name, channels, kernel) in enumerate(units):
    last = reduce and i == len(units) - 1
    stride, padding = (2, "VALID") if last else (1, "SAME")
    x = Unit(channels, kernel, stride, padding, name=name)(x)
  return x


def _mean_pool(x: jax.Array) -> jax.Array:
  return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _reduce(x: jax.Array) -> jax.Array:
  return nn.max_pool(x, (3, 3), (2, 2))


class BlockA(nn.Module):
  """At 35 x 35 pixels."""

  pool_channels: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    branches = (
      _branch(x, (("branch1x1", 64, (1, 1)),)),
      _branch(x, (("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5)))),
      _branch(
        x, (("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3)))
      ),
      _branch(_mean_pool(x), (("branch_pool", self.pool_channels, (1, 1)),)),
    )
    return jnp.concatenate(branches, axis=-1)


class BlockB(nn.Module):
  """From 35 x 35 to 17 x 17 pixels."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    double: Units = (
      ("branch3x3dbl_1", 64, (1, 1)),
      ("branch3x3dbl_2", 96, (3, 3)),
      ("branch3x3dbl_3", 96, (3, 3)),
    )
    branches = (_branch(x, (("branch3x3", 384, (3, 3)),), reduce=True), _branch(x, double, reduce=True))
    return jnp.concatenate((*branches, _reduce(x)), axis=-1)


class BlockC(nn.Module):
  """At 17 x 17 pixels."""

  channels: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.channels
    single: Units = (("branch7x7_1", c, (1, 1)), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1)))
    double: Units = (
      ("branch7x7dbl_1", c, (1, 1)),
      ("branch7x7dbl_2", c, (7, 1)),
      ("branch7x7dbl_3", c, (1, 7)),
      ("branch7x7dbl_4", c, (7, 1)),
      ("branch7x7dbl_5", 192, (1, 7)),
    )
    branches = (
      _branch(x, (("branch1x1", 192, (1, 1)),)),
      _branch(x, single),
      _branch(x, double),
      _branch(_mean_pool(x), (("branch_pool", 192, (1, 1)),)),
    )
    return jnp.concatenate(branches, axis=-1)


class BlockD(nn.Module):
  """From 17 x 17 to 8 x 8 pixels."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    small: Units = (("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3)))
    large: Units = (
      ("branch7x7x3_1", 192, (1, 1)),
      ("branch7x7x3_2", 192, (1, 7)),
      ("branch7x7x3_3", 192, (7, 1)),
      ("branch7x7x3_4", 192, (3, 3)),
    )
    branches = (_branch(x, small, reduce=True), _branch(x, large, reduce=True), _reduce(x))
    return jnp.concatenate(branches, axis=-1)


class BlockE(nn.Module):
  """At 8 x 8 pixels; `last` pools by the maximum instead of the mean."""

  last: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    single = _branch(x, (("branch3x3_1", 384, (1, 1)),))
    double = _branch(x, (("branch3x3dbl_1", 448, (1, 1)), ("branch3x3dbl_2", 384, (3, 3))))
    pooled = nn.max_pool(x, (3, 3), padding="SAME") if self.last else _mean_pool(x)
    branches = (
      _branch(x, (("branch1x1", 320, (1, 1)),)),
      _branch(single, (("branch3x3_2a", 384, (1, 3)),)),
      _branch(single, (("branch3x3_2b", 384, (3, 1)),)),
      _branch(double, (("branch3x3dbl_3a", 384, (1, 3)),)),
      _branch(double, (("branch3x3dbl_3b", 384, (3, 1)),)),
      _branch(pooled, (("branch_pool", 192, (1, 1)),)),
    )
    return jnp.concatenate(branches, axis=-1)


class Head(nn.Module):
  """The last layer; returns logits without and with its bias."""

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], CLASSES))
    bias = self.param("bias", nn.initializers.zeros, (CLASSES,))
    unbiased = jnp.dot(x, kernel, precision="highest")
    return unbiased, unbiased + bias[None]


class InceptionV3(nn.Module):
  """All convolutions and products are float32 at the highest precision, on accelerators, too."""

  @nn.compact
  def __call__(self, x: jax.Array) -> Outputs:
    """Computes the features of images float32 [b, 299, 299, 3] in about [-1, 1]; a protocol says exactly."""
    x = Unit(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
    x = Unit(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
    x = Unit(64, (3, 3), name="Conv2d_2b_3x3")(x)
    first = x = _reduce(x)
    x = Unit(80, (1, 1), name="Conv2d_3b_1x1")(x)
    x = Unit(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x)
    second = x = _reduce(x)
    x = BlockA(32, name="Mixed_5b")(x)
    x = BlockA(64, name="Mixed_5c")(x)
    x = BlockA(64, name="Mixed_5d")(x)
    x = BlockB(name="Mixed_6a")(x)
    x = BlockC(128, name="Mixed_6b")(x)
    x = BlockC(160, name="Mixed_6c")(x)
    x = BlockC(160, name="Mixed_6d")(x)
    spatial = x[..., :SPATIAL_CHANNELS]
    third = x = BlockC(192, name="Mixed_6e")(x)
    x = BlockD(name="Mixed_7a")(x)
    x = BlockE(name="Mixed_7b")(x)
    x = BlockE(last=True, name="Mixed_7c")(x)
    pooled_64, pooled_192, pooled_768, pooled = (tap.mean(axis=(1, 2)) for tap in (first, second, third, x))
    unbiased, logits = Head(name="fc")(pooled)
    return Outputs(pooled_64, pooled_192, pooled_768, pooled, spatial.reshape(len(x), -1), unbiased, logits)
