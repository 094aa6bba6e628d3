"""The input pipeline: turns a source into shuffled, augmented batches, for any number of processes.

Position p of training is record shuffle(p mod N) of epoch p // N, and the batch of step i holds the
positions starting at i * batch size. There is no other state, so that a run resumes at any step in
constant time, and each process reads only its own rows of the global batch.
"""

import contextlib
import dataclasses
import functools
import math
import os
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, Literal

import jax
import numpy as np

from maskgen.config import check_at_least
from maskgen.data import subset
from maskgen.data.array_reader import Batch
from maskgen.data.preprocess import OpCall, parse_preprocess
from maskgen.data.reader import AnyReader, open_reader
from maskgen.data.shuffle import Shuffle
from maskgen.data.skipped import TRAINING, Skipped
from maskgen.data.sources import Codes, Source, open_source
from maskgen.errors import UserError
from maskgen.numerics.text import Captions


@dataclasses.dataclass(frozen=True)
class Data:
  """Training and evaluation batches of one data set.

  Batches are dicts of arrays with a leading axis b, the rows of this process in the global batch:
  "image" uint8 [b, h, w, c] (and "image2" with two views), or "tokens" int [b, n] from a token cache;
  "label" int32 [b] and "caption" int32 [b, length] if the data has them; "record" int32 [b], the index of the
  record. Evaluation batches also have "valid" bool [b], which is False for the padding of the last batch and
  for records that replace damaged ones.

  A record's augmentation depends on the seed, the record and the number of earlier draws, so that cached
  crops equal live ones.

  Attributes:
    source: the source of records, see `sources`.
    preprocess: the preprocessing for training, see `preprocess.py`.
    eval_preprocess: the preprocessing for evaluation, which must return images of the same shape.
    batch_size: the global batch size of training.
    seed: the seed of shuffling and augmentation.
    split: the split to train on.
    eval_split: the split to evaluate on.
    eval_source: the source of both splits in evaluations, such as the pictures behind cached tokens; by
      default `source`.
    num_classes: the number of classes that the data must have; None accepts any.
    shots: train only on this number of records of each class; or
    share: only on this fraction of each class, in (0, 1].
    subset_seed: the seed for choosing these records; subsets of one seed are nested.
    process_index: selects the rows of a global batch to read; by default the index of this JAX process.
    process_count: the number of processes that share a global batch; by default all JAX processes.

  Raises:
    UserError: on construction, if a field is invalid; on reading, if too many records are damaged.
  """

  source: str
  preprocess: str
  eval_preprocess: str
  batch_size: int
  seed: int = 0
  split: str = "train"
  eval_split: str = "test"
  eval_source: str | None = None
  num_classes: int | None = None
  shots: int | None = None
  share: float | None = None
  subset_seed: int = 0
  process_index: int | None = None
  process_count: int | None = None

  def __post_init__(self):
    self._rows(self.batch_size)
    self._check_subset()
    for text, reader in ((self.preprocess, self._train), (self.eval_preprocess, self._eval)):
      if reader.spec.keys().isdisjoint({"image", "tokens"}):
        raise UserError(f"preprocessing '{text}' of {reader.source.name} returns neither images nor tokens")
      for op in reader.preprocess.ops:
        if op.name == "value_range" and (op.arguments["low"], op.arguments["high"]) != (0, 1):
          raise UserError(f"preprocessing '{text}' leaves the range [0, 1] of pixels: remove value_range")
      sizes = [tuple(reader.spec[key].shape) for key in ("image", "image2") if key in reader.spec]
      if len(set(sizes)) > 1:
        raise UserError(
          f"preprocessing '{text}' returns images of shape {sizes[0]} and second views of shape {sizes[1]}: "
          "make them equal"
        )
    if "image" not in self._eval.spec:
      raise UserError(
        f"{self._eval.source.name} has no images to evaluate on: give data.eval_source pictures"
      )
    shapes = {
      name: tuple(reader.spec["image"].shape)
      for name, reader in (("preprocess", self._train), ("eval_preprocess", self._eval))
      if "image" in reader.spec
    }
    if self.codes is not None:
      shapes["preprocess"] = self.codes.image_shape
    if len(set(shapes.values())) > 1:
      raise UserError(
        f"preprocess '{self.preprocess}' returns images of shape {shapes['preprocess']}, but eval_preprocess "
        f"'{self.eval_preprocess}' of shape {shapes['eval_preprocess']}: make them equal"
      )
    self._check_classes()
    self._check_memory()

  def _check_memory(self) -> None:
    record = sum(math.prod(value.shape) * value.dtype.itemsize for value in self._train.spec.values())
    size = record * len(self._rows(self.batch_size))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
      raise UserError(
        f"a batch of {self.batch_size} records takes {size / 1e9:,.0f} GB in each process, this machine has "
        f"{memory / 1e9:,.0f} GB of memory: make batch_size smaller"
      )

  def _check_subset(self) -> None:
    check_at_least(self, 0, "subset_seed")
    if self.shots is not None:
      check_at_least(self, 1, "shots")
      if self.share is not None:
        raise UserError("give data.shots or data.share, not both")
    if self.share is not None and not 0.0 < self.share <= 1.0:
      raise UserError(f"share is {self.share}: it must be greater than 0 and at most 1")

  def _check_classes(self) -> None:
    names, others = self.class_names, self._eval.source.class_names
    if names is not None and others is not None and names != others:
      odd = next(iter(set(names) ^ set(others)), names[0])
      raise UserError(
        f"the classes of {self._train.source.name} and {self._eval.source.name} differ in '{odd}': make them "
        "the same"
      )
    if self.num_classes is not None:
      check_at_least(self, 1, "num_classes")
      found = 0 if names is None else len(names)
      if found != self.num_classes:
        remedy = self.lacks.get("label", "change one of them")
        name = self._train.source.name
        raise UserError(f"{name} has {found} classes, but data.num_classes is {self.num_classes}: {remedy}")

  @functools.cached_property
  def skipped(self) -> Skipped:
    """The damaged records that were found."""
    return Skipped()

  @functools.cached_property
  def _train(self) -> AnyReader:
    return self._reader(TRAINING, self.source, self.split, self.preprocess, part=True)

  @functools.cached_property
  def _eval(self) -> AnyReader:
    return self._reader("evaluation", self.eval_source or self.source, self.eval_split, self.eval_preprocess)

  @functools.cached_property
  def _eval_on_train(self) -> AnyReader:
    source = self.eval_source or self.source
    use = "evaluation of training data"
    return self._reader(use, source, self.split, self.eval_preprocess, part=True)

  @functools.cached_property
  def _sources(self) -> dict[tuple[str, str, bool], Source]:
    return {}

  def _source(self, source: str, split: str, part: bool) -> Source:
    """Opens a split, or the subset of it to train on, once."""
    part = part and (self.shots is not None or self.share is not None)
    at = (source, split, part)
    if at not in self._sources:
      if part:
        whole = self._source(source, split, part=False)
        self._sources[at] = subset.take(whole, shots=self.shots, share=self.share, seed=self.subset_seed)
      else:
        self._sources[at] = open_source(source, split)
    return self._sources[at]

  def _reader(self, use: str, source: str, split: str, preprocess: str, part: bool = False) -> AnyReader:
    return open_reader(
      self._source(source, split, part),
      parse_preprocess(preprocess),
      seed=self.seed,
      skipped=self.skipped,
      use=use,
      split=split,
    )

  @functools.cached_property
  def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a global training batch."""
    return {
      key: jax.ShapeDtypeStruct((self.batch_size, *value.shape), value.dtype)
      for key, value in self._train.spec.items()
      if key != "valid"
    }

  def eval_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a global evaluation batch."""
    return {
      key: jax.ShapeDtypeStruct((batch_size, *value.shape), value.dtype)
      for key, value in self._eval.spec.items()
    }

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of the images in a batch."""
    return tuple(self._eval.spec["image"].shape)

  @property
  def class_names(self) -> tuple[str, ...] | None:
    """The class names, or None if training or evaluation has no labels."""
    return self._train.source.class_names if self._eval.source.class_names else None

  @property
  def lacks(self) -> dict[str, str]:
    """Why there are no labels or captions, see `Source.lacks`."""
    return {**self._eval.source.lacks, **self._train.source.lacks}

  @property
  def captions(self) -> Captions | None:
    """How captions are tokenized; None if training or evaluation has no captions, or the two differ."""
    found = {
      Captions(text_tokenizer=op.arguments["tokenizer"], length=op.arguments["length"]) if op else None
      for op in (_tokenizing(self._train), _tokenizing(self._eval))
    }
    return found.pop() if len(found) == 1 else None

  @property
  def codes(self) -> Codes | None:
    """The codes that training reads from a token cache, if it does."""
    return self._train.source.codes

  @property
  def num_train(self) -> int:
    return self._train.source.size

  @property
  def num_eval(self) -> int:
    return self._eval.source.size

  @property
  def fingerprints(self) -> dict[str, dict[str, str | int]]:
    """What identifies the records of training and evaluation, and how JPEGs among them are decoded."""
    found: dict[str, dict[str, str | int]] = {}
    for use, reader in (("training", self._train), ("evaluation", self._eval)):
      source = reader.source
      found[use] = {"source": source.name, "size": source.size, "fingerprint": source.fingerprint}
      if reader.jpeg_decoding:
        found[use]["jpeg_decoding"] = reader.jpeg_decoding
    return found

  def describe(self, records: np.ndarray) -> list[str]:
    """Returns the names of training records, given by index, int [b]."""
    return [self._train.source.describe(int(record)) for record in records]

  def train_batches(self, start_step: int = 0) -> Iterator[Batch]:
    """Yields this process's rows of the batches from step `start_step` on."""
    size, rows = self.num_train, self._rows(self.batch_size)

    def locate(number: Any, shuffle: Shuffle) -> tuple[Any, Any]:
      position = number // len(rows) * self.batch_size + rows.start + number % len(rows)
      epoch = position // size
      return shuffle(position % size, size, self.seed, epoch), epoch

    for batch in self._train.batches(locate, len(rows), start=start_step):
      yield {key: value for key, value in batch.items() if key != "valid"}

  def eval_batches(self, split: Literal["train", "eval"], batch_size: int) -> Iterator[Batch]:
    """Yields each record of a split once, under evaluation preprocessing.

    The order is shuffled but fixed, so that the first batches are a representative sample. All processes
    yield the same number of batches.

    Args:
      split: "train" or "eval", for `split` or `eval_split`.
      batch_size: the global batch size.
    """
    reader = self._eval if split == "eval" else self._eval_on_train
    size, rows = reader.source.size, self._rows(batch_size)

    def locate(number: Any, shuffle: Shuffle) -> tuple[Any, Any]:
      position = number // len(rows) * batch_size + rows.start + number % len(rows)
      return shuffle(position % size, size, 0, 0), 0 * position

    steps = -(-size // batch_size)
    for step, batch in enumerate(reader.batches(locate, len(rows), stop=steps)):
      yield batch | {"valid": batch["valid"] & (step * batch_size + np.array(rows) < size)}

  def _rows(self, batch_size: int) -> range:
    """The rows of a global batch that belong to this process."""
    count = jax.process_count() if self.process_count is None else self.process_count
    index = jax.process_index() if self.process_index is None else self.process_index
    if batch_size < 1 or batch_size % count:
      raise UserError(
        f"batch size {batch_size} cannot be divided among {count} processes: make it a multiple"
      )
    local = batch_size // count
    return range(index * local, (index + 1) * local)


def to_device(
  batches: Iterator[Batch], sharding: jax.sharding.Sharding, ahead: int = 2
) -> Generator[dict[str, jax.Array]]:
  """Transfers batches of this process's rows to the devices ahead of their use, in a separate thread.

  Args:
    batches: dicts of arrays [b, ...], b being this process's rows of the global batch.
    sharding: the sharding of the global arrays over all devices.
    ahead: the maximum number of batches that wait on the devices.
  """
  ready: queue.Queue[dict[str, jax.Array] | Exception | None] = queue.Queue(ahead)
  closed = threading.Event()

  def put(item: dict[str, jax.Array] | Exception | None) -> None:
    while not closed.is_set():
      with contextlib.suppress(queue.Full):
        ready.put(item, timeout=0.1)
        return

  def work() -> None:
    try:
      for batch in batches:
        put({key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()})
        if closed.is_set():
          return
      put(None)
    except Exception as error:
      put(error)

  thread = threading.Thread(target=work, daemon=True)
  thread.start()
  try:
    while (item := ready.get()) is not None:
      if isinstance(item, Exception):
        raise item
      yield item
  finally:
    closed.set()
    thread.join(timeout=10.0)


def _tokenizing(reader: AnyReader) -> OpCall | None:
  """The last op that tokenizes captions, if any."""
  found = [op for op in reader.preprocess.ops if op.name == "tokenize"]
  return found[-1] if found else None
