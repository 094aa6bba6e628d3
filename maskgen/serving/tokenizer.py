"""Tokenizers, and the base of all models with one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from maskgen import images as images_lib
from maskgen.errors import UserError
from maskgen.serving.model import Model


class Tokenizer(Model):
  """A tokenizer, which converts images to codes and back.

  model = maskgen.load("runs/vqgan")
  tokens = model.encode(images)  # int32 [b, n]
  images = model.decode(tokens)  # float32 [b, h, w, c]
  """

  def encode(self, images: images_lib.Pictures) -> np.ndarray:
    """Returns the codes of images, int32 [b, n], in row-major order of the token grid."""
    return self._each("encode", {"image": self.check_images(images)})

  def decode(self, tokens: np.ndarray) -> np.ndarray:
    """Returns the images of codes int32 [b, n], float32 [b, h, w, c] in [0, 1]."""
    return self._each("decode", {"tokens": self.check_tokens(tokens)})

  def reconstruct(self, images: images_lib.Pictures) -> np.ndarray:
    """Encodes and decodes images; keeps their dtype."""
    checked = self.check_images(images)
    return images_lib.like(checked, self._each("reconstruct", {"image": checked}))

  @functools.cached_property
  def num_tokens(self) -> int:
    """The number of codes per image, n."""
    images = jax.ShapeDtypeStruct((1, *self.objective.image_shape), jnp.uint8)
    encode = self.objective.predict_fns()["encode"]
    return jax.eval_shape(encode, self.variables, {"image": images}, None).shape[1]

  def check_tokens(self, tokens: np.ndarray) -> np.ndarray:
    """Checks codes given by a user and returns them as int32 [b, n].

    Raises:
      UserError: if they are not codes of this model.
    """
    count, codes = self.num_tokens, self.objective.codebook_size
    tokens = images_lib.regular(tokens, "tokens", f"give integers of shape [b, {count}]")
    if (
      tokens.ndim != 2
      or not len(tokens)
      or tokens.shape[1] != count
      or not np.issubdtype(tokens.dtype, np.integer)
    ):
      raise UserError(f"tokens are {tokens.dtype}{list(tokens.shape)}: give integers of shape [b, {count}]")
    if tokens.min() < 0 or tokens.max() >= codes:
      raise UserError(
        f"tokens range over {tokens.min()}..{tokens.max()}: this model's codes are 0..{codes - 1}"
      )
    return tokens.astype(np.int32)
