"""Frozen autoencoders as sources of latents that another network sees in place of pixels, and the way back.

Letters: b batch, h w c image, h' w' latent image, d its channels.
"""

from typing import Any

import jax
import jax.numpy as jnp

from maskgen.errors import UserError
from maskgen.models.autoencoder_kl import AutoencoderKL
from maskgen.models.vqgan import VQGAN

Autoencoder = VQGAN | AutoencoderKL


def shape(autoencoder: Autoencoder, image_size: tuple[int, int]) -> tuple[int, int, int]:
  """The shape (h', w', d) of the latents of images of (h, w).

  Raises:
    UserError: if h or w is not divisible by the autoencoder's factor.
  """
  factor = autoencoder.factor
  if any(side % factor for side in image_size):
    raise UserError(f"image_size is {image_size}: give multiples of {factor}, the autoencoder's factor")
  width = autoencoder.code_width if isinstance(autoencoder, VQGAN) else autoencoder.latent_channels
  return image_size[0] // factor, image_size[1] // factor, width


def encode(autoencoder: Autoencoder, params: Any, images: jax.Array) -> jax.Array:
  """Images float32 [b, h, w, c] in [0, 1] to latents float32 [b, h', w', d], without a gradient.

  Those of a VQGAN are from before quantization, those of `AutoencoderKL` the mean of their distribution.
  """
  found: Any
  if isinstance(autoencoder, VQGAN):
    found = autoencoder.apply({"params": params}, images, exact=True, method="encode")
  else:
    gaussian: Any = autoencoder.apply({"params": params}, images, method="encode")
    found = gaussian.mean
  return jax.lax.stop_gradient(found)


def decode(autoencoder: Autoencoder, params: Any, latents: jax.Array) -> jax.Array:
  """Latents float32 [b, h', w', d], which a VQGAN quantizes, to images float32 [b, h, w, c] in [0, 1]."""
  variables = {"params": params}
  if isinstance(autoencoder, VQGAN):
    quantized: Any = autoencoder.apply(variables, latents, method="quantize")
    latents = quantized.codes
  found: Any = autoencoder.apply(variables, latents, method="decode")
  return jnp.clip(found, 0.0, 1.0)
