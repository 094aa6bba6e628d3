"""MobileNetV2, a small frozen feature network for inference.

Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", table 2. Batch norm
is folded into the convolutions: each has a kernel and a bias, and there is no other parameter.
"""

from typing import Any

import flax.linen as nn
import jax

# Rows of table 2: expansion, output channels, number of blocks, stride of the first block.
BOTTLENECKS = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)


def scale_channels(channels: int, width: float) -> int:
  """Channels * width, rounded to a multiple of 8 without losing more than 10%."""
  scaled = max(8, int(channels * width + 4) // 8 * 8)
  return scaled if scaled >= 0.9 * channels * width else scaled + 8


class Bottleneck(nn.Module):
  """Inverted residual with a linear output (section 3.3): expand, filter per channel, project.

  With `expansion` 1 there is no expanding convolution. The input is added if shapes match.
  """

  expansion: int
  channels: int
  stride: int

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 [b, h, w, c] to the output and the expanded input.

    Returns:
      [b, ceil(h / stride), ceil(w / stride), channels] and [b, h, w, expansion * c].
    """
    inner = self.expansion * x.shape[-1]
    expanded = x
    if self.expansion > 1:
      expanded = nn.relu6(nn.Conv(inner, (1, 1), name="expand")(x))
    y = nn.Conv(
      inner,
      (3, 3),
      strides=self.stride,
      feature_group_count=inner,
      padding="SAME",
      name="depthwise",
    )(expanded)
    y = nn.Conv(self.channels, (1, 1), name="project")(nn.relu6(y))
    return (x + y if y.shape == x.shape else y), expanded


class MobileNetV2(nn.Module):
  """MobileNetV2 on images of any size; the published weights were trained on 224 px.

  Padding is "SAME" as in TensorFlow: an odd pixel of padding goes to the bottom and right.
  Under `jax.jit`, unused outputs (a perceptual loss needs no logits) cost nothing.

  Attributes:
    width: multiplier on the channels of all but the last layers.
    num_classes: number of logits; 1001 is ImageNet with class 0 for "background".
    bottlenecks: rows of (expansion, channels, blocks, stride), see `BOTTLENECKS`.
    pooled_channels: width of the pooled features; `width` below 1 does not reduce it.
  """

  width: float = 1.0
  num_classes: int = 1001
  bottlenecks: tuple[tuple[int, int, int, int], ...] = BOTTLENECKS
  pooled_channels: int = 1280

  @property
  def blocks(self) -> tuple[Bottleneck, ...]:
    """All bottlenecks in order, unbound; block i has its parameters under `block_{i:02}`."""
    return tuple(
      Bottleneck(expansion, scale_channels(channels, self.width), stride if i == 0 else 1, parent=None)
      for expansion, channels, count, stride in self.bottlenecks
      for i in range(count)
    )

  @nn.compact
  def __call__(self, images: jax.Array) -> dict[str, Any]:
    """Computes features and logits.

    Args:
      images: float32 [b, h, w, 3] in [0, 1].

    Returns:
      "maps": the last activations before each halving of the resolution, finest first, and those of
        the last hidden layer: at strides 2, 4, 8, 16 and 32, float32
        [b, ceil(h / stride), ceil(w / stride), c] in [0, 6] with c = 96, 144, 192, 576, 1280;
      "pooled": float32 [b, 1280], the spatial mean of the last hidden layer, in [0, 6];
      "logits": float32 [b, num_classes].
    """
    x = nn.Conv(scale_channels(32, self.width), (3, 3), strides=2, padding="SAME", name="stem")(
      2.0 * images - 1.0
    )
    x = nn.relu6(x)
    maps = []
    for i, block in enumerate(self.blocks):
      x, expanded = block.clone(name=f"block_{i:02}", parent=self)(x)
      if block.stride > 1:
        maps.append(expanded)
    pooled_channels = max(self.pooled_channels, round(self.pooled_channels * self.width))
    x = nn.relu6(nn.Conv(pooled_channels, (1, 1), name="head")(x))
    maps.append(x)
    pooled = x.mean(axis=(1, 2))
    logits = nn.Conv(self.num_classes, (1, 1), name="classifier")(pooled[:, None, None])[:, 0, 0]
    return {"maps": maps, "pooled": pooled, "logits": logits}
