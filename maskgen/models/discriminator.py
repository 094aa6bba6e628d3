"""The discriminator of StyleGAN (Karras et al. 2019) with blurred resampling, as in MaskGIT's tokenizer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

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
  dtype: str = "float32"

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
    return nn.Dense(1, dtype=self.dtype, name="logit")(x)[:, 0].astype(jnp.float32)

  def conv(self, channels: int, name: str, size: int = 3, use_bias: bool = True) -> nn.Conv:
    return nn.Conv(channels, (size, size), use_bias=use_bias, dtype=self.dtype, name=name)


def activate(x: jax.Array) -> jax.Array:
  """Leaky ReLU with StyleGAN's slope."""
  return nn.leaky_relu(x, 0.2)


def blur_pool(x: jax.Array) -> jax.Array:
  """Halves the resolution after a [1, 3, 3, 1] binomial blur, against aliasing (Zhang 2019)."""
  taps = np.array([1.0, 3.0, 3.0, 1.0]) / 8.0
  kernel = jnp.asarray(np.outer(taps, taps)[:, :, None, None], x.dtype)
  channels = x.shape[-1]
  return jax.lax.conv_general_dilated(
    x,
    jnp.tile(kernel, (1, 1, 1, channels)),
    window_strides=(2, 2),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=channels,
  )
