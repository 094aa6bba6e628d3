"""Reads one split of a source under one preprocessing, whatever some of its records are like."""

import functools
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator

import numpy as np

from maskgen.data.cpu_tf import tf
from maskgen.data.preprocess import Preprocess, Record
from maskgen.data.skipped import Skipped
from maskgen.data.sources import Source
from maskgen.errors import TransientError, UserError

Batch = dict[str, np.ndarray]
# From the number of a row to the index of its record, and how many times that was drawn before.
Locate = Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]

# Enough that a step rarely waits, few enough that large images fit into memory.
_BATCHES_AHEAD = 4
_ATTEMPTS = 3
# A store's bad moments, not a record's fault.
_PASSING = (
  tf.errors.UnavailableError,
  tf.errors.DeadlineExceededError,
  tf.errors.AbortedError,
  tf.errors.CancelledError,
  tf.errors.ResourceExhaustedError,
  tf.errors.UnknownError,  # what Python's OSError becomes
)


class Reader:
  """Records of a source, preprocessed, in batches.

  Besides what the preprocessing makes of a record there are "record", int32, the index of the record that was
  used, and "sound", bool, which is False where this took the place of a damaged one. What belongs to the
  second of two views is called "image2", "tokens2".

  Attributes:
    source: the records.
    preprocess: the specification.
  """

  def __init__(
    self, source: Source, preprocess: Preprocess, *, seed: int, skipped: Skipped, use: str, split: str
  ):
    """Prepares to read.

    Args:
      source: the records.
      preprocess: the specification.
      seed: a record's augmentation depends on this, its index and the draw.
      skipped: where damaged records are kept.
      use: the name of this use of the split, for `skipped`.
      split: the name of the split.
    """
    self.source = source
    self.preprocess = preprocess
    # Runs of different seeds must not share the streams of other records.
    self._seed = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), signed=True) >> 1
    self._substitutes = skipped.substitutes(use, split, source)

  @functools.cached_property
  def spec(self) -> dict[str, tf.TensorSpec]:
    """Shapes and dtypes of a record after preprocessing.

    Raises:
      UserError: if the specification does not suit the source, or gives varying shapes.
    """
    spec = dict(tf.data.Dataset.range(1).map(self._make_load(lambda number: (number, number))).element_spec)
    for key, value in spec.items():
      if not value.shape.is_fully_defined():
        raise UserError(
          f"preprocessing '{self.preprocess.text}' gives {key}s of varying shape {tuple(value.shape)}: end "
          "it with an op of fixed size such as resize(256) or center_crop(256)"
        )
    return spec

  def batches(self, locate: Locate, size: int, *, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
    """Yields batches `start` to `stop` (without end if None); batch i has the rows from i * size on."""
    load = self._make_load(locate)
    end = tf.int64.max if stop is None else stop * size
    step, failures = start, 0
    while stop is None or step < stop:
      dataset = tf.data.Dataset.range(step * size, end)
      dataset = dataset.map(load, tf.data.AUTOTUNE, deterministic=True)
      dataset = dataset.batch(size, drop_remainder=True).prefetch(_BATCHES_AHEAD)
      options = tf.data.Options()
      # More threads than cores, since some wait for files, or to copy a batch.
      options.threading.private_threadpool_size = 2 * (os.cpu_count() or 1)
      options.threading.max_intra_op_parallelism = 1  # records are the parallelism
      batches = dataset.with_options(options).as_numpy_iterator()
      while True:
        try:
          batch = next(batches)
        except StopIteration:
          return
        except tf.errors.OpError as error:
          found = self._find_damaged(load, locate, range(step * size, (step + 1) * size), step)
          failures = 0 if found else failures + 1
          if failures == _ATTEMPTS:
            raise TransientError(
              f"{self.source.name} cannot be read ({reason_of(error)}): start again when it can, the run "
              "continues"
            ) from error
          if not found:
            time.sleep(2.0**failures)
          break
        yield batch
        step, failures = step + 1, 0

  def _make_load(self, locate: Locate) -> Callable[[tf.Tensor], Record]:
    def load(number: tf.Tensor) -> Record:
      return self._load(*locate(number))

    return tf.function(load, autograph=False, input_signature=[tf.TensorSpec((), tf.int64)])

  @tf.autograph.experimental.do_not_convert
  def _load(self, index: tf.Tensor, draw: tf.Tensor) -> Record:
    """Reads and preprocesses the record of an index, or its substitute."""
    used = self._substitutes.lookup(index)
    record = self.source.fetch(used)
    result: Record = {}
    views = self.preprocess.views
    for view in range(views):
      place = draw * views + view
      # TensorFlow's generator hashes its seed: near ones give streams as independent as far ones.
      made = self.preprocess(record, tf.stack([self._seed + index, place]), place)
      numbers = {key: value for key, value in made.items() if value.dtype != tf.string}
      if view == 0:
        result = numbers
      else:
        result |= {f"{key}{view + 1}": numbers[key] for key in ("image", "tokens") if key in numbers}
    result = {k: tf.cast(v, tf.int32) if v.dtype == tf.int64 else v for k, v in result.items()}
    return result | {"record": tf.cast(used, tf.int32), "valid": used == index}

  def _find_damaged(self, load: Callable, locate: Locate, numbers: range, step: int) -> bool:
    """Notes each record of these rows, those of a batch, that fails; whether there was one."""
    found = False
    rows = tf.data.Dataset.range(numbers.start, numbers.stop).map(load, tf.data.AUTOTUNE, deterministic=True)
    results = iter(rows)  # it goes on after an error
    for number in numbers:
      try:
        next(results)
      except _PASSING:
        continue
      except tf.errors.OpError as error:
        index = self._substitutes.lookup(locate(tf.constant(number, tf.int64))[0])
        self._substitutes.add(int(index), reason_of(error), step)
        found = True
    return found


def reason_of(error: tf.errors.OpError) -> str:
  """What is wrong with a record, without TensorFlow's surroundings."""
  text = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", error.message)
  text = re.sub(r"^.*Iterator::[\w:]*(\[\d+\])?[\w:]*: ", "", text.strip())
  line = (text.splitlines() or [""])[0].removeprefix("ValueError: ").strip()
  return re.sub(r"^assertion failed: \[(.*)\]$", r"\1", line) or type(error).__name__
