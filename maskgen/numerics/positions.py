"""Position embeddings of a grid: their interpolation to another one, and fixed ones.

Letters: h w and H W an old and a new grid, d width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Positions(NamedTuple):
  """The layout of a table of position embeddings: leading rows, then a grid, row by row.

  Attributes:
    grid: (h, w).
    leading: the number of rows before the grid, such as a class position.
  """

  grid: tuple[int, int]
  leading: int = 0


def linear_weights(old: int, new: int) -> np.ndarray:
  """The weights of `old` positions at `new` positions, float64 [new, old]; each row sums to 1.

  The corners coincide, as in big_vision: constants and linear ramps are preserved.
  """
  at = np.linspace(0.0, old - 1.0, new) if new > 1 else np.array([(old - 1.0) / 2.0])
  return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(old)[None]))


def interpolate(
  table: Any, old: Positions, new: Positions, weigh: Callable[[int, int], np.ndarray] = linear_weights
) -> Any:
  """Interpolates a table [old.leading + h * w, d] to [new.leading + H * W, d] along both axes of the grid.

  An axis whose length does not change stays the same. Leading rows are copied. The sums are in float64,
  except while a program is traced, which then interpolates in float32 when it runs.

  Args:
    table: the table.
    old: its layout.
    new: the layout of the result.
    weigh: from the old and the new length of an axis to weights [new, old].

  Returns:
    Of the table's type; an array of the host, except while a program is traced.
  """
  rows, columns = (
    np.eye(length) if length == wanted else weigh(length, wanted)
    for length, wanted in zip(old.grid, new.grid, strict=True)
  )
  traced = isinstance(table, jax.core.Tracer)
  table = table if traced else np.asarray(table)
  leading, grid = table[: old.leading], table[old.leading :].reshape(*old.grid, -1)
  if traced:
    found = jnp.einsum("Hh,Ww,hwd->HWd", rows, columns, grid, precision="highest")
  else:
    found = np.einsum("Hh,Ww,hwd->HWd", rows, columns, grid.astype(np.float64), optimize=True)
  found = found.reshape(-1, table.shape[-1]).astype(table.dtype)
  return (jnp if traced else np).concatenate([leading, found])


def sines(grid: tuple[int, int], width: int) -> np.ndarray:
  """The fixed position embeddings of MAE (He et al. 2022, appendix A.1), float32 [h * w, d], row by row.

  The first half of the width encodes the column, the second half the row; each half holds the sines, then
  the cosines, of the coordinate times frequencies from 1 to almost 1 / 10,000.

  Args:
    grid: (h, w).
    width: d, a multiple of 4.
  """
  frequencies = 10_000.0 ** (-np.arange(width // 4) / (width // 4))

  def encode(length: int) -> np.ndarray:
    angles = np.arange(length)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

  height, columns = grid
  found = np.broadcast_to(encode(columns)[None], (height, columns, width // 2))
  rows = np.broadcast_to(encode(height)[:, None], found.shape)
  return np.concatenate([found, rows], axis=-1).reshape(-1, width).astype(np.float32)
