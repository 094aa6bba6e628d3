"""What turns an image into vectors for pooling: a ViT on pixels, or the encoder of a MAGE model.

Parameters are those of the network; what must stay as it is, a MAGE's tokenizer, is apart. Letters: b batch,
h w image, n patches or tokens, d width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from maskgen.models.mage import Encoder
from maskgen.models.vit import ViT
from maskgen.models.vqgan import VQGAN

IMAGE_CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class VitEncoder:
  """A ViT; nothing of it is frozen."""

  network: ViT

  def init(self, rng: jax.Array) -> Any:
    """Fresh parameters."""
    return self.network.init(rng, jnp.zeros((1, *self.network.image_size, IMAGE_CHANNELS)))["params"]

  def encode(self, params: Any, frozen: Any, images: jax.Array) -> jax.Array:
    """Images float32 [b, h, w, c] in [0, 1] of any size to float [b, n, d]."""
    del frozen
    found: Any = self.network.apply({"params": params}, images)
    return found

  def pool(self, params: Any, frozen: Any, images: jax.Array) -> jax.Array:
    """The mean of what `encode` gives, float32 [b, d]."""
    return self.encode(params, frozen, images).astype(jnp.float32).mean(axis=1)


@dataclasses.dataclass(frozen=True)
class MageEncoder:
  """The encoder of a MAGE model, which sees all tokens that its frozen tokenizer makes of an image.

  Attributes:
    network: the encoder, without dropout.
    tokenizer: the tokenizer.
    image_size: (h, w) of the images that the two were trained on; others are resized.
  """

  network: Encoder
  tokenizer: VQGAN
  image_size: tuple[int, int]

  def init(self, rng: jax.Array) -> Any:
    """Fresh parameters."""
    tokens = jnp.zeros((1, self.network.num_tokens), jnp.int32)
    return self.network.init(rng, tokens, tokens > 0, method="encode")["params"]

  def encode(self, params: Any, frozen: Any, images: jax.Array) -> jax.Array:
    """Images float32 [b, h, w, c] in [0, 1] of any size to float [b, n, d], the class position left out."""
    tokens = self._tokenize(frozen, images)
    mask = jnp.zeros(tokens.shape, bool)
    found: Any = self.network.apply({"params": params}, tokens, mask, method="encode")
    return found[:, 1:]

  def pool(self, params: Any, frozen: Any, images: jax.Array) -> jax.Array:
    """What the MAGE model itself makes of images, before it is normalised: float32 [b, d]."""
    found: Any = self.network.apply({"params": params}, self._tokenize(frozen, images), method="pool")
    return found

  def _tokenize(self, frozen: Any, images: jax.Array) -> jax.Array:
    shape = (len(images), *self.image_size, images.shape[-1])
    images = jnp.clip(jax.image.resize(images, shape, "bilinear"), 0.0, 1.0)
    tokens: Any = self.tokenizer.apply({"params": frozen}, images, method="tokenize")
    return tokens
