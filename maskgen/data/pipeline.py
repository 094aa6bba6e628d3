"""From a source to batches: shuffled, augmented, the same for any number of processes.

Position p of training is record shuffle(p mod N) of epoch p // N, and the batch of step i holds the
positions from i * batch size on. Nothing else is remembered, so that resuming at any step takes
constant time, and a process reads its own rows of the global batch alone.
"""

import collections
import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from maskgen.data.cpu_tf import tf
from maskgen.data.sources import Source, open_source
from maskgen.data.spec import Record, parse_spec
from maskgen.errors import UserError

Batch = dict[str, np.ndarray]

# The streams of random numbers that a seed is split into.
_SHUFFLE, _AUGMENT = 0, 1
# Enough that a step rarely waits, few enough that large images fit into memory.
_BATCHES_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Data:
  """Training and evaluation batches of one data set.

  Batches are dicts of arrays with a leading axis b, the rows of this process in the global batch:
  "image" uint8 [b, h, w, c] and, where the source has labels, "label" int32 [b]. Evaluation batches
  also have "valid" bool [b], which is False on the rows that fill up the last batch.

  Attributes:
    source: where records come from, see `sources.py`.
    preprocess: the preprocessing for training, see `spec.py`.
    eval_preprocess: the preprocessing for evaluation, which gives images of the same shape.
    batch_size: the global batch size of training.
    seed: the seed of shuffling and augmentation.
    split: the split to train on.
    eval_split: the split to evaluate on.
    process_index: which rows of a global batch to read; by default those of this JAX process.
    process_count: how many processes share a global batch; by default all JAX processes.

  Raises:
    UserError: if one of these is wrong, on construction; if a record is damaged, on reading it.
  """

  source: str
  preprocess: str
  eval_preprocess: str
  batch_size: int
  seed: int = 0
  split: str = "train"
  eval_split: str = "test"
  process_index: int | None = None
  process_count: int | None = None

  def __post_init__(self):
    self._rows(self.batch_size)
    eval_shape = _record_spec(self._eval_source, self.eval_preprocess)["image"].shape
    if self.image_shape != tuple(eval_shape):
      raise UserError(
        f"preprocess '{self.preprocess}' gives images of shape {self.image_shape}, but "
        f"eval_preprocess '{self.eval_preprocess}' of shape {tuple(eval_shape)}: make them equal"
      )

  @functools.cached_property
  def _train_source(self) -> Source:
    return open_source(self.source, self.split)

  @functools.cached_property
  def _eval_source(self) -> Source:
    return open_source(self.source, self.eval_split)

  @functools.cached_property
  def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a global training batch."""
    return {
      key: jax.ShapeDtypeStruct((self.batch_size, *value.shape), jnp.dtype(value.dtype.name))
      for key, value in _record_spec(self._train_source, self.preprocess).items()
    }

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of the images in a batch."""
    return self.spec["image"].shape[1:]

  @property
  def class_names(self) -> tuple[str, ...] | None:
    return self._train_source.class_names

  @property
  def num_train(self) -> int:
    return self._train_source.size

  @property
  def num_eval(self) -> int:
    return self._eval_source.size

  def train_batches(self, start_step: int = 0) -> Iterator[Batch]:
    """Yields this process's rows of the batches of step start_step and all that follow."""
    size = self.num_train

    def index_of(position: tf.Tensor) -> tf.Tensor:
      return _shuffle(position % size, size, _fold_in(self.seed, _SHUFFLE, position // size))

    return self._batches(self._train_source, self.preprocess, index_of, self.batch_size, start=start_step)

  def eval_batches(self, split: Literal["train", "eval"], batch_size: int) -> Iterator[Batch]:
    """Yields each record of a split once, under evaluation preprocessing.

    The order is shuffled, but always the same, so that the first batches are a fair sample. All
    processes yield the same number of batches.

    Args:
      split: "train" or "eval", the two splits that the configuration names.
      batch_size: the global batch size.
    """
    source = {"train": self._train_source, "eval": self._eval_source}[split]
    rows = self._rows(batch_size)

    def index_of(position: tf.Tensor) -> tf.Tensor:
      position = tf.minimum(position, source.size - 1)
      return _shuffle(position, source.size, _fold_in(0, _SHUFFLE, 0))

    steps = -(-source.size // batch_size)
    batches = self._batches(source, self.eval_preprocess, index_of, batch_size, stop=steps)
    for step, batch in enumerate(batches):
      yield batch | {"valid": step * batch_size + np.array(rows) < source.size}

  def _rows(self, batch_size: int) -> range:
    """The rows of a global batch that belong to this process."""
    count = jax.process_count() if self.process_count is None else self.process_count
    index = jax.process_index() if self.process_index is None else self.process_index
    if batch_size < 1 or batch_size % count:
      raise UserError(f"batch size {batch_size} cannot be shared by {count} processes: make it a multiple")
    local = batch_size // count
    return range(index * local, (index + 1) * local)

  def _batches(
    self,
    source: Source,
    preprocess: str,
    index_of: Callable[[tf.Tensor], tf.Tensor],
    batch_size: int,
    *,
    start: int = 0,
    stop: int | None = None,
  ) -> Iterator[Batch]:
    rows = self._rows(batch_size)
    transform = parse_spec(preprocess)

    def locate(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
      """Position and record of the number-th row that this process reads."""
      position = number // len(rows) * batch_size + rows.start + number % len(rows)
      return position, index_of(position)

    @tf.autograph.experimental.do_not_convert
    def load(number: tf.Tensor) -> Record:
      position, index = locate(number)
      return _narrow(transform(source.fetch(index), _fold_in(self.seed, _AUGMENT, position)))

    end = tf.int64.max if stop is None else stop * len(rows)
    dataset = tf.data.Dataset.range(start * len(rows), end)
    dataset = dataset.map(load, tf.data.AUTOTUNE, deterministic=True)
    dataset = dataset.batch(len(rows), drop_remainder=True).prefetch(_BATCHES_AHEAD)
    options = tf.data.Options()
    options.threading.private_threadpool_size = os.cpu_count()
    options.threading.max_intra_op_parallelism = 1  # records are the parallelism
    batches = dataset.with_options(options).as_numpy_iterator()
    for step in itertools.count(start):
      try:
        batch = next(batches)
      except StopIteration:
        return
      except tf.errors.OpError:
        _blame(source, locate, load, range(step * len(rows), (step + 1) * len(rows)))
        raise
      yield batch


def to_device(
  batches: Iterator[Batch], sharding: jax.sharding.Sharding, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
  """Puts batches of this process's rows on the devices, `ahead` batches before they are used.

  Args:
    batches: dicts of arrays [b, ...], b being this process's rows of the global batch.
    sharding: how the leading axis of the global arrays is laid out over all devices.
    ahead: how many transfers may run while a batch is in use.
  """
  queue: collections.deque[dict[str, jax.Array]] = collections.deque()
  for batch in batches:
    queue.append(
      {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
    )
    if len(queue) > ahead:
      yield queue.popleft()
  yield from queue


def _fold_in(seed: int, stream: int, number: tf.Tensor | int) -> tf.Tensor:
  """Returns the stateless seed, int64 [2], of one number in one stream."""
  base = tf.constant([seed, stream], tf.int64)
  return tf.random.experimental.stateless_fold_in(base, tf.cast(number, tf.int64))


def _shuffle(position: tf.Tensor, size: int, seed: tf.Tensor) -> tf.Tensor:
  """Returns where a random permutation of `size` numbers takes `position`."""
  # For small sizes the op uses the low bits of its seed alone, so a counter in the seed would soon
  # repeat. With the 4 rounds of tf.random.experimental.index_shuffle neighbours stay correlated.
  bits = tf.random.stateless_uniform([3], seed, minval=None, maxval=None, dtype=tf.int32)
  return tf.raw_ops.RandomIndexShuffle(
    index=position, seed=bits, max_index=tf.constant(size - 1, tf.int64), rounds=8
  )


def _narrow(record: Record) -> Record:
  """int64 to int32, as JAX has it."""
  return {k: tf.cast(v, tf.int32) if v.dtype == tf.int64 else v for k, v in record.items()}


def _record_spec(source: Source, preprocess: str) -> dict[str, tf.TensorSpec]:
  """Returns shapes and dtypes after preprocessing, which must not depend on the record."""
  transform = parse_spec(preprocess)

  @tf.autograph.experimental.do_not_convert
  def load(index: tf.Tensor) -> Record:
    return _narrow(transform(source.fetch(index), _fold_in(0, _AUGMENT, index)))

  spec = tf.data.Dataset.range(1).map(load).element_spec
  shape = spec["image"].shape
  if not shape.is_fully_defined():
    raise UserError(
      f"preprocessing '{preprocess}' gives images of varying shape {tuple(shape)}: end it with an "
      "op of fixed size such as resize(256) or center_crop(256)"
    )
  return spec


def _blame(
  source: Source,
  locate: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]],
  load: Callable[[tf.Tensor], Record],
  numbers: range,
) -> None:
  """Raises a UserError that names the record which fails, if one of these does so again."""
  for number in map(tf.constant, numbers):
    try:
      load(tf.cast(number, tf.int64))
    except (tf.errors.OpError, UserError) as error:
      index = int(locate(tf.cast(number, tf.int64))[1])
      reason = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", str(error).splitlines()[0]).strip()
      raise UserError(
        f"{source.describe(index)} of {source.name} cannot be used ({reason}): repair or remove it"
      ) from error
