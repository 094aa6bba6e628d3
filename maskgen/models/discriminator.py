"""The residual discriminator of StyleGAN2 (Karras et al. 2020) with blurred resampling, as in MaskGIT."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from maskgen.config import check_at_least, check_dtype, fields
from maskgen.errors import UserError


class Discriminator(nn.Module):
  """Images float32 [b, h, w, c] in [0, 1] to one logit per image, float32 [b].

  Attributes:
    channels: width at full resolution; it doubles with each block up to `max_channels`.
    max_channels: the largest width.
    blocks: residual blocks, each of which halves the resolution.
    dtype: the type of the computation.
  """

  channels: int = 128
  max_channels: int = 512
  blocks: int = 5
  dtype: str = fields.precision("float32")

  def __post_init__(self):
    check_at_least(self, 1, "channels", "max_channels", "blocks")
    check_dtype(self.dtype)
    super().__post_init__()

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    if min(images.shape[1:3]) < 2**self.blocks:
      raise UserError(
        f"a discriminator of {self.blocks} blocks needs images of at least {2**self.blocks} pixels"
      )
    x = activate(self.conv(self.channels, "conv_in")(2.0 * images - 1.0))
    for i in range(self.blocks):
      channels = min(self.channels * 2 ** (i + 1), self.max_channels)
      shortcut = self.conv(channels, f"block_{i}_shortcut", size=1, use_bias=False)(blur_pool(x))
      x = activate(self.conv(x.shape[-1], f"block_{i}_conv_0")(x))
      x = activate(self.conv(channels, f"block_{i}_conv_1")(blur_pool(x)))
      x = (x + shortcut) / np.sqrt(2.0)
    x = activate(self.conv(x.shape[-1], "conv_out")(x))
    x = x.reshape(x.shape[0], -1)
    x = activate(nn.Dense(channels, dtype=self.dtype, name="dense")(x))
    return nn.Dense(1, dtype="float32", name="logit")(x)[:, 0]

  def conv(self, channels: int, name: str, size: int = 3, use_bias: bool = True) -> nn.Conv:
    return nn.Conv(channels, (size, size), use_bias=use_bias, dtype=self.dtype, name=name)


def activate(x: jax.Array) -> jax.Array:
  """Leaky ReLU with StyleGAN's slope."""
  return nn.leaky_relu(x, 0.2)


def blur_pool(x: jax.Array) -> jax.Array:
  """Halves the resolution after a [1, 3, 3, 1] binomial blur, to avoid aliasing (Zhang 2019).

  It sums strided slices: depthwise convolutions and their second derivatives are slow on CPUs.
  """
  for axis in (1, 2):
    size = x.shape[axis]
    half = -(-size // 2)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (1, 2 * half + 1 - size)
    padded = jnp.pad(x, widths)
    slices = [jax.lax.slice_in_dim(padded, i, i + 2 * half - 1, stride=2, axis=axis) for i in range(4)]
    x = 0.125 * (slices[0] + slices[3]) + 0.375 * (slices[1] + slices[2])
  return x
