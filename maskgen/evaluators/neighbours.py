"""Nearest neighbours of features by cosine, computed on a device: kNN, class means and retrieval."""

import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Similarities that a device holds at once; 512 MB.
_CELLS = 2**27
_TEMPERATURE = 0.07


def normalized(features: np.ndarray) -> np.ndarray:
  """Features [n, d] of length 1 in float32; zeros stay zeros."""
  lengths = np.linalg.norm(features, axis=1, keepdims=True)
  return (features / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)


def nearest(
  queries: np.ndarray, bank: np.ndarray, count: int, *, without_self: bool = False
) -> tuple[np.ndarray, np.ndarray]:
  """The rows of a bank with the largest inner products with each query.

  Args:
    queries: float32 [n, d].
    bank: float32 [m, d].
    count: the number of rows to return, at most m, or m - 1 without the query itself.
    without_self: whether query i is row i of the bank, which does not count then.

  Returns:
    (inner products float32 [n, count] in decreasing order, indices int32 [n, count]); of equal ones, the
    lower index comes first.
  """
  on_device = jnp.asarray(bank)
  own = np.arange(len(queries)) if without_self else np.full(len(queries), -1)
  rows = max(1, _CELLS // len(bank))
  blocks = [
    jax.device_get(_nearest(queries[start : start + rows], own[start : start + rows], on_device, count))
    for start in range(0, len(queries), rows)
  ]
  similarities, indices = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
  return similarities, indices


@functools.partial(jax.jit, static_argnums=3)
def _nearest(queries: jax.Array, own: jax.Array, bank: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  similarities = jnp.matmul(queries, bank.T, precision="highest")
  is_own = own[:, None] == jnp.arange(len(bank))[None]
  return jax.lax.top_k(jnp.where(is_own, -jnp.inf, similarities), count)


def knn(
  train: np.ndarray, labels: np.ndarray, test: np.ndarray, neighbours: Sequence[int], classes: int
) -> Iterator[tuple[int, np.ndarray]]:
  """Classifies by votes of nearest neighbours, weighted by exp(cosine / 0.07) (Caron et al. 2021, DINO).

  Args:
    train: [m, d].
    labels: int [m].
    test: [n, d].
    neighbours: the numbers of neighbours that vote, at most m each.
    classes: the number of classes.

  Yields:
    Each number of neighbours with the predictions int [n]; of equal votes, the lower class wins.
  """
  similarities, indices = nearest(normalized(test), normalized(train), max(neighbours))
  differences = similarities.astype(np.float64) - similarities[:, :1]  # exp does not overflow
  weights, voters = np.exp(differences / _TEMPERATURE), labels[indices]
  rows = np.arange(len(test))[:, None]
  for k in neighbours:
    votes = np.zeros((len(test), classes))
    np.add.at(votes, (rows, voters[:, :k]), weights[:, :k])
    yield k, votes.argmax(axis=1)


def nearest_mean(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
  """Predicts for [n, d] the class with the largest cosine to its mean of normalized [m, d]: int [n]."""
  found, x = np.unique(labels), normalized(train)
  means = np.stack([x[labels == label].mean(axis=0) for label in found])
  return found[nearest(normalized(test), normalized(means), 1)[1][:, 0]]


def recall(features: np.ndarray, labels: np.ndarray, at: Sequence[int]) -> Mapping[int, float]:
  """The share of images [n, d] with another one of their class among the k nearest others, for each k < n."""
  x = normalized(features)
  indices = nearest(x, x, max(at), without_self=True)[1]
  hits = labels[indices] == labels[:, None]
  return {k: float(hits[:, :k].any(axis=1).mean()) for k in at}
