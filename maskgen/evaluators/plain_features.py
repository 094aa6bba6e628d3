"""Features without an encoder, to compare encoders with: pixels and codes, of a limited width."""

import math

import jax
import jax.numpy as jnp

from maskgen import images as images_lib
from maskgen.evaluators.feature_spaces import area_average


def pooled_pixels(images: jax.Array, width: int) -> jax.Array:
  """The pixels of images [b, h, w, c], averaged over areas if they are more than `width`: float32 [b, d]."""
  _, rows, columns, channels = images.shape
  side = math.isqrt(width // channels)
  small = images_lib.to_float(images)
  if rows * columns * channels > width:
    small = area_average(small, min(side, rows), min(side, columns))
  return small.reshape(len(images), -1)


def hashed_onehot(tokens: jax.Array, codes: int, width: int) -> jax.Array:
  """One-hot codes of each position, float32 [b, n * codes], or at most `width` random signed sums of them.

  Inner products stay the same in expectation (Weinberger et al. 2009). The sums are fixed, so that all
  batches and both splits have the same.

  Args:
    tokens: int32 [b, n].
    codes: the size of the codebook.
    width: the largest number of features.
  """
  b, n = tokens.shape
  if n * codes <= width:
    return jax.nn.one_hot(tokens, codes).reshape(b, -1)
  place, sign = jax.random.split(jax.random.key(0))
  bucket = jax.random.randint(place, (n * codes,), 0, width)
  signs = jax.random.rademacher(sign, (n * codes,), jnp.float32)
  at = jnp.arange(n)[None] * codes + tokens
  rows = jnp.arange(b)[:, None]
  return jnp.zeros((b, width)).at[rows, bucket[at]].add(signs[at])
