"""Data sources: `digits`, `folder:`, `parquet:`, `tar:`, `tfds:`, `tokens:` and the others of this folder.

A source provides random access: the record of an index does not depend on what was fetched before. The
pipeline handles everything else (order, epochs, resuming, rows of each process, damaged records).

To add a source, write a module with a function of `argument` and `split` that returns a `Source`, or raises
`UserError` if either does not exist, and decorate it with `@source("name:what")`, or `@source("name")` if it
takes no argument. A config refers to it by its module, as in
`config.data.source='my_package.my_source:argument'`, or by `name` if the module is already imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from maskgen import plugins
from maskgen.data.cpu_tf import missing, tf
from maskgen.errors import UserError, nearest

Rows: TypeAlias = "Callable[[np.ndarray], dict[str, np.ndarray]]"


def _record_number(index: int) -> str:
  return f"record {index}"


@dataclasses.dataclass(frozen=True)
class Codes:
  """The origin of cached codes.

  Attributes:
    tokenizer: the fingerprint of the tokenizer's parameters.
    image_shape: (h, w, c) of the images.
  """

  tokenizer: str
  image_shape: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Source:
  """One split of a data set.

  Attributes:
    name: the name used in error messages.
    size: the number of records.
    class_names: the name of each label, or None if the records have no labels.
    fetch: a TensorFlow-traceable function from an int64 scalar in [0, size) to a record, a dict with
      "image": a scalar string (an encoded picture) or uint8 [h, w, c], c static;
      "label": int64 scalar, if there are labels;
      "caption": strings [k], if there are captions, at least one for each record;
      "tokens": for a token cache, codes instead of an image, any integer type [crops, n].
    fingerprint: a text that changes with the records, so that a resumed run detects it.
    rows: for records that are arrays, also a function from indices, int64 [b], to the same records in NumPy,
      each entry [b, ...], captions as an object array [b] of tuples of str; such records are read without
      TensorFlow if the preprocessing permits.
    labels: all labels, int64 [size], if they are in memory.
    describe: returns the name of a record for messages, such as its file path.
    codes: the origin of the codes, for a token cache.
    lacks: why records have no "label" or "caption" although some could, by these keys: the problem and the
      remedy, for errors where they are needed.
  """

  name: str
  size: int
  class_names: tuple[str, ...] | None
  fetch: Callable[[tf.Tensor], dict[str, tf.Tensor]]
  fingerprint: str
  describe: Callable[[int], str] = _record_number
  codes: Codes | None = None
  lacks: Mapping[str, str] = dataclasses.field(default_factory=dict)
  rows: Rows | None = None
  labels: np.ndarray | None = None


Open = Callable[[str, str], Source]

# By name and by module.
SOURCES: dict[str, tuple[str, Open]] = {}


def source(usage: str) -> Callable[[Open], Open]:
  """Registers a function that opens sources written like `usage`."""

  def register(function: Open) -> Open:
    SOURCES[usage.partition(":")[0]] = SOURCES[function.__module__] = (usage, function)
    return function

  return register


def open_source(name: str, split: str) -> Source:
  """Opens one split of a source such as "digits" or "folder:/path".

  Raises:
    UserError: if the source or the split is unknown, malformed or empty.
  """
  prefix, _, argument = name.partition(":")
  if prefix not in SOURCES:
    try:
      module = plugins.find_module(prefix, __name__, "data source")
    except ModuleNotFoundError as error:
      if not (error.name or "").startswith("tensorflow"):
        raise
      raise missing(error) from error
    if module.__name__ not in SOURCES:
      raise UserError(f"data source '{prefix}' is {module.__file__}, which has no @source function: add one")
    prefix = module.__name__
  usage, function = SOURCES[prefix]
  _, colon, what = usage.partition(":")
  if bool(argument) != bool(colon):
    raise UserError(f"data source '{name}' is malformed: write it as '{name.partition(':')[0]}{colon}{what}'")
  opened = function(argument, split)
  if not opened.size:
    raise UserError(f"split '{split}' of data source '{name}' is empty: choose another split")
  return opened


def fetch_of(rows: Rows) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
  """Makes a source's `fetch` of its `rows`."""
  sample = rows(np.zeros(1, np.int64))
  texts = {key for key, value in sample.items() if value.dtype == object}

  def read(index: np.int64) -> list[np.ndarray]:
    record = {key: value[0] for key, value in rows(np.array([index])).items()}
    return [np.array(value, object) if key in texts else value for key, value in record.items()]

  def fetch(index: tf.Tensor) -> dict[str, tf.Tensor]:
    dtypes = [tf.string if key in texts else value.dtype for key, value in sample.items()]
    shapes = [[None] if key in texts else value.shape[1:] for key, value in sample.items()]
    values = map(tf.ensure_shape, tf.numpy_function(read, [index], dtypes), shapes)
    return dict(zip(sample, values, strict=True))

  return fetch


def check_split(name: str, split: str, splits: tuple[str, ...]) -> None:
  """Checks that a source has a split.

  Raises:
    UserError: if not.
  """
  if split not in splits:
    raise UserError(f"split '{split}' of {name} is unknown{nearest(split, splits)}")
