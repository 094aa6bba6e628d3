"""Reads several crops of each record as training does, and encodes them for a token cache."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from maskgen.data import reader as reader_lib
from maskgen.data.array_reader import Batch
from maskgen.data.preprocess import parse_preprocess
from maskgen.data.reader import AnyReader
from maskgen.data.shuffle import Shuffle
from maskgen.data.skipped import Skipped
from maskgen.data.sources import open_source
from maskgen.errors import UserError


def open_reader(
  source: str, split: str, preprocess: str, seed: int, image_shape: tuple[int, int, int]
) -> AnyReader:
  """Opens a split with the same draws as a training run with this seed.

  Raises:
    UserError: if the data does not exist, or the preprocessing does not return one image of this shape.
  """
  parsed = parse_preprocess(preprocess)
  if parsed.views > 1:
    raise UserError(f"preprocessing '{preprocess}' makes two views: remove two_views, as each crop is a view")
  reader = reader_lib.open_reader(
    open_source(source, split),
    parsed,
    seed=seed,
    skipped=Skipped(),
    use="tokenizing",
    split=split,
  )
  shape = reader.spec["image"].shape if "image" in reader.spec else ()
  if shape != image_shape:
    raise UserError(
      f"preprocessing '{preprocess}' returns images of shape {shape}, but the tokenizer takes "
      f"{image_shape}: change it"
    )
  return reader


def encode(
  reader: AnyReader,
  records: range,
  crops: int,
  batch_size: int,
  encode: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray | None]:
  """Encodes the first draws of a range of records.

  Args:
    reader: reads the data.
    records: the records to encode.
    crops: the number of draws of each record.
    batch_size: the number of images per batch; the last batch is padded to this size.
    encode: maps images uint8 [b, h, w, c] to codes [b, n].

  Returns:
    Codes [records, crops, n], and labels [records] if the data has labels.
  """
  codes, labels = [], []
  for batch in read(reader, records, crops, batch_size):
    codes.append(encode(batch["image"]))
    if "label" in batch:
      labels.append(batch["label"])
  rows = len(records) * crops
  all_codes = np.concatenate(codes)[:rows].reshape(len(records), crops, -1)
  return all_codes, np.concatenate(labels)[:rows:crops] if labels else None


def read(reader: AnyReader, records: range, crops: int, batch_size: int) -> Iterator[Batch]:
  """Yields the first draws of a range of records, grouped by record; the last batch is padded."""
  rows = len(records) * crops

  def locate(number: Any, _: Shuffle) -> tuple[Any, Any]:
    number = number % rows
    return records.start + number // crops, number % crops

  return reader.batches(locate, batch_size, stop=-(-rows // batch_size))
