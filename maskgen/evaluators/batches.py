"""Transfers of batches between the devices of all processes and this process's memory."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from threadpoolctl import threadpool_limits

from maskgen.evaluators.context import Batch, Context

# Wraps NumPy and scikit-learn code that runs next to a busy device program on the same cores: BLAS threads
# that spin while they wait for a core make many small products up to 20 times slower than one thread.
one_blas_thread = threadpool_limits.wrap(limits=1, user_api="blas")


def gather(array: jax.Array | np.ndarray) -> np.ndarray:
  """Returns a whole global array in the memory of every process; no copy if it is already there."""
  if isinstance(array, np.ndarray) or array.is_fully_addressable:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def valid_rows(batch: Batch, array: jax.Array | np.ndarray) -> np.ndarray:
  """Gathers a global array with leading axis b that belongs to `batch`, without the padding."""
  return gather(array)[gather(batch["valid"])]


def stream(
  context: Context, split: str, fn: Callable[[Batch], Mapping[str, jax.Array | np.ndarray]]
) -> Iterator[dict[str, np.ndarray]]:
  """Yields `fn(batch)` for each batch of a split: arrays with leading axis b, without the padding."""
  for batch in context.batches(split):
    valid = gather(batch["valid"])
    yield {name: gather(value)[valid] for name, value in fn(batch).items()}


def collect(
  context: Context, split: str, fn: Callable[[Batch], Mapping[str, jax.Array]], limit: int | None = None
) -> dict[str, np.ndarray]:
  """Concatenates the results of `stream`, or the first `limit` rows; they must fit in memory."""
  parts: list[dict[str, np.ndarray]] = []
  count = 0
  for part in stream(context, split, fn):
    parts.append(part)
    count += len(next(iter(part.values())))
    if limit is not None and count >= limit:
      break
  return {name: np.concatenate([part[name] for part in parts])[:limit] for name in parts[0]}


def draw(parts: Iterable[Mapping[str, np.ndarray]], count: int, seed: int) -> dict[str, np.ndarray]:
  """Draws at most `count` random rows of arrays that arrive in parts, in a random order.

  Only these rows are kept in memory (reservoir sampling, Vitter 1985).

  Args:
    parts: arrays with a common leading axis each, at least one part.
    count: the number of rows.
    seed: which rows are drawn depends only on this and their number, not on the parts.
  """
  rng, seen = np.random.default_rng(seed), 0
  kept: dict[str, np.ndarray] = {}
  for part in parts:
    rows = seen + np.arange(len(next(iter(part.values()))))
    places = np.where(rows < count, rows, (rng.random(len(rows)) * (rows + 1)).astype(np.int64))
    for name, values in part.items():
      kept.setdefault(name, np.empty((count, *values.shape[1:]), values.dtype))
      # Where two rows have one place, the later one stays, as if they came one by one.
      kept[name][places[places < count]] = values[places < count]
    seen += len(rows)
  order = rng.permutation(min(seen, count))
  return {name: values[order] for name, values in kept.items()}


def first_batch(context: Context) -> Batch:
  """The first batch of the evaluation split."""
  return next(iter(context.batches("eval")))


def key_shapes(batch: Mapping[str, jax.ShapeDtypeStruct]) -> jax.ShapeDtypeStruct:
  """The shape of `make_keys` for a batch of shapes."""
  size: int = batch["valid"].shape[0]
  return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))


def put(array: np.ndarray, rows: jax.sharding.Sharding) -> jax.Array:
  """Puts an array with leading axis b, the same in every process, on devices."""
  return jax.make_array_from_callback(array.shape, rows, lambda at: array[at])


def place(like: Batch, array: np.ndarray) -> jax.Array:
  """Puts an array with leading axis b, the same in every process, on devices, sharded like batch `like`."""
  return put(array, like["valid"].sharding)


@functools.cache
def _key_maker(size: int, sharding: jax.sharding.Sharding) -> Callable[[int, int], jax.Array]:
  def make(seed, start):
    root = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(start + jnp.arange(size))

  return jax.jit(make, out_shardings=sharding)


def make_keys(like: Batch, seed: int, start: int = 0) -> jax.Array:
  """Keys [b], sharded like batch `like`: key i depends only on the seed and `start + i`."""
  return _key_maker(like["valid"].shape[0], like["valid"].sharding)(seed, start)


def make_labels(like: Batch, num_classes: int, start: int = 0) -> jax.Array:
  """Labels [b] that cycle through the classes, sharded like `like`: label i depends only on `start + i`."""
  return place(like, (start + np.arange(like["valid"].shape[0], dtype=np.int32)) % num_classes)


def generate(
  fn: Callable[..., jax.Array],
  variables: Any,
  rng: jax.Array,
  *,
  like: Batch,
  seed: int,
  num_images: int,
  num_classes: int = 0,
  captions: np.ndarray | None = None,
  **options: Any,
) -> Iterator[tuple[jax.Array, int]]:
  """Generates images in batches of the size and sharding of `like`.

  With classes, image i is of class i % num_classes; with captions int32 [m, length], of caption i % m.

  Yields:
    Images [b, h, w, c] on the devices, and the number of them to use: the last batch may have a surplus.
    Image i overall depends only on the seed and i.
  """
  batch_size = like["valid"].shape[0]
  for start in range(0, num_images, batch_size):
    batch = {"key": make_keys(like, seed, start)}
    if num_classes:
      batch["label"] = make_labels(like, num_classes, start)
    if captions is not None:
      batch["caption"] = place(like, captions[(start + np.arange(batch_size)) % len(captions)])
    images = fn(variables, batch, rng, **options)
    yield images, min(batch_size, num_images - start)
