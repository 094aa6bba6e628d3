"""Metrics that compare two sets of features, or describe one set of logits: NumPy, float64, on the host.

docs/evaluation.md says which published tool each one equals.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax

from maskgen.errors import UserError

# Rows of a block of distances: with 50,000 columns, 400 MB.
_BLOCK = 1000
# Sides of a block in ADM's evaluator, which decides for each whether float16 can hold its distances.
_HALF_BLOCK = 10_000

# Rows, columns, and their squared distances.
Block = tuple[slice, slice, np.ndarray]


class Spread(NamedTuple):
  """The mean of several estimates, and their standard deviation (ddof 0)."""

  mean: float
  std: float


def inception_score(logits: np.ndarray, *, splits: int = 10, seed: int | None = 2020) -> Spread:
  """Exp of the mean KL(p(y|x) || p(y)), over splits (Salimans et al. 2016, section 4).

  Args:
    logits: [n, classes], without the bias of the last layer if the score is to equal the published ones.
    splits: the number of equal parts; part i begins at row i * n // splits.
    seed: of the permutation before the rows are split, `np.random.RandomState(seed)`; None keeps their order.

  Raises:
    UserError: if there are fewer rows than splits.
  """
  check_count("the inception score", len(logits), splits)
  order = np.arange(len(logits)) if seed is None else np.random.RandomState(seed).permutation(len(logits))
  ends = [i * len(logits) // splits for i in range(splits + 1)]
  return _score(logits[order[start:end]] for start, end in itertools.pairwise(ends))


def inception_score_in_slices(logits: np.ndarray, rows: int = 5000) -> float:
  """The mean of the scores of successive slices; the last one may have fewer rows."""
  return _score(logits[start : start + rows] for start in range(0, len(logits), rows)).mean


def _score(parts: Iterator[np.ndarray]) -> Spread:
  scores = []
  for part in parts:
    log_p = log_softmax(part.astype(np.float64), axis=1)
    p = np.exp(log_p)
    scores.append(np.exp(np.sum(p * (log_p - np.log(p.mean(axis=0))), axis=1).mean()))
  return Spread(float(np.mean(scores)), float(np.std(scores)))


def kid(
  generated: np.ndarray, real: np.ndarray, *, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> Spread:
  """The kernel distance (Binkowski et al. 2018): unbiased MMD^2 with the kernel (a.b / d + 1)^3.

  Args:
    generated: features [n, d].
    real: features [m, d].
    subsets: the number of pairs of subsets, drawn without replacement from each set.
    size: the rows of a subset.
    seed: of the draws, `np.random.RandomState(seed)`.

  Raises:
    UserError: if a set has fewer rows than a subset.
  """
  check_count("KID", min(len(generated), len(real)), size, "samples of both sets")
  rng, sets = np.random.RandomState(seed), (generated, real)
  draws = [[rng.choice(len(rows), size, replace=False) for rows in sets] for _ in range(subsets)]
  n, m = map(len, sets)
  if n * n + m * m + n * m < 2 * subsets * size * size:  # a pair of samples is in several subsets
    chosen = [np.zeros((len(rows), subsets)) for rows in sets]
    for column, draw in enumerate(draws):
      for members, rows in zip(chosen, draw, strict=True):
        members[rows, column] = 1
    values = _mmd(generated, real, *chosen)
  else:
    whole = np.ones((size, 1))
    values = np.concatenate([_mmd(generated[a], real[b], whole, whole) for a, b in draws])
  return Spread(float(np.mean(values)), float(np.std(values)))


def _mmd(a: np.ndarray, b: np.ndarray, in_a: np.ndarray, in_b: np.ndarray) -> np.ndarray:
  """The unbiased MMD^2 of pairs of subsets, [k]; `in_a` [n, k] and `in_b` [m, k] are 1 for their members."""
  a, b = a.astype(np.float64), b.astype(np.float64)
  size = in_a[:, 0].sum()
  within = sum(_kernel_sums(x, x, members, members) for x, members in ((a, in_a), (b, in_b)))
  own = sum(_cubic(np.square(x).sum(axis=1), a.shape[1]) @ members for x, members in ((a, in_a), (b, in_b)))
  return (within - own) / (size * (size - 1)) - 2 * _kernel_sums(a, b, in_a, in_b) / size**2


def _kernel_sums(a: np.ndarray, b: np.ndarray, in_a: np.ndarray, in_b: np.ndarray) -> np.ndarray:
  """The sum of the kernel over all pairs of a member of each subset and one of its other half, [k]."""
  sums = np.zeros(in_a.shape[1])
  for start in range(0, len(a), _BLOCK):
    rows = slice(start, start + _BLOCK)
    sums += ((_cubic(a[rows] @ b.T, a.shape[1]) @ in_b) * in_a[rows]).sum(axis=0)
  return sums


def _cubic(products: np.ndarray, width: int) -> np.ndarray:
  kernel = products / width + 1
  return kernel * kernel * kernel  # a power takes several times as long


def manifold_metrics(
  generated: np.ndarray, real: np.ndarray, *, k: int, strict: bool, half: bool = False
) -> Mapping[str, float]:
  """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

  The ball of a sample reaches to its k-th nearest neighbour in its own set.

  Args:
    generated: features [n, d].
    real: features [m, d].
    k: the number of neighbours; the papers use 3 for precision and recall, 5 for density and coverage.
    strict: whether a sample on the surface of a ball is outside of it: so in the code of the second paper,
      not so in that of the first.
    half: whether distances are rounded to float16 as in ADM's evaluator, where that of a sample from itself
      need not be 0. Sums are accumulated in float32; TensorFlow's depend on the device.

  Returns:
    "precision": the share of generated samples in a ball of a real one; "recall": the share of real samples
    in a ball of a generated one; "density": the mean number of real balls that a generated sample is in, over
    k; "coverage": the share of real balls with a generated sample.

  Raises:
    UserError: if a set has no k neighbours.
  """
  check_count(f"{k} nearest neighbours", min(len(generated), len(real)), k + 1, "samples of both sets")
  measure = _half_distances if half else _distances
  real_radii, generated_radii = (_radii(measure(rows, rows), len(rows), k) for rows in (real, generated))
  holders = np.zeros(len(generated), np.int64)
  in_generated = np.zeros(len(real), bool)
  covered = np.zeros(len(real), bool)
  inside = np.less if strict else np.less_equal
  for rows, columns, distances in measure(real, generated):
    in_real = inside(distances, real_radii[rows, None])
    holders[columns] += in_real.sum(axis=0)
    covered[rows] |= in_real.any(axis=1)
    in_generated[rows] |= inside(distances, generated_radii[columns]).any(axis=1)
  return {
    "precision": float(np.mean(holders > 0)),
    "recall": float(np.mean(in_generated)),
    "density": float(holders.mean() / k),
    "coverage": float(np.mean(covered)),
  }


def _radii(blocks: Iterator[Block], count: int, k: int) -> np.ndarray:
  """Squared distances to the k-th nearest row beside the nearest, which is the row itself, [count]."""
  nearest = np.full((count, k + 1), np.inf)
  for rows, _, distances in blocks:
    best = np.partition(distances, min(k, distances.shape[1] - 1), axis=1)[:, : k + 1]
    nearest[rows] = np.partition(np.concatenate([nearest[rows], best], axis=1), k, axis=1)[:, : k + 1]
  return nearest.max(axis=1)


def _distances(a: np.ndarray, b: np.ndarray) -> Iterator[Block]:
  """Yields squared distances of blocks of rows of `a` from all rows of `b`, in float64."""
  wide = b.astype(np.float64)
  squares = np.square(wide).sum(axis=1)
  for start in range(0, len(a), _BLOCK):
    block = a[start : start + _BLOCK].astype(np.float64)
    distances = np.maximum(np.square(block).sum(axis=1)[:, None] + squares - 2 * block @ wide.T, 0.0)
    if a is b:
      distances[np.arange(len(block)), start + np.arange(len(block))] = 0.0  # despite rounding
    yield slice(start, start + len(block)), slice(0, len(b)), distances


def _half_distances(a: np.ndarray, b: np.ndarray) -> Iterator[Block]:
  """Yields squared distances in blocks, rounded to float16 unless one in the block is too large for it."""
  for rows, columns in itertools.product(*(range(0, len(x), _HALF_BLOCK) for x in (a, b))):
    u, v = (x[at : at + _HALF_BLOCK].astype(np.float32) for x, at in ((a, rows), (b, columns)))
    with np.errstate(over="ignore", invalid="ignore"):
      distances = _expanded(_to_half(u), _to_half(v), _to_half)
      if not np.isfinite(distances).all():
        distances = _expanded(u, v, lambda x: x)
    yield slice(rows, rows + len(u)), slice(columns, columns + len(v)), distances


def _expanded(u: np.ndarray, v: np.ndarray, rounded: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
  """|u|^2 - 2 u.v + |v|^2 in float32, at least 0; each step is rounded."""
  squares_u, squares_v = (rounded(rounded(np.square(x)).sum(axis=1)) for x in (u, v))
  distances = np.empty((len(u), len(v)), np.float32)
  for start in range(0, len(u), _BLOCK):
    rows = slice(start, start + _BLOCK)
    products = rounded(2 * rounded(u[rows] @ v.T))
    distances[rows] = np.maximum(rounded(rounded(squares_u[rows, None] - products) + squares_v), 0)
  return distances


def _to_half(x: np.ndarray) -> np.ndarray:
  """Float32 rounded to what float16 can hold."""
  return x.astype(np.float16).astype(np.float32)


def check_count(what: str, found: int, needed: int, of: str = "samples") -> None:
  """Checks that there are enough samples.

  Raises:
    UserError: if not.
  """
  if found < needed:
    raise UserError(f"{what} needs at least {needed:,} {of}, but there are {found:,}: give more")
