"""Lists the pictures in a folder with their labels, captions and splits."""

import collections
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from maskgen import images
from maskgen.data.cpu_tf import tf
from maskgen.data.sources import check_split
from maskgen.data.tables import Table, in_order, read_table
from maskgen.errors import UserError

SUFFIXES = (
  ".jpg",
  ".jpeg",
  ".jfif",
  ".png",
  ".bmp",
  ".gif",
  ".webp",
  ".tif",
  ".tiff",
  ".avif",
  ".ppm",
  ".pgm",
  *(images.HEIF_SUFFIXES if images.HAS_HEIF else ()),
)
HELD_OUT = ("test", "val", "validation", "valid", "dev")
SPLITS = ("train", *HELD_OUT)
# Other names of split folders; all are matched in any case.
_SYNONYMS = {"training": "train", "testing": "test", "eval": "val", "evaluation": "val"}
# Folders of operating systems and storage devices, in any case: thumbnails, deleted files, snapshots.
_SYSTEM_FOLDERS = {
  *("__macosx", "$recycle.bin", "recycler", "system volume information", "lost+found", "__pycache__"),
  *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
}
_MOST_EXTENSIONS, _MOST_NAMES = 8, 3

log = logging.getLogger("maskgen")


class Listing(NamedTuple):
  """The pictures of one split.

  Attributes:
    root: the folder that the names are relative to.
    names: the file names [n], with `/` between folders.
    labels: int [n], or None.
    class_names: the name of each label, or None without labels.
    captions: of each picture; "beside" if they are in text files next to the pictures; or None.
    lacks: why there are no labels or captions although some pictures have them, by "label" and "caption".
  """

  root: str
  names: list[str]
  labels: list[int] | None
  class_names: tuple[str, ...] | None
  captions: list[list[str]] | Literal["beside"] | None
  lacks: dict[str, str]

  @property
  def paths(self) -> list[str]:
    return [os.path.join(self.root, name) for name in self.names]


def list_pictures(root: str, split: str) -> Listing:
  """Lists one split of the folder `root`, in an order that depends only on the names.

  `sources/folder.py` describes the layouts. If `root` has a sub-folder `train` and one of `HELD_OUT`, or
  synonyms of them in any case, these are the splits, and a held-out name that has no folder means the first
  one that has. Otherwise the tenth of the pictures whose relative names have the smallest hashes is held out.
  Logs which files are ignored.

  Raises:
    UserError: if the folder is missing, unreadable or without pictures, the split is unknown, or a table is
      wrong.
  """
  check_split(f"folder '{root}'", split, SPLITS)
  if not _is_folder(root):
    raise UserError(f"'{root}' is not a folder: give the path of a folder of pictures")
  try:
    folders = _split_folders(root)
    if "train" in folders and len(folders) > 1:
      return _list_folder_of_split(root, folders, split)
    class_names, labels = _classes(root)
    if "train" in folders and labels is None:
      train = os.path.join(root, folders["train"])
      if _classes(train)[0]:
        raise UserError(
          f"'{root}' has a folder '{folders['train']}' with its own classes, but no other split: name the "
          f"other one of {', '.join(HELD_OUT)}, or give '{train}'"
        )
    return _tenth(_listing(root, class_names, labels, _table(root, "caption")), split != "train")
  except OSError as error:
    raise UserError(
      f"folder '{error.filename}' cannot be read ({error.strerror}): check its permissions"
    ) from error
  except tf.errors.OpError as error:
    raise UserError(f"folder '{root}' cannot be read: {error.message or type(error).__name__}") from error


def is_picture(name: str) -> bool:
  """Whether a file name is that of a picture."""
  return name.lower().endswith(SUFFIXES)


def is_hidden(name: str) -> bool:
  """Whether a file or folder of this name (without its folder) is not one of a user."""
  return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


@functools.cache  # each split of a data set, and each use of it, lists the same files
def say(message: str) -> None:
  """Logs a message, unless this process has already logged it."""
  log.info("%s", message)


def say_ignored(where: str, extensions: Mapping[str, int]) -> None:
  """Logs the numbers of ignored files by extension, such as ".heic", if there are any."""
  counts = sorted(extensions.items(), key=lambda item: (-item[1], item[0]))
  parts = [f"{count:,} {extension or 'without an extension'}" for extension, count in counts]
  if len(parts) > _MOST_EXTENSIONS:
    rest = sum(count for _, count in counts[_MOST_EXTENSIONS:])
    parts[_MOST_EXTENSIONS:] = [f"{rest:,} of other extensions"]
  unread = {*extensions} & {*images.HEIF_SUFFIXES} - {*SUFFIXES}
  hint = f" (to read {min(unread)}: pip install -e '.[heif]')" if unread else ""
  if parts:
    say(f"{where}: ignored files that are no pictures, {', '.join(parts)}{hint}")


def only_some(name: str, key: str, given: np.ndarray, describe: Callable[[int], str]) -> str:
  """Says that only some records have a label (or a caption), given a mask [n]; "" if all or none have."""
  if given.all() or not given.any():
    return ""
  reason = (
    f"{np.count_nonzero(~given):,} of the {len(given):,} records of {name} have no {key}, the first being "
    f"{describe(int(np.argmin(given)))}: give one to all of them"
  )
  say(f"{key}s cannot be used: {reason}")
  return reason


def smallest_tenth(names: Sequence[bytes]) -> np.ndarray:
  """Returns a mask, bool [n], that selects the tenth of the names (at least one) with the smallest hashes."""
  hashes = [hashlib.blake2b(name).digest() for name in names]
  mask = np.zeros(len(names), bool)
  mask[sorted(range(len(names)), key=hashes.__getitem__)[: -(-len(names) // 10)]] = True
  return mask


def _split_folders(root: str) -> dict[str, str]:
  """Returns the folder of each split that has one, by the names in `SPLITS` and in their order.

  Raises:
    UserError: if several folders are the same split, and none has exactly its name.
  """
  found: dict[str, str] = {}
  names = (name for name, is_folder in _entries(root) if is_folder)
  for name in sorted(names, key=lambda name: name not in SPLITS):  # exact names first
    split = _SYNONYMS.get(name.lower(), name.lower())
    if split not in SPLITS or found.get(split) == split:
      continue
    if split in found:
      raise UserError(
        f"'{root}' has the folders '{found[split]}' and '{name}' for the same split: rename or remove one"
      )
    found[split] = name
  return {split: found[split] for split in SPLITS if split in found}


def _list_folder_of_split(root: str, folders: Mapping[str, str], split: str) -> Listing:
  """Lists a split; tables are either in `root` (and cover all splits) or in the split's folder."""
  train, *held_out = siblings = list(folders.values())
  name = folders.get(split, held_out[0])
  folder = os.path.join(root, name)
  beside = [f"'{other}'" for other, _ in _entries(root) if other not in (*siblings, *_TABLES)]
  if beside:
    more = f" and {len(beside) - _MOST_NAMES} others" if len(beside) > _MOST_NAMES else ""
    say(f"folder '{root}': ignored {', '.join(beside[:_MOST_NAMES])}{more} beside {', '.join(siblings)}")
  captions = _table(root, "caption")
  captions = captions.below(name, siblings) if captions else _table(folder, "caption")
  if labels := _table(root, "label"):
    return _listing(folder, labels.texts(), labels.below(name, siblings), captions)
  class_names, labels = _classes(folder)
  classes_of_train = class_names if name == train else _classes(os.path.join(root, train))[0]
  lacks = {}
  if different := set(class_names) ^ set(classes_of_train):
    class_names, labels = [], None
    lacks["label"] = (
      f"the classes of '{train}' and '{name}' in '{root}' differ in '{min(different)}': give both splits "
      f"the same class folders, or write one labels.csv in '{root}' for both"
    )
  return _listing(folder, class_names, labels, captions, lacks)


_TABLES = ("labels.csv", "captions.csv")


def _table(folder: str, column: str) -> Table | None:
  path = os.path.join(folder, f"{column}s.csv")
  return read_table(path, column) if tf.io.gfile.exists(os.fsencode(path)) else None


def _classes(root: str) -> tuple[list[str], Table | None]:
  """Returns the class names, and the table of labels if there is one."""
  if table := _table(root, "label"):
    return table.texts(), table
  real = _real(root)
  return in_order(
    name
    for name, is_folder in _entries(root)
    if is_folder and any(map(is_picture, _files(os.path.join(root, name), {real})))
  ), None


def _listing(
  root: str,
  class_names: Sequence[str],
  labels_table: Table | None,
  captions_table: Table | None,
  lacks: Mapping[str, str] | None = None,
) -> Listing:
  """Lists all pictures below `root` with their labels and captions; `lacks` is the one so far."""
  files, lacks = list(_files(root, set())), dict(lacks or {})
  names = [name for name in files if is_picture(name)]
  others = {name for name in files if not is_picture(name)} - set(_TABLES)
  labels: list[int] | None = None
  if labels_table:
    classes = labels_table.one_for_each(names)
  else:
    classes = [name.partition("/")[0] for name in names]
    loose = [name for name in names if "/" not in name]
    if class_names and loose:
      class_names = []
      lacks["label"] = (
        f"'{loose[0]}' is next to the folders of '{root}', which are therefore no classes: move it into one"
      )
  if class_names:
    number = {name: label for label, name in enumerate(class_names)}
    labels = [number[name] for name in classes]
  captions: list[list[str]] | Literal["beside"] | None
  if captions_table:
    captions = captions_table.some_for_each(names)
    without = [name for name, texts in zip(names, captions, strict=True) if not texts]
  else:
    beside = {name: f"{os.path.splitext(name)[0]}.txt" for name in names}
    without = [name for name in names if beside[name] not in others]
    captions = "beside"
    if not without:
      others -= set(beside.values())
  if without:
    captions = None
  if 0 < len(without) < len(names):
    first = ", ".join(f"'{name}'" for name in without[:_MOST_NAMES])
    lacks["caption"] = (
      f"{len(without):,} of the {len(names):,} pictures of '{root}' have no caption, the first being "
      f"{first}: write captions for them, or move them elsewhere"
    )
  extensions = collections.Counter(os.path.splitext(name)[1].lower() for name in others)
  say_ignored(f"folder '{root}'", extensions)
  for key, reason in lacks.items():
    say(f"{key}s cannot be used: {reason}")
  if not names:
    raise UserError(f"folder '{root}' has no pictures: put {', '.join(SUFFIXES)} files there")
  return Listing(root, names, labels, tuple(class_names) or None, captions, lacks)


def _tenth(listing: Listing, held_out: bool) -> Listing:
  """Returns the held-out tenth (at least one picture), or the rest."""
  tenth = smallest_tenth([os.fsencode(name) for name in listing.names])
  chosen = np.flatnonzero(tenth == held_out)

  def take(values):
    return [values[index] for index in chosen] if isinstance(values, list) else values

  return listing._replace(
    names=take(listing.names), labels=take(listing.labels), captions=take(listing.captions)
  )


def _files(folder: str, seen: set[str]) -> Iterator[str]:
  """Yields the names of all files in a folder and below, but none of a folder in `seen`, which grows."""
  if (real := _real(folder)) in seen:
    return
  seen.add(real)
  for name, is_folder in _entries(folder):
    if is_folder:
      yield from (f"{name}/{file}" for file in _files(os.path.join(folder, name), seen))
    else:
      yield name


def _entries(folder: str) -> list[tuple[str, bool]]:
  """Returns the sorted names of files and folders, and whether each is a folder."""
  if _remote(folder):
    found = {}
    for name in filter(None, tf.io.gfile.listdir(folder)):
      plain = name.rstrip("/")
      # Files are told by their names where possible: requests to stores are slow.
      is_file = is_picture(name) or name.endswith(".txt") or is_hidden(plain)
      found[plain] = name != plain or (not is_file and _is_folder(os.path.join(folder, name)))
  else:
    with os.scandir(folder) as entries:
      kinds = {entry.name: _kind(entry) for entry in entries}
    found = {name: kind == "folder" for name, kind in kinds.items() if kind}
  return sorted((name, is_folder) for name, is_folder in found.items() if not is_hidden(name))


def _kind(entry: os.DirEntry[str]) -> str:
  """Returns "file", "folder", or "" for neither, such as a named pipe, whose reader may wait forever."""
  if entry.is_symlink():
    if os.path.isdir(entry):
      return "folder"
    return "file" if os.path.isfile(entry) or not os.path.exists(entry) else ""
  if entry.is_dir(follow_symlinks=False):
    return "folder"
  return "file" if entry.is_file(follow_symlinks=False) else ""


def _is_folder(path: str) -> bool:
  return tf.io.gfile.isdir(path) if _remote(path) else os.path.isdir(path)


def _real(path: str) -> str:
  return path if _remote(path) else os.path.realpath(path)


def _remote(path: str) -> bool:
  return "://" in path
