"""Layers of latent diffusion's U-Net and autoencoder (Rombach et al. 2022), and a classifier made of them.

Submodules are named as in published weights, with an underscore instead of a dot before an index.
Letters: b batch, h w c image, t time width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

Padding = tuple[tuple[int, int], tuple[int, int]]


def conv(channels: int, size: int, dtype: str, name: str) -> nn.Conv:
  """A convolution that keeps the image size."""
  return nn.Conv(channels, (size, size), padding=size // 2, dtype=dtype, name=name)


def group_norm(groups: int, epsilon: float, dtype: str, name: str) -> nn.GroupNorm:
  """Group normalisation, with statistics in float32."""
  return nn.GroupNorm(groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def layer_norm(epsilon: float, dtype: str, name: str | None = None) -> nn.LayerNorm:
  """Layer normalisation, with statistics in float32."""
  return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


class ResnetBlock(nn.Module):
  """(norm, swish, 3x3 convolution) twice plus a shortcut; a time embedding is added in between.

  With `scale_shift` it instead scales and shifts the output of the second normalisation (Dhariwal and Nichol
  2021, section 3.1).
  """

  channels: int
  groups: int
  epsilon: float
  dtype: str
  scale_shift: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:  # [b, h, w, c], [b, t]
    y = nn.swish(group_norm(self.groups, self.epsilon, self.dtype, "norm1")(x))
    y = conv(self.channels, 3, self.dtype, "conv1")(y)
    norm = group_norm(self.groups, self.epsilon, self.dtype, "norm2")
    if time is None:
      y = norm(y)
    else:
      width = (1 + self.scale_shift) * self.channels
      embedding = nn.Dense(width, dtype=self.dtype, name="time_emb_proj")(nn.swish(time))[:, None, None]
      if self.scale_shift:
        scale, shift = jnp.split(embedding, 2, axis=-1)
        y = norm(y) * (1 + scale) + shift
      else:
        y = norm(y + embedding)
    y = nn.swish(y)
    y = conv(self.channels, 3, self.dtype, "conv2")(y)
    if x.shape[-1] != self.channels:
      x = conv(self.channels, 1, self.dtype, "conv_shortcut")(x)
    return x + y


class Downsample(nn.Module):
  """A convolution of stride 2; the U-Net pads all sides, the autoencoder's encoder only bottom and right."""

  padding: Padding
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b, h, w, c] -> [b, h / 2, w / 2, c]
    return nn.Conv(x.shape[-1], (3, 3), strides=2, padding=self.padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
  """Nearest-neighbour upsampling by 2, then a convolution."""

  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:  # [b, h, w, c] -> [b, 2 h, 2 w, c]
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return conv(x.shape[-1], 3, self.dtype, "conv")(x)


class Classifier(nn.Module):
  """A small residual network from images float32 [b, h, w, c] in [0, 1] to logits float32 [b, classes].

  The stem has a stride that leaves fewer than 64 rows or columns; each stage after the first halves them.

  Attributes:
    classes: the number of classes.
    channels: of each stage, multiples of 8.
  """

  classes: int
  channels: tuple[int, ...] = (16, 32, 64)

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    stride = max(min(images.shape[1:3]) // 32, 1)
    size = 2 * stride + 1
    x = nn.Conv(self.channels[0], (size, size), stride, padding=stride, name="conv_in")(2.0 * images - 1.0)
    for i, channels in enumerate(self.channels):
      if i:
        x = Downsample(((1, 1), (1, 1)), "float32", name=f"downsample_{i}")(x)
      x = ResnetBlock(channels, 8, 1e-6, "float32", name=f"block_{i}")(x)
    x = nn.swish(group_norm(8, 1e-6, "float32", "norm_out")(x))
    return nn.Dense(self.classes, name="logits")(x.mean(axis=(1, 2)))
