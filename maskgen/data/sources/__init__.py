"""Data sources: `digits`, `folder:`, `parquet:`, `tar:`, `tfds:`, `tokens:` and the others of this folder.

A source provides random access: the record of an index does not depend on what was fetched before. The
pipeline handles everything else (order, epochs, resuming, rows of each process, damaged records).

To add a source, write a module with a function of `argument` and `split` that returns a `Source`, or raises
`UserError` if either does not exist, and decorate it with `@source("name:what")`, or `@source("name")` if it
takes no argument. A config refers to it by its module, as in
`config.data.source='my_package.my_source:argument'`, or by `name` if the module is already imported.
"""

import dataclasses
from collections.abc import Callable, Mapping

from maskgen import plugins
from maskgen.data.cpu_tf import tf
from maskgen.errors import UserError, nearest


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
    module = plugins.find_module(prefix, __name__, "data source")
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


def check_split(name: str, split: str, splits: tuple[str, ...]) -> None:
  """Checks that a source has a split.

  Raises:
    UserError: if not.
  """
  if split not in splits:
    raise UserError(f"split '{split}' of {name} is unknown{nearest(split, splits)}")
