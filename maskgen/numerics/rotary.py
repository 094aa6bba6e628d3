"""Rotary positions of patches (Su et al. 2021), in the form of DINOv3 (Siméoni et al. 2025, section 3.2).

Queries and keys are rotated by angles that depend on their patch, so that scores depend on how far patches
are apart. Nothing is added to patches, and there is no table: any grid has its angles.

- A patch has the coordinates of its centre in a box from -1 to 1. Height and width are scaled separately, so
  that a picture of any shape and size fills the box.
- A coordinate x becomes the angles 2 pi x base^(-4 i / c), for i from 0 to c / 4 - 1: first those of the row,
  then those of the column. Angle j rotates the numbers j and j + c / 2 of a head. DINOv3's base is 100.
- Positions in front of the patches, a class position and registers, are not rotated.
- In DINOv3's training the box is also scaled at random, up to a factor of 2 either way; here it is not.

Letters: b batch, h w grid, p positions in front, n all positions, c width of a head.
"""

import jax
import jax.numpy as jnp
import numpy as np


def waves(grid: tuple[int, int], width: int, base: float, leading: int = 0) -> np.ndarray:
  """The cosines and sines of all angles, float32 [p + h * w, 2, c / 2], row by row.

  Args:
    grid: (h, w).
    width: c, a multiple of 4.
    base: of the frequencies.
    leading: p, the number of positions in front, whose angles are 0.
  """
  frequencies = base ** (-np.arange(width // 4) / (width // 4))

  def angles(length: int) -> np.ndarray:
    centres = 2.0 * (np.arange(length) + 0.5) / length - 1.0
    return 2.0 * np.pi * centres[:, None] * frequencies

  shape = (*grid, width // 4)
  rows, columns = angles(grid[0])[:, None], angles(grid[1])[None]
  both = np.concatenate([np.broadcast_to(rows, shape), np.broadcast_to(columns, shape)], axis=-1)
  flat = np.pad(both.reshape(-1, width // 2), ((leading, 0), (0, 0)))
  return np.stack([np.cos(flat), np.sin(flat)], axis=1).astype(np.float32)


def rotate(x: jax.Array, by: jax.Array) -> jax.Array:
  """Rotates queries or keys, in float32.

  Args:
    x: [b, n, heads, c].
    by: `waves` of its positions, [b or 1, n, 2, c / 2].

  Returns:
    Of the shape and type of x.
  """
  cos, sin = by[:, :, :1], by[:, :, 1:]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  found = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return found.astype(x.dtype)
