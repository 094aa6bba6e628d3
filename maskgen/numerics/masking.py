"""Variable-ratio masking with static shapes (MAGE, Li et al. 2023, section 3.1).

Letters: b batch, n tokens, k kept tokens.
"""

import dataclasses
import math
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from maskgen.errors import UserError
from maskgen.numerics import diffusion


@dataclasses.dataclass(frozen=True)
class MaskRatio:
  """A Gaussian truncated to [low, high], one draw per example.

  Attributes:
    mean: mean of the Gaussian before truncation.
    std: its standard deviation.
    low: the smallest ratio; also the fraction of the tokens that the encoder never sees.
    high: the largest ratio.
  """

  mean: float = 0.55
  std: float = 0.25
  low: float = 0.5
  high: float = 1.0

  def __post_init__(self):
    if not (0.0 <= self.low <= self.high <= 1.0 and self.std > 0.0):
      raise UserError(
        f"mask ratio needs 0 <= low <= high <= 1 and std > 0 (got low={self.low}, high={self.high}, "
        f"std={self.std})"
      )

  @classmethod
  def constant(cls, ratio: float) -> Self:
    """The same ratio for every example."""
    return cls(mean=ratio, low=ratio, high=ratio)

  def sample(self, keys: jax.Array) -> jax.Array:
    """Draws one ratio for each of the PRNG keys [b]; float32 [b] in [low, high]."""
    low, high = (self.low - self.mean) / self.std, (self.high - self.mean) / self.std
    normal = jax.vmap(lambda key: jax.random.truncated_normal(key, low, high))(keys)
    return jnp.clip(self.mean + self.std * normal, self.low, self.high)


@dataclasses.dataclass(frozen=True)
class CosineRatio:
  """The mask ratio of MaskGIT (Chang et al. 2022, section 3.3): cos(pi / 2 u), with u uniform in [0, 1)."""

  low: ClassVar[float] = 0.0

  def sample(self, keys: jax.Array) -> jax.Array:
    """Draws one ratio for each of the PRNG keys [b]; float32 [b] in (0, 1]."""
    return jnp.cos(jnp.pi / 2 * jax.vmap(jax.random.uniform)(keys))


# In tokens, so that 100 * 0.55 counts as 55 however it rounds in float32 or float64.
_ROUNDING = 1e-3


def num_dropped(num_tokens: int, ratio: MaskRatio | CosineRatio) -> int:
  """The number of masked tokens that the encoder never sees: ceil(n * low), the same for every example."""
  return math.ceil(num_tokens * ratio.low - _ROUNDING)


def random_mask(
  keys: jax.Array, num_tokens: int, ratio: MaskRatio | CosineRatio
) -> tuple[jax.Array, jax.Array]:
  """Chooses which tokens are masked, and which positions the encoder keeps.

  For each example, ceil(n * r) tokens are masked, with r drawn from `ratio`, and ceil(n * low) of the masked
  ones are dropped: the encoder sees the same number of positions, k = n - ceil(n * low), in every example.
  Tokens are selected by the ranks of a random permutation, so there are no ties and shapes are static.

  Args:
    keys: PRNG keys [b]; example i depends on key i alone.
    num_tokens: n.
    ratio: the distribution of mask ratios.

  Returns:
    mask: bool [b, n], True where a token is masked.
    kept: int32 [b, k], the positions that are not dropped, ascending.
  """
  ratio_keys, order_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
  num_masked = jnp.ceil(num_tokens * ratio.sample(ratio_keys) - _ROUNDING).astype(jnp.int32)  # [b]
  order = jax.vmap(lambda key: jax.random.permutation(key, num_tokens))(order_keys)  # [b, n]
  rank = jnp.argsort(order, axis=-1)
  mask = rank < num_masked[:, None]
  kept = jnp.sort(order[:, num_dropped(num_tokens, ratio) :], axis=-1)
  return mask, kept


def num_masked_at(step: jax.Array, num_tokens: int, low: float, high: float, steps: int) -> jax.Array:
  """The number of masked tokens of a ratio that rises during training, as in LMD (Ma et al. 2024).

  The ratio rises as the noise of a cosine schedule does.

  Args:
    step: the number of completed updates, an int32 scalar.
    num_tokens: n; ceil(n * r) tokens are masked for a ratio of r.
    low: the ratio at step 0.
    high: the ratio from `steps` on, at least `low`.
    steps: of the rise, at least 1.

  Returns:
    An int32 scalar.
  """
  share = 1.0 - diffusion.cosine(np.arange(steps + 1) / steps) / diffusion.cosine(np.zeros(1))
  masked = np.ceil(num_tokens * (low + (high - low) * share) - _ROUNDING).astype(np.int32)
  # Each number's first step, so that no device rounds.
  first = np.searchsorted(masked, np.arange(masked[0] + 1, masked[-1] + 1))
  return masked[0] + (step >= jnp.asarray(first, jnp.int32)).sum(dtype=jnp.int32)


def padded_mask(
  keys: jax.Array, num_tokens: int, num_masked: jax.Array, least: int
) -> tuple[jax.Array, jax.Array]:
  """Masks a number of tokens that need not be known when a step is compiled, and drops all of them.

  Args:
    keys: PRNG keys [b]; example i depends on key i alone.
    num_tokens: n.
    num_masked: the number of masked tokens of each example, an int32 scalar from `least` to n.
    least: the smallest such number.

  Returns:
    mask: bool [b, n], True where a token is masked.
    kept: int32 [b, n - least], the others, ascending, then n in the remaining places.
  """
  rank = jax.vmap(lambda key: jax.random.permutation(key, num_tokens))(keys)
  mask = rank < num_masked
  kept = jnp.sort(jnp.where(mask, num_tokens, jnp.arange(num_tokens)[None]), axis=-1)
  return mask, kept[:, : num_tokens - least].astype(jnp.int32)


def disjoint_masks(
  keys: jax.Array, grid: tuple[int, int], ratio: MaskRatio, block: int = 1
) -> tuple[jax.Array, jax.Array]:
  """Masks the tokens of a grid twice, so that the same tokens are visible in both as rarely as possible.

  Tokens are masked in squares. Both views keep a run of a random permutation of these; the runs overlap only
  if more than half are kept (DMJD, Ma et al. 2023, section 3.2).

  Args:
    keys: PRNG keys [b]; example i depends on key i alone.
    grid: (h, w), both divisible by `block`.
    ratio: of masked squares, always `low`.
    block: the side of a square.

  Returns:
    mask: bool [b, 2, n], True where a token is masked.
    kept: int32 [b, 2, k], the others, not in their order.
  """
  rows, columns = grid[0] // block, grid[1] // block
  masked = num_dropped(rows * columns, ratio)
  num_kept = rows * columns - masked
  order = jax.vmap(lambda key: jax.random.permutation(key, rows * columns))(keys)
  start = min(num_kept, masked)
  squares = jnp.stack([order[:, :num_kept], order[:, start : start + num_kept]], axis=1)
  corners = squares // columns * block * grid[1] + squares % columns * block
  within = (jnp.arange(block)[:, None] * grid[1] + jnp.arange(block)[None]).reshape(-1)
  kept = (corners[:, :, None] + within[None, None, :, None]).reshape(len(keys), 2, -1)
  return ~jax.nn.one_hot(kept, grid[0] * grid[1], dtype=bool).any(axis=2), kept


def weighted_mask(keys: jax.Array, weights: jax.Array, num_masked: int) -> tuple[jax.Array, jax.Array]:
  """Masks tokens, and keeps the others with probabilities in proportion to weights, without replacement.

  Kept tokens are those with the largest log weight plus Gumbel noise (Kool et al. 2019, section 3).

  Args:
    keys: PRNG keys [b]; example i depends on key i and its weights alone.
    weights: float32 [b, n], above 0.
    num_masked: of the tokens of each example.

  Returns:
    As `random_mask`, which masks all tokens that it does not keep.
  """
  noise = jax.vmap(lambda key: jax.random.gumbel(key, weights.shape[1:]))(keys)
  order = jnp.argsort(jnp.log(weights) + noise, axis=-1)
  mask = jnp.argsort(order, axis=-1) < num_masked
  return mask, jnp.sort(order[:, num_masked:], axis=-1)


def spread(x: jax.Array, kept: jax.Array, num_tokens: int) -> jax.Array:
  """Puts kept tokens back in their places; the other places hold arbitrary kept tokens.

  A gather, since a scatter would not stay sharded over the devices.

  Args:
    x: [b, k, d], the tokens.
    kept: int32 [b, k], their positions, ascending.
    num_tokens: n.

  Returns:
    [b, n, d].
  """
  is_kept = jax.nn.one_hot(kept, num_tokens, dtype=bool).any(axis=1)
  # Position i takes kept token number (kept tokens up to i) - 1.
  index = jnp.maximum(jnp.cumsum(is_kept, axis=1), 1) - 1
  return jnp.take_along_axis(x, index[..., None], axis=1)


def random_window(keys: jax.Array, grid: tuple[int, int], low: float) -> jax.Array:
  """Chooses a window of a grid, in any place with equal probability.

  Its height is drawn uniformly from ceil(h * low) to h; its width is the same share of the grid.

  Args:
    keys: PRNG keys [b]; example i depends on key i alone.
    grid: (h, w).
    low: the smallest share of a side, in (0, 1].

  Returns:
    bool [b, n], True inside, row by row.
  """
  height, width = grid

  def draw(key: jax.Array) -> jax.Array:
    size, top, left = jax.random.split(key, 3)
    rows = jax.random.randint(size, (), math.ceil(height * low - _ROUNDING), height + 1)
    columns = -(-rows * width // height)
    row = jax.random.randint(top, (), 0, height - rows + 1)
    column = jax.random.randint(left, (), 0, width - columns + 1)
    y, x = jnp.arange(height)[:, None] - row, jnp.arange(width)[None] - column
    return ((y >= 0) & (y < rows) & (x >= 0) & (x < columns)).reshape(-1)

  return jax.vmap(draw)(keys)


def token_mask(pixel_mask: jax.Array, factor: int) -> jax.Array:
  """Tokens that a pixel mask makes unknown: those it touches, and one ring of tokens around them.

  The codes next to a hole encode the hole that the tokenizer saw.

  Args:
    pixel_mask: bool [b, h, w], True where pixels are regenerated.
    factor: pixels per token along each side.

  Returns:
    bool [b, n], row by row; all False where the pixel mask is.
  """
  batch, height, width = pixel_mask.shape
  patches = pixel_mask.reshape(batch, height // factor, factor, width // factor, factor)
  touched = patches.any(axis=(2, 4))
  padded = jnp.pad(touched, ((0, 0), (1, 1), (1, 1)))
  ringed = jnp.zeros_like(touched)
  for row in range(3):
    for column in range(3):
      ringed |= padded[:, row : row + touched.shape[1], column : column + touched.shape[2]]
  return ringed.reshape(batch, -1)
