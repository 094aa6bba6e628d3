"""Reads and preprocesses one split of a source, replacing damaged records."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

import jax

from maskgen.data import array_reader, shuffle
from maskgen.data.array_reader import ArrayReader, Batch
from maskgen.data.cpu_tf import tf
from maskgen.data.picture import JPEG_DECODING
from maskgen.data.preprocess import Preprocess, Record
from maskgen.data.shuffle import Locate
from maskgen.data.skipped import Skipped
from maskgen.data.sources import Source
from maskgen.errors import TransientError, UserError

AnyReader: TypeAlias = "ArrayReader | Reader"

# Enough that steps rarely wait, few enough that large images fit in memory.
_BATCHES_AHEAD = 4
_ATTEMPTS = 3
# Microseconds of processor time per period, both numbers, or "max" and the period (cgroup v2).
_QUOTA = "/sys/fs/cgroup/cpu.max"
# Temporary failures of a store, not damaged records; UnknownError is TensorFlow's equivalent of OSError.
_TEMPORARY = ("Unavailable", "DeadlineExceeded", "Aborted", "Cancelled", "ResourceExhausted", "Unknown")


def open_reader(
  source: Source, preprocess: Preprocess, *, seed: int, skipped: Skipped, use: str, split: str
) -> AnyReader:
  """Returns a reader of a split, without TensorFlow where possible; for the arguments see `Reader`.

  Raises:
    UserError: if the source lacks what an op needs.
  """
  for op in preprocess.ops:
    if reason := source.lacks.get(op.key):
      raise UserError(f"{op.name} in preprocessing '{preprocess.text}' needs {op.key}s: {reason}")
  if array_reader.suits(source, preprocess):
    return ArrayReader(source, preprocess)
  return Reader(source, preprocess, seed=seed, skipped=skipped, use=use, split=split)


class Reader:
  """Batches of the preprocessed records of a source.

  In addition to the results of preprocessing, a batch has "record", int32, the index of the record that was
  used, and "valid", bool, which is False if that record replaces a damaged one. The second of two views is
  called "image2" or "tokens2".

  Attributes:
    source: the records.
    preprocess: the preprocessing.
  """

  def __init__(
    self, source: Source, preprocess: Preprocess, *, seed: int, skipped: Skipped, use: str, split: str
  ):
    """Creates a reader.

    Args:
      source: the records.
      preprocess: the preprocessing.
      seed: the augmentation of a record depends on this, its index and the number of earlier draws.
      skipped: collects damaged records.
      use: the name of this use of the split, for `skipped`.
      split: the name of the split.
    """
    self.source = source
    self.preprocess = preprocess
    # Runs with different seeds must not reuse the random streams of each other's records.
    self._seed = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), signed=True) >> 1
    self._substitutes = skipped.substitutes(use, split, source)

  @functools.cached_property
  def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a record after preprocessing.

    Raises:
      UserError: if the preprocessing does not fit the source, or returns varying shapes.
    """
    spec = dict(
      tf.data.Dataset.range(1).map(self._make_load(lambda number, _: (number, number))).element_spec
    )
    for key, value in spec.items():
      if not value.shape.is_fully_defined():
        raise UserError(
          f"preprocessing '{self.preprocess.text}' returns {key}s of varying shape {tuple(value.shape)}: end "
          "it with an op that sets the size such as resize(256) or center_crop(256)"
        )
    return {key: jax.ShapeDtypeStruct(value.shape, value.dtype.as_numpy_dtype) for key, value in spec.items()}

  @functools.cached_property
  def jpeg_decoding(self) -> str:
    """How JPEGs are decoded; "" if the first record is not one."""
    try:
      image = self.source.fetch(tf.constant(0, tf.int64)).get("image")
    except tf.errors.OpError:
      return ""
    if image is None or image.dtype != tf.string or not image.numpy().startswith(b"\xff\xd8\xff"):
      return ""
    return JPEG_DECODING

  def batches(self, locate: Locate, size: int, *, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
    """Yields batches `start` to `stop` (endlessly if None); batch i begins at row i * size."""
    load = self._make_load(locate)
    end = tf.int64.max if stop is None else stop * size
    step, failures = start, 0
    while stop is None or step < stop:
      dataset = tf.data.Dataset.range(step * size, end)
      dataset = dataset.map(load, tf.data.AUTOTUNE, deterministic=True)
      dataset = dataset.batch(size, drop_remainder=True).prefetch(_BATCHES_AHEAD)
      batches = dataset.with_options(_options()).as_numpy_iterator()
      while True:
        try:
          batch = next(batches)
        except StopIteration:
          return
        except tf.errors.OpError as error:
          found = self._find_damaged(locate, range(step * size, (step + 1) * size), step)
          failures = 0 if found else failures + 1
          if failures == _ATTEMPTS:
            raise TransientError(
              f"{self.source.name} cannot be read ({reason_of(error)}): start again once it can, and the run "
              "continues"
            ) from error
          if not found:
            time.sleep(2.0**failures)
          break
        yield batch
        step, failures = step + 1, 0

  def _make_load(self, locate: Locate) -> Callable[[tf.Tensor], Record]:
    def load(number: tf.Tensor) -> Record:
      index, draw = locate(number, shuffle.tensors)
      return self._traced_load(index, draw, self._substitutes.lookup(index))

    return tf.function(load, autograph=False, input_signature=[tf.TensorSpec((), tf.int64)])

  @functools.cached_property
  def _traced_load(self) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], Record]:
    """`_load`, traced once for all datasets that call it, since tracing takes long."""
    return tf.function(self._load, autograph=False, input_signature=[tf.TensorSpec((), tf.int64)] * 3)

  def _load(self, index: tf.Tensor, draw: tf.Tensor, used: tf.Tensor) -> Record:
    """Reads and preprocesses the record `used` in the place of the one with an index."""
    record = self.source.fetch(used)
    result: Record = {}
    views = self.preprocess.views
    for view in range(views):
      place = draw * views + view
      # TensorFlow's generator hashes its seed, so that nearby seeds have independent streams.
      made = self.preprocess(record, tf.stack([self._seed + index, place]), place)
      numbers = {key: value for key, value in made.items() if value.dtype != tf.string}
      if view == 0:
        result = numbers
      else:
        result |= {f"{key}{view + 1}": numbers[key] for key in ("image", "tokens") if key in numbers}
    result = {k: tf.cast(v, tf.int32) if v.dtype == tf.int64 else v for k, v in result.items()}
    return result | {"record": tf.cast(used, tf.int32), "valid": used == index}

  def _find_damaged(self, locate: Locate, numbers: range, step: int) -> bool:
    """Records which records of a batch fail; returns whether any does.

    Which record each row uses is looked up before any is read: a substitute chosen meanwhile must not be
    blamed for the record that it replaces.
    """

    @tf.autograph.experimental.do_not_convert
    def look_up(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
      index, draw = locate(number, shuffle.tensors)
      return index, draw, self._substitutes.lookup(index)

    located = tf.data.Dataset.range(numbers.start, numbers.stop).map(look_up).batch(len(numbers))
    located = located.get_single_element()
    rows = tf.data.Dataset.from_tensor_slices(located)
    rows = rows.map(self._traced_load, tf.data.AUTOTUNE, deterministic=True)
    results = iter(rows.with_options(_options()))  # iteration continues after an error
    reasons: dict[int, str] = {}
    for used in located[2].numpy().tolist():
      try:
        next(results)
      except tf.errors.OpError as error:
        if type(error).__name__.removesuffix("Error") not in _TEMPORARY:
          reasons.setdefault(used, reason_of(error))
    for used, reason in reasons.items():
      self._substitutes.add(used, reason, step)
    return bool(reasons)


def _cores() -> int:
  """The number of cores that this process may use, by its affinity and the quota of its container."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  try:
    quota, period = pathlib.Path(_QUOTA).read_text().split()
    return max(1, min(cores, int(quota) // int(period)))
  except (OSError, ValueError):  # no quota
    return cores


def _options() -> tf.data.Options:
  options = tf.data.Options()
  # More threads than cores, since some wait for files or copy a batch.
  options.threading.private_threadpool_size = 2 * _cores()
  options.threading.max_intra_op_parallelism = 1  # records are processed in parallel instead
  return options


def reason_of(error: tf.errors.OpError) -> str:
  """Returns the core of an error message, without what TensorFlow adds to it."""
  text = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", error.message)
  text = re.sub(r"^.*Iterator::[\w:]*(\[\d+\])?[\w:]*: ", "", text.strip())
  text = re.sub(r"^Graph execution error:.*\n\n", "", text, flags=re.DOTALL)  # a stack of Python's lines
  line = (text.splitlines() or [""])[0].removeprefix("ValueError: ").strip()
  return re.sub(r"^assertion failed: \[(.*)\]$", r"\1", line) or type(error).__name__
