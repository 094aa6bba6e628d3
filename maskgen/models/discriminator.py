"""The residual discriminator of StyleGAN2 (Karras et al. 2020) with blurred resampling, as in MaskGIT."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from maskgen.config import check_at_least, check_dtype, fields
from maskgen.errors import UserError, nearest

INITIALISERS = {
  "lecun_normal": nn.initializers.lecun_normal(),
  "xavier_uniform": nn.initializers.xavier_uniform(),
}


class Discriminator(nn.Module):
  """Images float32 [b, h, w, c] in [0, 1] to one logit per image, float32 [b].

  Attributes:
    channels: width at full resolution; it doubles with each block up to `max_channels`.
    max_channels: the largest width.
    blocks: residual blocks, each of which halves the resolution.
    kernel_init: of all kernels, a name in `INITIALISERS`.
    dtype: the type of the computation.
  """

  channels: int = 128
  max_channels: int = 512
  blocks: int = 5
  kernel_init: str = "lecun_normal"
  dtype: str = fields.precision("float32")

  def __post_init__(self):
    check_at_least(self, 1, "channels", "max_channels", "blocks")
    check_dtype(self.dtype)
    if self.kernel_init not in INITIALISERS:
      raise UserError(
        f"kernel_init '{self.kernel_init}' does not exist{nearest(self.kernel_init, INITIALISERS)}"
      )
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
    x = activate(self.dense(channels, "dense", self.dtype)(x))
    return self.dense(1, "logit", "float32")(x)[:, 0]

  def conv(self, channels: int, name: str, size: int = 3, use_bias: bool = True) -> nn.Conv:
    init = INITIALISERS[self.kernel_init]
    return nn.Conv(channels, (size, size), use_bias=use_bias, kernel_init=init, dtype=self.dtype, name=name)

  def dense(self, channels: int, name: str, dtype: str) -> nn.Dense:
    return nn.Dense(channels, kernel_init=INITIALISERS[self.kernel_init], dtype=dtype, name=name)


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
