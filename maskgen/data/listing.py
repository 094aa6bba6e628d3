"""Lists the pictures in a folder with their labels, captions and splits."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

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
)
HELD_OUT = ("test", "val", "validation", "valid", "dev")
SPLITS = ("train", *HELD_OUT)
# Other names of split folders; all are matched in any case.
_SYNONYMS = {"training": "train", "testing": "test", "eval": "val", "evaluation": "val"}


class Listing(NamedTuple):
  """The pictures of one split.

  Attributes:
    root: the folder that the names are relative to.
    names: the file names [n], with `/` between folders.
    labels: int [n], or None.
    class_names: the name of each label, or None without labels.
    captions: of each picture; "beside" if they are in text files next to the pictures; or None.
  """

  root: str
  names: list[str]
  labels: list[int] | None
  class_names: tuple[str, ...] | None
  captions: list[list[str]] | Literal["beside"] | None

  @property
  def paths(self) -> list[str]:
    return [os.path.join(self.root, name) for name in self.names]


def list_pictures(root: str, split: str) -> Listing:
  """Lists one split of the folder `root`, in an order that depends only on the names.

  `sources/folder.py` describes the layouts. If `root` has a sub-folder `train` and one of `HELD_OUT`, or
  synonyms of them in any case, these are the splits, and a held-out name that has no folder means the first
  one that has. Otherwise the tenth of the pictures whose relative names have the smallest hashes is held out.

  Raises:
    UserError: if the folder is missing, unreadable or without pictures, the split is unknown, a table is
      wrong, only some pictures have captions, or the classes differ between the splits.
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
  """Whether a file name (without folder) is that of a picture."""
  return name.lower().endswith(SUFFIXES) and not name.startswith(".")


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
  for name in sorted(_entries(root), key=lambda name: name not in SPLITS):  # exact names first
    split = _SYNONYMS.get(name.lower(), name.lower())
    if split not in SPLITS or found.get(split) == split or not _is_folder(os.path.join(root, name)):
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
  captions = _table(root, "caption")
  captions = captions.below(name, siblings) if captions else _table(folder, "caption")
  if labels := _table(root, "label"):
    return _listing(folder, labels.texts(), labels.below(name, siblings), captions)
  class_names, labels = _classes(folder)
  classes_of_train = class_names if name == train else _classes(os.path.join(root, train))[0]
  if different := set(class_names) ^ set(classes_of_train):
    raise UserError(
      f"the classes of '{train}' and '{name}' in '{root}' differ in '{min(different)}': give both splits "
      f"the same class folders, or write one labels.csv in '{root}' for both"
    )
  return _listing(folder, class_names, labels, captions)


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
    for name in _entries(root)
    if not _is_file(name) and any(not file.endswith(".txt") for file in _below(root, name, {real}))
  ), None


def _listing(
  root: str, class_names: Sequence[str], labels_table: Table | None, captions_table: Table | None
) -> Listing:
  """Lists all pictures below `root` with their labels and captions."""
  real = _real(root)
  files = [file for name in _entries(root) for file in _below(root, name, {real})]
  names = [name for name in files if not name.endswith(".txt")]
  if not names:
    raise UserError(f"folder '{root}' has no pictures: put {', '.join(SUFFIXES)} files there")
  labels: list[int] | None = None
  captions: list[list[str]] | Literal["beside"] | None = None
  if class_names:
    if labels_table:
      classes = labels_table.one_for_each(names)
    else:
      classes = [name.partition("/")[0] for name in names]
      loose = [name for name in names if "/" not in name]
      if loose:
        raise UserError(f"'{loose[0]}' is next to the class folders of '{root}': move it into one")
    number = {name: label for label, name in enumerate(class_names)}
    labels = [number[name] for name in classes]
  if captions_table:
    captions = captions_table.all_for_each(names)
  elif _has_caption_files(root, names, set(files)):
    captions = "beside"
  return Listing(root, names, labels, tuple(class_names) or None, captions)


def _has_caption_files(root: str, names: Sequence[str], files: set[str]) -> bool:
  without = [name for name in names if f"{os.path.splitext(name)[0]}.txt" not in files]
  if 0 < len(without) < len(names):
    raise UserError(
      f"{len(without)} of the {len(names)} pictures of '{root}' have no .txt file with captions next to "
      f"them, the first being '{without[0]}': give all of them captions, or none"
    )
  return not without


def _tenth(listing: Listing, held_out: bool) -> Listing:
  """Returns the held-out tenth (at least one picture), or the rest."""
  tenth = smallest_tenth([os.fsencode(name) for name in listing.names])
  chosen = np.flatnonzero(tenth == held_out)

  def take(values):
    return [values[index] for index in chosen] if isinstance(values, list) else values

  return listing._replace(
    names=take(listing.names), labels=take(listing.labels), captions=take(listing.captions)
  )


def _below(folder: str, name: str, seen: set[str]) -> Iterator[str]:
  """Yields a picture or text file, or all those below a sub-folder that was not visited before."""
  if _is_file(name):
    yield name
    return
  path = os.path.join(folder, name)
  if not _is_folder(path) or (real := _real(path)) in seen:
    return
  seen.add(real)
  for child in _entries(path):
    for file in _below(path, child, seen):
      yield f"{name}/{file}"


def _is_file(name: str) -> bool:
  """Whether this is a picture or text file, judging by its name, as requests to remote stores are slow."""
  return is_picture(name) or name.endswith(".txt")


def _entries(folder: str) -> list[str]:
  """Returns the sorted names of files and folders that are not hidden."""
  if _remote(folder):
    names = [name.rstrip("/") for name in tf.io.gfile.listdir(folder)]
  else:
    with os.scandir(folder) as entries:
      names = [entry.name for entry in entries if not _is_special(entry)]
  return sorted(name for name in names if name and not name.startswith(".") and name != "__MACOSX")


def _is_special(entry: os.DirEntry[str]) -> bool:
  """Whether it is neither file nor folder, such as a named pipe, whose reader may wait forever."""
  if entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False):
    return False
  return os.path.exists(entry) and not os.path.isfile(entry) and not os.path.isdir(entry)


def _is_folder(path: str) -> bool:
  return tf.io.gfile.isdir(path) if _remote(path) else os.path.isdir(path)


def _real(path: str) -> str:
  return path if _remote(path) else os.path.realpath(path)


def _remote(path: str) -> bool:
  return "://" in path
