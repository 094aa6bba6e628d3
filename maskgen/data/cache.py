"""Token caches on disk: codes of several crops of each record of a data set.

A cache is a folder with `manifest.json` and, for each shard of records, `labels_NNNNN.npy` (int32 [records],
if there are labels), `manifest_NNNNN.json` (their checksums) and `codes_NNNNN.npy`
([records, crops, tokens], in the smallest unsigned type), which is written last.
"""

import concurrent.futures
import dataclasses
import io
import json
import logging
from typing import Any

import numpy as np
from etils import epath

from maskgen import files
from maskgen.errors import UserError

_REGENERATE = "regenerate the cache"
_THREADS = 16

log = logging.getLogger("maskgen")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """The contents of a cache and their origin.

  Attributes:
    tokenizer: the fingerprint of the tokenizer's parameters.
    image_shape: (h, w, c) of the crops.
    codebook_size: codes are smaller than this.
    tokens: the number of codes per crop.
    crops: the number of crops per record.
    source, split, fingerprint: identify the records.
    preprocess, seed: crop k of a record equals what training reads at its k-th draw.
    records: the number of records.
    class_names: the name of each label, or None.
    shard_records: the number of records per shard; the last shard may have fewer.
    jpeg_decoding: how JPEGs were decoded; "" if there were none, None if an older version made the cache.
  """

  tokenizer: str
  image_shape: tuple[int, int, int]
  codebook_size: int
  tokens: int
  crops: int
  source: str
  split: str
  fingerprint: str
  preprocess: str
  seed: int
  records: int
  class_names: tuple[str, ...] | None
  shard_records: int
  jpeg_decoding: str | None = None

  @property
  def dtype(self) -> np.dtype:
    """The dtype of the codes."""
    return np.min_scalar_type(self.codebook_size - 1)

  @property
  def num_shards(self) -> int:
    return -(-self.records // self.shard_records)

  def shard(self, number: int) -> range:
    """The records of a shard."""
    start = number * self.shard_records
    return range(start, min(start + self.shard_records, self.records))


class Cache:
  """A token cache in a folder."""

  def __init__(self, folder: epath.Path, manifest: Manifest):
    self.folder = folder
    self.manifest = manifest

  @classmethod
  def create(cls, folder: epath.Path, manifest: Manifest) -> "Cache":
    """Creates a cache, or opens one that was created with the same manifest.

    Raises:
      UserError: if the folder contains anything else.
    """
    if (folder / files.MANIFEST).exists():
      cache = cls.open(folder)
      for field in dataclasses.fields(Manifest):
        before, now = getattr(cache.manifest, field.name), getattr(manifest, field.name)
        if before != now and not (before is None and now == ""):
          raise UserError(
            f"{folder} has a cache with {field.name}={before}, not {now}: give another folder, or delete it"
          )
      return cache
    if folder.exists() and any(file.suffix != ".tmp" for file in folder.iterdir()):
      raise UserError(f"{folder} is not empty: give a new folder for the cache")
    folder.mkdir(parents=True, exist_ok=True)
    files.replace(folder / files.MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=2))
    return cls(folder, manifest)

  @classmethod
  def open(cls, folder: epath.Path) -> "Cache":
    """Opens a cache, complete or not.

    Raises:
      UserError: if there is none.
    """
    try:
      values = files.read_json(folder / files.MANIFEST, _REGENERATE)
      names = values["class_names"]
      values |= {"image_shape": tuple(values["image_shape"]), "class_names": names and tuple(names)}
      return cls(folder, Manifest(**values))
    except FileNotFoundError:
      raise UserError(
        f"{folder} is not a token cache (it has no {files.MANIFEST}): create one with maskgen.tools.tokenize"
      ) from None
    except (KeyError, TypeError) as error:
      raise files.damaged(folder / files.MANIFEST, error, _REGENERATE) from None

  def missing(self) -> list[int]:
    """The shards that are not complete."""
    there = {file.name for file in self.folder.iterdir()}
    kinds = ("codes", "labels") if self.manifest.class_names else ("codes",)
    return [
      number
      for number in range(self.manifest.num_shards)
      if not all(self._file(kind, number).name in there for kind in kinds)
    ]

  def write(self, number: int, codes: np.ndarray, labels: np.ndarray | None) -> None:
    """Writes a shard: codes int [records, crops, tokens], labels int [records]."""
    expected = (len(self.manifest.shard(number)), self.manifest.crops, self.manifest.tokens)
    assert codes.shape == expected, (codes.shape, expected)
    contents = {} if labels is None else {self._file("labels", number): _npy(labels.astype(np.int32))}
    contents[self._file("codes", number)] = _npy(codes.astype(self.manifest.dtype))
    digests = files.make_manifest({file.name: data for file, data in contents.items()})
    for file, data in ({self._digests(number): digests.encode()} | contents).items():
      files.replace(file, data)

  def read(self, kind: str) -> list[np.ndarray]:
    """Returns the arrays "codes" or "labels" of all shards; files on a local disk are memory-mapped.

    Raises:
      UserError: if the cache is incomplete or damaged.
    """
    missing = self.missing()
    if missing:
      raise UserError(
        f"the token cache {self.folder} is incomplete ({len(missing)} of {self.manifest.num_shards} shards "
        "are missing): run maskgen.tools.tokenize again with the same flags to continue"
      )
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as executor:
      read = list(executor.map(lambda number: self._read(kind, number), range(self.manifest.num_shards)))
    unchecked = sum(not checked for _, checked in read)
    if kind == "codes" and unchecked:
      log.warning(
        "%d of the %d shards of the token cache %s have no checksums, as an older version wrote them",
        *(unchecked, len(read), self.folder),
      )
    if kind == "codes" and self.manifest.jpeg_decoding is None:
      log.warning(
        "the token cache %s was made by an older version, which decoded JPEGs about 1 of 255 levels "
        "differently: if its pictures are JPEGs, regenerate it with maskgen.tools.tokenize",
        self.folder,
      )
    return [array for array, _ in read]

  def _read(self, kind: str, number: int) -> tuple[np.ndarray, bool]:
    """Reads the array of a shard; also returns whether there was a checksum to verify it."""
    file, records = self._file(kind, number), len(self.manifest.shard(number))
    remedy = (
      f"delete {self._file('codes', number).name} and run maskgen.tools.tokenize again with the same flags"
    )
    shape: tuple[int, ...] = (records,)
    dtype, choices = np.dtype(np.int32), len(self.manifest.class_names or ())
    if kind == "codes":
      shape += (self.manifest.crops, self.manifest.tokens)
      dtype, choices = self.manifest.dtype, self.manifest.codebook_size
    try:
      if "://" in str(file):
        data: Any = file.read_bytes()
        array = np.load(io.BytesIO(data))
      else:
        data = np.memmap(file, np.uint8, "r")
        array = np.load(file, mmap_mode="r")
      if (array.shape, array.dtype) != (shape, dtype):
        raise ValueError(f"{array.dtype}{list(array.shape)} instead of {dtype}{list(shape)}")
      checked = files.check_manifest(self._digests(number), file.name, data, remedy)
      if not checked and not 0 <= array.min() <= array.max() < choices:
        raise ValueError(f"values from {array.min()} to {array.max()} for {choices} {kind}")
    except UserError:
      raise
    except (EOFError, ValueError) as error:
      raise files.damaged(file, error, remedy) from None
    return array, checked

  def _digests(self, number: int) -> epath.Path:
    return self.folder / f"manifest_{number:05d}.json"

  def _file(self, kind: str, number: int) -> epath.Path:
    return self.folder / f"{kind}_{number:05d}.npy"


def _npy(array: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  np.save(buffer, array)
  return buffer.getvalue()
