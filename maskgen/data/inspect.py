"""Inspects the records of a source: sizes, labels, captions and damage."""

import dataclasses
from collections.abc import Iterator, Sequence

from maskgen.data.cpu_tf import tf
from maskgen.data.picture import Picture
from maskgen.data.reader import reason_of
from maskgen.data.sources import Source


@dataclasses.dataclass(frozen=True)
class Finding:
  """The properties of one record.

  Attributes:
    index: the index of the record.
    label: its label, if any.
    sides: (height, width) of the picture as displayed, if it is encoded.
    damage: why the record cannot be used, or None.
  """

  index: int
  label: int | None = None
  sides: tuple[int, int] | None = None
  damage: str | None = None


def spread(size: int, count: int) -> list[int]:
  """Returns `count` indices (at most `size`), evenly spread over `size` records."""
  count = min(size, count)
  return [number * size // count for number in range(count)]


def scan(source: Source, indices: Sequence[int]) -> Iterator[Finding]:
  """Yields a finding for each record, damaged ones included, after decoding its whole picture."""

  @tf.autograph.experimental.do_not_convert
  def look(index: tf.Tensor) -> dict[str, tf.Tensor]:
    record = source.fetch(index)
    seen = {key: value for key, value in record.items() if key != "image"}
    if "image" in record and record["image"].dtype == tf.string:
      seen["sides"] = tf.shape(Picture(record["image"], channels=3).pixels())[:2]
    return seen or record

  dataset = tf.data.Dataset.from_tensor_slices(tf.constant(indices, tf.int64))
  records = iter(dataset.map(look, tf.data.AUTOTUNE, deterministic=True))
  for index in indices:
    try:
      seen = next(records)
    except tf.errors.OpError as error:  # iteration continues with the following record
      yield Finding(index, damage=reason_of(error))
      continue
    label = int(seen["label"]) if "label" in seen else None
    sides = seen["sides"].numpy().tolist() if "sides" in seen else None
    yield Finding(index, label, sides and tuple(sides))


def captions(source: Source, indices: Sequence[int]) -> list[list[str]]:
  """Returns the captions of records: none if the source has no captions or a record's caption is damaged."""
  found = []
  for index in indices:
    try:
      texts = source.fetch(tf.constant(index, tf.int64)).get("caption", tf.constant([], tf.string))
    except tf.errors.OpError:
      texts = tf.constant([], tf.string)
    found.append([text.decode(errors="replace") for text in texts.numpy()])
  return found
