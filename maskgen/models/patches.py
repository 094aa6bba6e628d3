"""Squares of pixels as channels, and a replacement of the autoencoder for diffusion on pixels made of them.

Letters: b batch, h w image, h' w' squares, c channels of an image, d channels of a square.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from maskgen.config import check_at_least
from maskgen.models.autoencoder_kl import Gaussian


def patchify(images: jax.Array, side: int) -> jax.Array:
  """Images [b, h, w, c] to squares [b, h', w', side * side * c], in the order row, column, channel."""
  b, h, w, c = images.shape
  x = images.reshape(b, h // side, side, w // side, side, c).swapaxes(2, 3)
  return x.reshape(*x.shape[:3], -1)


def unpatchify(squares: jax.Array, side: int) -> jax.Array:
  """The inverse of `patchify`."""
  b, h, w, _ = squares.shape
  x = squares.reshape(b, h, w, side, side, -1).swapaxes(2, 3)
  return x.reshape(b, h * side, w * side, -1)


class Patches(nn.Module):
  """Has the methods of `AutoencoderKL`, but no parameters.

  Attributes:
    side: of a square, in pixels; it must divide the sides of images.
    image_channels: c.
  """

  side: int = 1
  image_channels: int = 3

  def __post_init__(self):
    check_at_least(self, 1, "side", "image_channels")
    super().__post_init__()

  @property
  def factor(self) -> int:
    """Pixels per latent pixel along each side."""
    return self.side

  @property
  def latent_channels(self) -> int:
    """The number of values in a square."""
    return self.side**2 * self.image_channels

  def encode(self, images: jax.Array) -> Gaussian:
    """Images float32 [b, h, w, c] in [0, 1] to [b, h', w', d] in [-1, 1], with zero variance."""
    mean = 2.0 * patchify(images, self.side) - 1.0
    return Gaussian(mean, jnp.zeros_like(mean))

  def decode(self, latents: jax.Array) -> jax.Array:
    """The inverse of `encode`, not clipped: float32 [b, h, w, c]."""
    return unpatchify(latents, self.side) / 2.0 + 0.5

  def __call__(self, images: jax.Array) -> jax.Array:
    """Encodes and decodes."""
    return self.decode(self.encode(images).mean)
