"""Histograms of oriented gradients (Dalal and Triggs 2005, sections 6.2 to 6.3), without block normalisation.

Letters: b batch, h w c image, h' w' cells, o bins.
"""

import jax
import jax.numpy as jnp


def histograms(images: jax.Array, cell: int, bins: int = 9) -> jax.Array:
  """The mean magnitude of the gradients of each orientation in each cell, for each channel.

  Gradients are differences of the two neighbours, and 0 along the border. Orientations are without sign: bin
  i is from i to i + 1 times 180 / o degrees.

  Args:
    images: float [b, h, w, c].
    cell: the side of a cell in pixels, which divides h and w.
    bins: o.

  Returns:
    float32 [b, h', w', c, o].
  """
  x = images.astype(jnp.float32)
  down = jnp.pad(x[:, 2:] - x[:, :-2], ((0, 0), (1, 1), (0, 0), (0, 0)))
  right = jnp.pad(x[:, :, 2:] - x[:, :, :-2], ((0, 0), (0, 0), (1, 1), (0, 0)))
  angle = jnp.degrees(jnp.arctan2(down, right)) % 180.0
  bin_of = jnp.floor(angle / (180.0 / bins)).astype(jnp.int32) % bins
  votes = jnp.hypot(down, right)[..., None] * jax.nn.one_hot(bin_of, bins)
  b, h, w, c, _ = votes.shape
  return votes.reshape(b, h // cell, cell, w // cell, cell, c, bins).mean(axis=(2, 4))
