"""Finds the pictures of a data set kept as a folder, its classes and its splits."""

import hashlib
import os
from collections.abc import Iterator
from typing import NamedTuple

from maskgen.data.cpu_tf import tf
from maskgen.data.sources import Source, source
from maskgen.errors import UserError, nearest

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
_HELD_OUT = ("test", "val", "validation")


class Listing(NamedTuple):
  """Paths of pictures [n]; labels [n] and class names [k], or None without class folders."""

  paths: list[str]
  labels: list[int] | None
  class_names: tuple[str, ...] | None


def list_pictures(root: str, split: str) -> Listing:
  """Lists one split of the folder `root`, in an order that depends on the names alone.

  Sub-folders that hold pictures are classes; a folder of pictures alone has no labels. If `root`
  has a sub-folder `train` and one of `test`, `val` and `validation`, these are the splits, and a
  held-out name without a folder of its own means the first of those that has one. Otherwise the
  tenth of the pictures whose relative paths have the smallest hashes is held out.

  Raises:
    UserError: if the folder is missing, unreadable or without pictures, the split is unknown, or
      the class folders differ between the splits.
  """
  if split not in ("train", *_HELD_OUT):
    raise UserError(f"split '{split}' of folder '{root}' is unknown{nearest(split, ('train', *_HELD_OUT))}")
  if not os.path.isdir(root):
    raise UserError(f"'{root}' is not a folder: give the path of a folder of pictures")
  try:
    held_out = [name for name in _HELD_OUT if os.path.isdir(os.path.join(root, name))]
    if held_out and os.path.isdir(os.path.join(root, "train")):
      if split != "train":
        split = split if split in held_out else held_out[0]
      classes = _class_folders(os.path.join(root, "train"))
      different = set(classes) ^ set(_class_folders(os.path.join(root, split)))
      if different:
        raise UserError(
          f"the class folders of 'train' and '{split}' in '{root}' differ in "
          f"'{min(different)}': give both splits the same class folders"
        )
      return _listing(os.path.join(root, split), classes)
    return _tenth(root, _listing(root, _class_folders(root)), split != "train")
  except OSError as error:
    raise UserError(
      f"folder '{error.filename}' cannot be read ({error.strerror}): check its permissions"
    ) from error


def _is_picture(name: str) -> bool:
  return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _pictures(folder: str, seen: set[str]) -> Iterator[str]:
  """Yields the pictures below `folder`, entering no folder whose real path was seen before."""
  real = os.path.realpath(folder)
  if real in seen:
    return
  seen.add(real)
  for name in sorted(os.listdir(folder)):
    path = os.path.join(folder, name)
    if _is_picture(name):
      yield path
    elif not name.startswith(".") and os.path.isdir(path):
      yield from _pictures(path, seen)


def _class_folders(root: str) -> list[str]:
  return [
    name
    for name in sorted(os.listdir(root))
    if not name.startswith(".") and any(_pictures_of_class(root, name))
  ]


def _pictures_of_class(root: str, name: str) -> Iterator[str]:
  folder = os.path.join(root, name)
  if os.path.isdir(folder):
    yield from _pictures(folder, {os.path.realpath(root)})


def _listing(root: str, classes: list[str]) -> Listing:
  if not classes:
    paths = list(_pictures(root, set()))
    if not paths:
      raise UserError(f"folder '{root}' has no pictures: put {', '.join(SUFFIXES)} files there")
    return Listing(paths, None, None)
  loose = [name for name in sorted(os.listdir(root)) if _is_picture(name)]
  if loose:
    raise UserError(f"'{loose[0]}' lies beside the class folders of '{root}': move it into one")
  found = [list(_pictures_of_class(root, name)) for name in classes]
  paths = [path for pictures in found for path in pictures]
  labels = [label for label, pictures in enumerate(found) for _ in pictures]
  return Listing(paths, labels, tuple(classes))


def _tenth(root: str, listing: Listing, held_out: bool) -> Listing:
  """Returns the held-out tenth (at least one picture), or the rest."""
  paths, labels, class_names = listing

  def key(index: int) -> bytes:
    relative = os.path.relpath(paths[index], root).replace(os.sep, "/")
    return hashlib.blake2b(os.fsencode(relative)).digest()

  chosen = set(sorted(range(len(paths)), key=key)[: -(-len(paths) // 10)])
  indices = [index for index in range(len(paths)) if (index in chosen) == held_out]
  return Listing(
    [paths[index] for index in indices],
    None if labels is None else [labels[index] for index in indices],
    class_names,
  )


@source("folder:/path")
def open_folder(root: str, split: str) -> Source:
  """Opens a split of a folder; files are read when they are fetched."""
  paths, labels, class_names = list_pictures(os.path.expanduser(root), split)
  path_table = tf.constant([os.fsencode(path) for path in paths], tf.string)
  label_table = None if labels is None else tf.constant(labels, tf.int64)

  def fetch(index: tf.Tensor) -> dict[str, tf.Tensor]:
    record = {"image": tf.io.read_file(tf.gather(path_table, index))}
    if label_table is not None:
      record["label"] = tf.gather(label_table, index)
    return record

  names = "\n".join(os.path.relpath(path, os.path.expanduser(root)) for path in paths)
  fingerprint = hashlib.blake2b(os.fsencode(names), digest_size=16).hexdigest()
  return Source(f"folder '{root}'", len(paths), class_names, fetch, fingerprint, lambda index: paths[index])
