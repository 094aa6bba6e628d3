"""Pictures in Parquet files with the layout of the Hugging Face Hub; needs the extra `parquet`.

`parquet:/path/*.parquet` names the files, with the patterns of `tar:`, in any store that TensorFlow can read.

The columns are chosen by their types and names:
- the picture: a struct with the binary field `bytes`, or bytes; named `image`, `img`, `picture` or `jpg`, or
  the only such column;
- the label, if any: whole numbers or texts; a ClassLabel of `datasets`, or named `label`, `labels`, `class`
  or `cls`;
- the captions, if any: a text or a list of texts; named `caption`, `captions`, `text` or `prompt`.
`parquet:/path/*.parquet#image=photo,label=species,caption=alt` chooses others; an empty name stands for none.
Labels and captions that only some records have are not used. Class names are those of a ClassLabel, the texts
in order, or else the numbers up to the largest label.

Splits: files named as the Hub names them, `train-00000-of-00004.parquet`, are those of their split; or
`{split}` in the path stands for the name of the split. Otherwise a tenth of the records, chosen by hashes of
file and row, is held out.

Parquet compresses columns by groups of rows, so that reading a record reads its group; the groups that were
read last stay in memory. The first use scans labels and captions, and writes the index `<file>.index.npz`
next to each file.
"""

import collections
import functools
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from maskgen.data.cpu_tf import tf
from maskgen.data.listing import HELD_OUT, SPLITS, only_some, say, smallest_tenth
from maskgen.data.ranges import Arrays, cached_indices
from maskgen.data.shards import shard_paths
from maskgen.data.sources import Source, check_split, source
from maskgen.data.tables import in_order
from maskgen.errors import UserError, nearest

_NAMES = {
  "image": ("image", "img", "picture", "jpg"),
  "label": ("label", "labels", "class", "cls"),
  "caption": ("caption", "captions", "text", "prompt"),
}
# Of row groups in memory; those that threads are reading come on top.
_CACHE_BYTES = 2**30
_MAX_LABEL = 10**6


class _Columns(NamedTuple):
  """The columns that are used, "" for none.

  Attributes:
    image, label, caption: their names.
    content: the path of the bytes of a picture, such as `image.bytes`.
    classes: the names of classes, if they are stored.
  """

  image: str
  label: str
  caption: str
  content: str
  classes: tuple[str, ...]


@source("parquet:/path/*.parquet")
def open_parquet(argument: str, split: str) -> Source:
  """Opens a split of the files that a pattern names; row groups are read when records are fetched.

  Raises:
    UserError: if files are missing or damaged, there is no column with pictures, or pyarrow is not installed.
  """
  pattern, _, chosen = argument.partition("#")
  name = f"parquet '{argument}'"
  everywhere, mine = _split_paths(name, pattern, split)
  columns = _find_columns(name, everywhere[0], _parse(name, chosen))
  scan = functools.partial(_scan, columns=columns)
  index = cached_indices(everywhere, scan, f"parquet 1 {columns}")
  class_names, labels = _labels(name, columns, index)
  kept = [number for number, path in enumerate(everywhere) if path in mine]
  paths, index = [everywhere[number] for number in kept], [index[number] for number in kept]
  label = np.concatenate([labels[number] for number in kept])
  has_caption = np.concatenate([shard["caption"] for shard in index])
  file = np.repeat(np.arange(len(paths)), [len(shard["label"]) for shard in index])
  row = np.concatenate([np.arange(len(shard["label"])) for shard in index])

  def describe(number: int) -> str:
    return f"row {row[number]} of {os.path.basename(paths[file[number]])}"

  has = {"label": label >= 0, "caption": has_caption}
  lacks = {key: only_some(name, key, given, describe) for key, given in has.items()}
  numbers = np.arange(len(row))
  if len(mine) == len(everywhere) and "{split}" not in pattern:
    check_split(name, split, SPLITS)
    keys = [f"{os.path.basename(paths[f])}:{r}".encode() for f, r in zip(file, row, strict=True)]
    numbers = numbers[smallest_tenth(keys) == (split != "train")]
  groups = _Groups(paths, [np.cumsum(shard["group"]) for shard in index])
  _warn(name, index)
  number_table, label_table = tf.constant(numbers, tf.int64), tf.constant(label, tf.int64)

  @tf.autograph.experimental.do_not_convert
  def read_image(number: np.ndarray) -> np.ndarray:
    content = groups.read(int(file[number]), int(row[number]), columns.content)
    if not content:
      raise ValueError("it has no picture")
    return np.array(content, object)

  @tf.autograph.experimental.do_not_convert
  def read_captions(number: np.ndarray) -> np.ndarray:
    texts = groups.read(int(file[number]), int(row[number]), columns.caption)
    return np.array([text.encode() for text in _captions(texts)], object)

  def fetch(position: tf.Tensor) -> dict[str, tf.Tensor]:
    number = tf.gather(number_table, position)
    record = {"image": tf.ensure_shape(_call(read_image, number), ())}
    if has["label"].all():
      record["label"] = tf.gather(label_table, number)
    if has["caption"].all():
      record["caption"] = tf.ensure_shape(_call(read_captions, number), [None])
    return record

  digest = hashlib.blake2b(repr((class_names, columns)).encode() + numbers.tobytes(), digest_size=16)
  for shard in index:
    digest.update(b"".join(shard[key].tobytes() for key in ("footer", "label", "text", "caption")))
  return Source(
    name,
    len(numbers),
    class_names if has["label"].all() else None,
    fetch,
    digest.hexdigest(),
    lambda position: describe(int(numbers[position])),
    lacks={key: reason for key, reason in lacks.items() if reason},
  )


def _split_paths(name: str, pattern: str, split: str) -> tuple[list[str], set[str]]:
  """The files of all splits, whose labels give the classes, and those of one; all, if there are no splits."""
  paths = shard_paths(pattern, split)
  if "{split}" in pattern:
    try:
      train = shard_paths(pattern, "train")
    except UserError:  # this is the only split
      train = []
    return list(dict.fromkeys([*train, *paths])), set(paths)
  of = {path: re.fullmatch(r"(\w+)-\d+-of-\d+\.parquet", os.path.basename(path)) for path in paths}
  found = {path: match[1] for path, match in of.items() if match}
  if len(found) < len(paths) or len(set(found.values())) == 1:
    return paths, set(paths)
  if split not in found.values() and split in HELD_OUT:
    split = next((other for other in HELD_OUT if other in found.values()), split)
  check_split(name, split, tuple(dict.fromkeys(found.values())))
  return paths, {path for path in paths if found[path] == split}


# Columns


def _parse(name: str, chosen: str) -> dict[str, str]:
  """Reads `image=photo,label=` after the pattern."""
  given: dict[str, str] = {}
  for part in filter(None, chosen.split(",")):
    key, equals, value = part.partition("=")
    if key not in _NAMES or not equals:
      raise UserError(f"{name} has '{part}' after '#': write image=COLUMN, label=COLUMN or caption=COLUMN")
    given[key] = value
  return given


def _find_columns(name: str, path: str, given: Mapping[str, str]) -> _Columns:
  """Chooses the columns of a file."""
  schema = _open(path).schema_arrow
  import pyarrow as pa  # which `_open` has found

  features = (
    json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
  )
  for key, column in given.items():
    if column and column not in schema.names:
      raise UserError(f"{name} has no column '{column}' for its {key}s{nearest(column, schema.names)}")

  def pick(key: str, fits: Any, marked: str = "", sole: bool = False) -> str:
    if key in given:
      return given[key]
    fitting = [field.name for field in schema if fits(field.type)]
    typed = [one for one in fitting if marked and (features.get(one) or {}).get("_type") == marked]
    named = [one for one in _NAMES[key] if one in fitting]
    return next(iter([*typed, *named, *(fitting if sole and len(fitting) == 1 else [])]), "")

  def is_bytes(kind: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

  def is_text(kind: Any) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)

  def is_image(kind: Any) -> bool:
    if pa.types.is_struct(kind):
      return any(field.name == "bytes" and is_bytes(field.type) for field in kind)
    return is_bytes(kind)

  image = pick("image", is_image, "Image", sole=True)
  if not image or not is_image(schema.field(image).type):
    raise UserError(
      f"{name} has no column of pictures, which are bytes or structs with bytes, among "
      f"{', '.join(schema.names)}: name one by '#image=COLUMN'"
    )

  def is_label(kind: Any) -> bool:
    return pa.types.is_integer(kind) or is_text(kind)

  def is_caption(kind: Any) -> bool:
    return is_text(kind) or (pa.types.is_list(kind) and is_text(kind.value_type))

  label, caption = pick("label", is_label, "ClassLabel"), pick("caption", is_caption)
  for key, column, fits in (("label", label, is_label), ("caption", caption, is_caption)):
    if column and not fits(kind := schema.field(column).type):
      raise UserError(f"{name}: the column '{column}' has no {key}s but {kind}: name another by '#{key}='")
  content = f"{image}.bytes" if pa.types.is_struct(schema.field(image).type) else image
  return _Columns(image, label, caption, content, tuple((features.get(label) or {}).get("names") or ()))


# The index of a file


def _open(path: str) -> Any:
  """Opens a file.

  Raises:
    UserError: if pyarrow is not installed, or the file is damaged.
  """
  try:
    import pyarrow as pa
    import pyarrow.parquet
  except ImportError as error:
    raise UserError(f"'{path}' needs pyarrow ({error}): pip install 'maskgen[parquet]'") from None
  file = pa.PythonFile(tf.io.gfile.GFile(path, "rb"), "r") if "://" in path else path
  try:
    return pyarrow.parquet.ParquetFile(file)
  except (pa.ArrowException, OSError) as error:
    if isinstance(error, OSError) and error.errno is not None:
      raise
    raise UserError(
      f"'{path}' is not a Parquet file, or is damaged or truncated ({_line(error)}): copy it again"
    ) from error


def _scan(path: str, columns: _Columns) -> Arrays:
  """Reads the sizes of row groups, and labels and captions.

  Returns:
    "group", "bytes" int64 [g], the rows of each row group and what its pictures take;
    "label" int64 [n], -1 for none, and "text" bytes [n], of labels that are texts;
    "caption" bool [n], whether there is one;
    "footer" bytes [1], a hash of the file's own index.
  """
  import pyarrow as pa

  file = _open(path)
  wanted = [column for column in (columns.image, columns.label, columns.caption) if column]
  if missing := [column for column in wanted if column not in file.schema_arrow.names]:
    raise UserError(f"'{path}' has no column '{missing[0]}', which other files have: name files of one kind")
  try:
    values = {column: file.read(columns=[column]).column(column).to_pylist() for column in wanted[1:]}
  except (pa.ArrowException, OSError) as error:
    raise UserError(f"'{path}' has damaged labels or captions ({_line(error)}): copy it again") from error
  metadata = file.metadata
  rows = metadata.num_rows
  label, text = np.full(rows, -1, np.int64), np.zeros(rows, "S1")
  if columns.label:
    found = values[columns.label]
    if any(isinstance(value, str) for value in found):
      text = np.array([(value or "").encode() for value in found], np.bytes_)
    else:
      label = np.array([-1 if value is None else value for value in found], np.int64)
  caption = np.zeros(rows, bool)
  if columns.caption:
    caption = np.array([bool(_captions(value)) for value in values[columns.caption]], bool)
  groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
  chunks = [[group.column(place) for place in range(group.num_columns)] for group in groups]
  sizes = [
    sum(c.total_uncompressed_size for c in row if c.path_in_schema == columns.content) for row in chunks
  ]
  described = json.dumps(metadata.to_dict(), sort_keys=True, default=str)
  return {
    "group": np.array([group.num_rows for group in groups], np.int64),
    "bytes": np.array(sizes, np.int64),
    "label": label,
    "text": text,
    "caption": caption,
    "footer": np.array([hashlib.blake2b(described.encode(), digest_size=16).hexdigest()], np.bytes_),
  }


def _labels(
  name: str, columns: _Columns, index: list[Arrays]
) -> tuple[tuple[str, ...] | None, list[np.ndarray]]:
  """The names of all classes, and the label of each record by file, -1 for none."""
  texts = np.unique(np.concatenate([np.unique(shard["text"]) for shard in index]))
  if texts.any():
    names = in_order(text.decode() for text in texts if text)
    number = {text.encode(): place for place, text in enumerate(names)}
    return tuple(names), [np.array([number.get(t, -1) for t in shard["text"]], np.int64) for shard in index]
  largest = max(int(shard["label"].max(initial=-1)) for shard in index)
  if largest > _MAX_LABEL or (columns.classes and largest >= len(columns.classes)):
    known = (
      f"it names {len(columns.classes)} classes" if columns.classes else "labels are small numbers from 0"
    )
    raise UserError(f"{name} has the label {largest}, but {known}: name another column by '#label='")
  names_of = columns.classes or tuple(map(str, range(largest + 1)))
  return (names_of if largest >= 0 else None), [shard["label"] for shard in index]


def _captions(value: Any) -> list[str]:
  """The captions of a record, one text or several, without line breaks and blank ones."""
  texts = [value] if isinstance(value, str) else value or []
  return [words for text in texts if text and (words := " ".join(text.split()))]


def _warn(name: str, index: list[Arrays]) -> None:
  """Says so if reading will be slow: a record costs its row group, unless all stay in memory."""
  largest = max(int(shard["bytes"].max(initial=0)) for shard in index)
  total = sum(int(shard["bytes"].sum()) for shard in index)
  if total > _CACHE_BYTES and largest > 2**23:
    say(
      f"{name} has row groups of up to {largest / 1e6:,.0f} MB, and each record in random order costs one: "
      "write the files with fewer rows in a group (row_group_size), or unpack them into tar archives"
    )


# Reading


# A graph even in eager execution, so that errors are always `tf.errors`.
@functools.partial(tf.function, autograph=False)
def _call(read: Callable[[np.ndarray], np.ndarray], number: tf.Tensor) -> tf.Tensor:
  return tf.numpy_function(read, [number], tf.string, stateful=False)


class _Groups:
  """Values of records, by row groups, of which those that were used last stay in memory. Thread-safe."""

  def __init__(self, paths: list[str], ends: list[np.ndarray]):
    """Takes the files, and for each the numbers of its rows up to the end of each group, int64 [g]."""
    self._paths, self._ends = paths, ends
    self._kept: collections.OrderedDict[tuple[int, int, str], Any] = collections.OrderedDict()
    self._bytes = 0
    self._lock = threading.Lock()
    self._reading: dict[tuple[int, int, str], threading.Lock] = {}

  def read(self, file: int, row: int, column: str) -> Any:
    """The value of a column in a row.

    Raises:
      ValueError: if the group is damaged.
      OSError: if it cannot be read, perhaps temporarily.
    """
    group = int(np.searchsorted(self._ends[file], row, side="right"))
    values = self._group((file, group, column))
    return values[row - int(self._ends[file][group]) + len(values)].as_py()

  def _group(self, key: tuple[int, int, str]) -> Any:
    with self._lock:
      if key in self._kept:
        self._kept.move_to_end(key)
        return self._kept[key]
      reading = self._reading.setdefault(key, threading.Lock())
    with reading:  # several threads that need one group read it once
      with self._lock:
        if key in self._kept:
          return self._kept[key]
      values = self._read(*key)
      with self._lock:
        self._kept[key] = values
        self._bytes += values.nbytes
        self._reading.pop(key, None)
        while self._bytes > _CACHE_BYTES and len(self._kept) > 1:
          self._bytes -= self._kept.popitem(last=False)[1].nbytes
    return values

  def _read(self, file: int, group: int, column: str) -> Any:
    import pyarrow as pa

    path = self._paths[file]
    try:
      values = _open(path).read_row_group(group, columns=[column]).column(column.partition(".")[0])
      return values.combine_chunks().field("bytes") if "." in column else values
    except (pa.ArrowException, OSError) as error:
      if isinstance(error, OSError) and error.errno is not None:
        raise
      raise ValueError(f"row group {group} of '{path}' is damaged: {_line(error)}") from error


def _line(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0]
