"""Data sets prepared by TFDS: `tfds:cifar10`, or with a config `tfds:coco/2014` (or `tfds:coco:2014`).

Splits are those of the data set or parts of them, such as `train[:90%]` or `train+validation`. Both file
formats, ArrayRecord and TFRecord, yield the same records in the same order. A record has the data set's
picture and, if there are such features, its label and captions; other features are not decoded. Nothing is
downloaded.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from maskgen.data import tfds_folder
from maskgen.data.cpu_tf import tf
from maskgen.data.ranges import Ranges, cached_indices
from maskgen.data.sources import Source, source
from maskgen.errors import UserError

_CAPTIONS = ("caption", "captions", "text")
# Fewer than the 1024 files that a process may usually have open.
_OPEN_FILES = 256


@source("tfds:NAME")
def open_tfds(argument: str, split: str) -> Source:
  """Opens a split of the highest prepared version; files are read when records are fetched.

  Raises:
    UserError: if the data set is not prepared, has no such split or no pictures, or its files are damaged.
  """
  name, config = tfds_folder.parse_name(argument)
  folder = tfds_folder.find_or_explain(tfds_folder.data_dir(), name, config)
  info = tfds.builder_from_directory(folder).info
  title = f"TFDS data set '{argument}'"
  if info.file_format not in _READERS:
    raise UserError(
      f"{title} is stored in {info.file_format.value} files: prepare it as array_record instead"
    )
  parts = _parts(title, info.splits, split)
  parse, class_names = _parser(title, info)
  # The location of each record: its part, and its position in the file.
  part_of = np.repeat(np.arange(len(parts), dtype=np.int32), [part.take for part in parts])
  position = np.concatenate([np.zeros(0, np.int64)] + [part.skip + np.arange(part.take) for part in parts])
  read = _READERS[info.file_format](parts, part_of, position)
  contents = {name: (base.num_bytes, base.shard_lengths) for name, base in sorted(info.splits.items())}
  checksum = hashlib.blake2b(repr((contents, len(position))).encode(), digest_size=16).hexdigest()
  return Source(
    title,
    len(position),
    class_names,
    lambda index: parse(read(index)),
    f"{info.full_name} {split} {checksum}",
    lambda index: f"record {position[index]} in '{parts[part_of[index]].filename}'",
  )


def _parts(title: str, splits: Mapping[str, Any], split: str) -> list:
  """Returns TFDS's instructions: for each file, the numbers of records to `skip` and to `take`."""
  unknown = {part.partition("[")[0].strip() for part in split.split("+")} - {*splits, "all"}
  if unknown:
    remedy = "choose one of these, or a part such as 'train[:90%]'"
    if split == "test" and "validation" in splits:
      remedy = "set config.data.eval_split to 'validation'"
    raise UserError(f"{title} has no split '{min(unknown)}', only {', '.join(sorted(splits))}: {remedy}")
  try:
    return [part for part in splits[split].file_instructions if part.take > 0]
  except (ValueError, NotImplementedError) as error:
    reason = str(error).splitlines()[-1].rstrip(".")
    raise UserError(f"split '{split}' of {title} is malformed ({reason}): write 'train[:90%]'") from error


# From an example to a record


def _parser(title: str, info: tfds.core.DatasetInfo) -> tuple[Callable, tuple[str, ...] | None]:
  """Returns a function that parses a serialized example to a record, and the class names."""
  features = dict(info.features.items())
  image = _image_key(title, features)
  label = _label_key(features, info.supervised_keys)
  texts = [key for key in _CAPTIONS if key in features and _text_path(features[key]) is not None]
  caption = texts[0] if texts else None
  # Parses only these features: others are not decoded.
  wanted = tfds.features.FeaturesDict({key: features[key] for key in (image, label, caption) if key})

  def parse(example: tf.Tensor) -> dict[str, tf.Tensor]:
    parsed = wanted.deserialize_example(example, decoders={image: tfds.decode.SkipDecoding()})
    record = {"image": parsed[image]}
    if label:
      record["label"] = tf.cast(parsed[label], tf.int64)
    if caption:
      texts = parsed[caption]
      for key in _text_path(features[caption]) or ():
        texts = texts[key]
      texts = tf.reshape(texts, [-1])
      # There is always at least one, though it may be empty.
      record["caption"] = tf.concat([texts, [""]], axis=0)[: tf.maximum(tf.size(texts), 1)]
    return record

  return parse, tuple(features[label].names) if label else None


def _image_key(title: str, features: Mapping[str, Any]) -> str:
  # Excludes subclasses such as LabeledImage, a segmentation map.
  images = sorted(key for key, feature in features.items() if type(feature) is tfds.features.Image)
  if not images:
    raise UserError(f"{title} has no pictures, only {', '.join(sorted(features))}: choose another data set")
  if len(images) > 1 and "image" not in images:
    raise UserError(f"{title} has several pictures, {', '.join(images)}: choose a data set with one 'image'")
  key = "image" if "image" in images else images[0]
  if features[key].tf_dtype != tf.uint8:
    raise UserError(
      f"'{key}' of {title} is {features[key].tf_dtype.name}: choose a data set of 8-bit pictures"
    )
  return key


def _label_key(features: Mapping[str, Any], supervised_keys: Any) -> str | None:
  target = supervised_keys[1] if supervised_keys else None
  keys = [key for key in ("label", target) if isinstance(key, str)]
  return next((key for key in keys if isinstance(features.get(key), tfds.features.ClassLabel)), None)


def _text_path(feature: Any) -> tuple[str, ...] | None:
  """Returns the keys that lead to the texts in a feature (none for texts and lists of texts), or None."""
  if isinstance(feature, tfds.features.Sequence):
    feature = feature.feature
  if isinstance(feature, tfds.features.FeaturesDict):
    return next(((key,) for key in _CAPTIONS if key in feature and _is_text(feature[key])), None)
  return () if _is_text(feature) else None


def _is_text(feature: Any) -> bool:
  return isinstance(feature, tfds.features.Tensor) and feature.tf_dtype == tf.string and feature.shape == ()


# From an index to an example: scalar strings, in the graph


def _array_record_reader(parts: Sequence, part_of: np.ndarray, position: np.ndarray) -> Callable:
  def read(index: np.ndarray) -> np.ndarray:
    path = parts[part_of[index]].filename
    try:
      (example,) = _array_record(path).read([int(position[index])])
    except RuntimeError as error:
      raise UserError(f"'{path}' cannot be read: {error}") from error
    return np.array(example, object)  # a bytes array would lose trailing zeros

  return lambda index: tf.ensure_shape(tf.numpy_function(read, [index], tf.string, stateful=False), ())


@functools.lru_cache(maxsize=_OPEN_FILES)
def _array_record(path: str) -> Any:
  from array_record.python import array_record_module  # not available on every platform

  return array_record_module.ArrayRecordReader(
    path,
    options="readahead_buffer_size:0",  # access is random
    file_reader_buffer_size=32_768,
  )


def _tf_record_reader(parts: Sequence, part_of: np.ndarray, position: np.ndarray) -> Callable:
  del part_of, position
  paths = [part.filename for part in parts]
  indices = cached_indices(paths, scan_tf_record, "tfrecord")
  for part, index in zip(parts, indices, strict=True):
    if len(index["offset"]) != part.examples_in_shard:
      raise UserError(
        f"'{part.filename}' has {len(index['offset'])} records instead of {part.examples_in_shard}: "
        "prepare the data set again"
      )
  slices = [slice(part.skip, part.skip + part.take) for part in parts]
  offsets = [index["offset"][cut] for index, cut in zip(indices, slices, strict=True)]
  lengths = [index["length"][cut] for index, cut in zip(indices, slices, strict=True)]
  return Ranges.of_shards(paths, offsets, lengths).read


def scan_tf_record(path: str) -> dict[str, np.ndarray]:
  """Locates the records of a TFRecord file.

  Each is preceded by its length, uint64, and a 4-byte checksum, and followed by another checksum.

  Raises:
    UserError: if the file ends within a record.
  """
  size = tf.io.gfile.stat(path).length
  offsets, lengths, end = [], [], 0
  # Local files are read unbuffered, which skips the records themselves.
  with tf.io.gfile.GFile(path, "rb") if "://" in path else open(path, "rb", buffering=0) as file:
    while end < size:
      file.seek(end)
      offsets.append(end + 12)
      lengths.append(int.from_bytes(file.read(8), "little"))
      end = offsets[-1] + lengths[-1] + 4
  if end != size:
    raise UserError(f"'{path}' ends within a record: it is truncated, prepare the data set again")
  return {"offset": np.array(offsets, np.int64), "length": np.array(lengths, np.int64)}


_READERS = {
  tfds.core.FileFormat.ARRAY_RECORD: _array_record_reader,
  tfds.core.FileFormat.TFRECORD: _tf_record_reader,
}
