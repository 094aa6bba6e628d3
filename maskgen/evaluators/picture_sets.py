"""Pictures to evaluate: folders, and npz files in the layout of ADM's evaluator."""

import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import hashlib
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from maskgen import files
from maskgen.data.listing import SUFFIXES, is_hidden, is_picture
from maskgen.errors import UserError

IMAGES, LABELS = "arr_0", "arr_1"
# What reading or decompressing a damaged member of an npz file raises.
_DAMAGE = (ValueError, EOFError, OSError, NotImplementedError, zipfile.BadZipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class PictureSet:
  """Pictures of one size.

  Attributes:
    name: of the folder or file, for messages.
    names: of each picture, sorted; the order of the pictures.
    shape: (height, width).
    read: (batch size) -> batches uint8 [b, h, w, 3] in order; the last one may be smaller.
    formats: the number of files by format, such as "100 PNG".
    digest: () -> the hash of all bytes.
    labels: the class of each picture, int [n], if `labels.csv` in the folder or `arr_1` of the npz file says.
  """

  name: str
  names: tuple[str, ...]
  shape: tuple[int, int]
  read: Callable[[int], Iterator[np.ndarray]]
  formats: str = ""
  digest: Callable[[], str] = str
  labels: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.names)

  def facts(self) -> dict[str, Any]:
    """Formats, classes and hash, for receipts."""
    classes = None
    if self.labels is not None:
      counts = np.unique(self.labels, return_counts=True)[1]
      classes = {"number": len(counts), "fewest": int(counts.min()), "most": int(counts.max())}
    return {"formats": self.formats, "classes": classes, "sha256": self.digest()}


def made_by(path: str) -> dict[str, Any] | None:
  """The manifest of a folder or an npz file that maskgen.tools.generate wrote; None for other programs'.

  Raises:
    UserError: if it is damaged.
  """
  root = pathlib.Path(path)
  file = (root if root.is_dir() else root.parent) / files.MANIFEST
  if not file.is_file() or not (root.is_dir() or root.name == "samples.npz"):
    return None
  found = files.read_json(epath.Path(file), "generate the pictures again")
  return found if {"sampling", "labels", "captions", "count"} <= found.keys() else None


def check_labels(labels: str, pictures: PictureSet, manifest: Mapping[str, Any] | None) -> None:
  """Checks that generated pictures are labelled as is said, and that all of them are there.

  Args:
    labels: one of `comparison.LABELS`.
    pictures: the pictures.
    manifest: see `made_by`.

  Raises:
    UserError: if not.
  """
  if labels == "balanced" and pictures.labels is not None:
    counts = np.unique(pictures.labels, return_counts=True)[1]
    if np.ptp(counts) > 1:
      raise UserError(
        f"--labels=balanced, but {pictures.name} has {counts.min():,} pictures of one class and "
        f"{counts.max():,} of another: give --labels=random, or as many of each"
      )
  if manifest is None:
    return
  if manifest["count"] != len(pictures):
    raise UserError(
      f"{pictures.name} has {len(pictures):,} of the {manifest['count']:,} pictures of its {files.MANIFEST}: "
      "generate the others, too"
    )
  known = "captions" if manifest["captions"] else (manifest["labels"] or {"rule": "unconditional"})["rule"]
  if labels not in ("unstated", known):
    raise UserError(f"--labels={labels}, but {pictures.name} was made with '{known}' labels: give that")


def open_pictures(path: str) -> PictureSet:
  """Opens a local folder, with its sub-folders, or an npz file with the array `arr_0` uint8 [n, h, w, 3].

  Files are read as published tools read them: as RGB, whatever their orientation and transparency. Hidden
  files and folders are ignored.

  Raises:
    UserError: if there are no pictures, one is damaged or of another size, or the npz file has no such array.
      Damage that does not show in the first bytes of a file is found by `read`.
  """
  root = pathlib.Path(path)
  if root.is_dir():
    return _open_folder(path, root)
  if not root.exists():
    raise UserError(f"'{path}' does not exist: give a folder of pictures, or an npz file")
  if not path.endswith(".npz"):
    raise UserError(f"'{path}' is neither a folder nor an npz file: give one of them")
  return _open_npz(path, root)


def has_pictures(path: str) -> bool:
  """Whether an npz file has the array of pictures."""
  with _npz_damage(path), epath.Path(path).open("rb") as file:
    return f"{IMAGES}.npy" in zipfile.ZipFile(file).namelist()


def _open_folder(path: str, root: pathlib.Path) -> PictureSet:
  found = (file.relative_to(root) for file in root.rglob("*") if is_picture(file.name) and file.is_file())
  names = sorted(file.as_posix() for file in found if not any(map(is_hidden, file.parts)))
  if not names:
    raise UserError(f"folder '{path}' has no pictures: put {', '.join(SUFFIXES)} files there")

  def header(name: str) -> tuple[str, tuple[int, int]]:
    with _damage(root / name), (root / name).open("rb") as file, Image.open(file) as picture:
      return str(picture.format), (picture.height, picture.width)

  def pixels(name: str) -> np.ndarray:
    with _damage(root / name), (root / name).open("rb") as file, Image.open(file) as picture:
      return np.asarray(picture.convert("RGB"))

  def read(batch_size: int) -> Iterator[np.ndarray]:
    with concurrent.futures.ThreadPoolExecutor() as pool:
      for start in range(0, len(names), batch_size):
        yield np.stack(list(pool.map(pixels, names[start : start + batch_size])))

  def digest() -> str:
    found = hashlib.sha256()
    with concurrent.futures.ThreadPoolExecutor() as pool:
      for name, one in zip(names, pool.map(lambda name: _sha256(root / name), names), strict=True):
        found.update(f"{name} {one}\n".encode())
    return found.hexdigest()

  with concurrent.futures.ThreadPoolExecutor() as pool:
    formats, shapes = zip(*pool.map(header, names), strict=True)
  for name, shape in zip(names, shapes, strict=True):
    if shape != shapes[0]:
      raise UserError(
        f"{root / name} has {_size(shape)} pixels, but {root / names[0]} has {_size(shapes[0])}: give "
        "pictures of one size"
      )
  counts = ", ".join(f"{count} {kind}" for kind, count in sorted(collections.Counter(formats).items()))
  return PictureSet(path, tuple(names), shapes[0], read, counts, digest, _labels_of(root, names))


def _labels_of(root: pathlib.Path, names: Sequence[str]) -> np.ndarray | None:
  """What `labels.csv` of maskgen.tools.generate says; None if it is not about just these pictures."""
  if not (root / "labels.csv").is_file():
    return None
  rows = csv.DictReader((root / "labels.csv").read_text(errors="replace").splitlines())
  found = {row.get("file"): row.get("label") or "" for row in rows}
  if found.keys() != {*names} or not all(label.isdecimal() for label in found.values()):
    return None
  return np.array([int(found[name]) for name in names])


def _sha256(file: pathlib.Path) -> str:
  with file.open("rb") as opened:
    return hashlib.file_digest(opened, "sha256").hexdigest()


@contextlib.contextmanager
def _damage(file: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except Exception as error:  # Pillow's plugins raise many kinds.
    raise UserError(f"{file} cannot be read as a picture ({error}): replace or remove it") from error


def _open_npz(path: str, root: pathlib.Path) -> PictureSet:
  with _npz_damage(path), root.open("rb") as file, zipfile.ZipFile(file) as archive:
    members = [name.removesuffix(".npy") for name in archive.namelist()]
    if IMAGES not in members:
      raise UserError(
        f"{path} has no array '{IMAGES}' (it has {', '.join(members)}): save images uint8 [n, h, w, 3] as it"
      )
    with archive.open(f"{IMAGES}.npy") as member:
      shape, fortran, dtype = _read_header(member)
  if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran or not all(shape):
    raise UserError(f"{path}: '{IMAGES}' is {dtype}{list(shape)}: save images uint8 [n, h, w, 3], in C order")
  count, height, width, _ = shape

  def read(batch_size: int) -> Iterator[np.ndarray]:
    """Reads the array in pieces, as it may not fit in memory."""
    with (
      _npz_damage(path),
      root.open("rb") as file,
      zipfile.ZipFile(file) as archive,
      archive.open(f"{IMAGES}.npy") as member,
    ):
      _read_header(member)
      for start in range(0, count, batch_size):
        rows = min(batch_size, count - start)
        data = member.read(rows * height * width * 3)
        yield np.frombuffer(data, np.uint8).reshape(rows, height, width, 3)

  names = tuple(f"{IMAGES}[{i}]" for i in range(count))
  labels = _read_labels(path, count) if LABELS in members else None
  return PictureSet(path, names, (height, width), read, "1 npz", lambda: _sha256(root), labels)


def _read_labels(path: str, count: int) -> np.ndarray | None:
  """ADM's array of classes; None if it is anything else."""
  with _npz_damage(path), np.load(path, allow_pickle=False) as archive:
    labels = archive[LABELS]
  return labels if labels.shape == (count,) and np.issubdtype(labels.dtype, np.integer) else None


@contextlib.contextmanager
def _npz_damage(path: str) -> Iterator[None]:
  try:
    yield
  except UserError:
    raise
  except _DAMAGE as error:
    raise UserError(f"{path} is not an intact npz file ({error}): create or download it again") from error


def _read_header(member) -> tuple[tuple[int, ...], bool, np.dtype]:
  version = np.lib.format.read_magic(member)
  read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
  return read(member)


def _size(shape: tuple[int, int]) -> str:
  return f"{shape[1]} x {shape[0]}"
