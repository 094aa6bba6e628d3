"""Token caches: codes of several crops of every record of a data set, on disk.

A cache is a folder with `manifest.json` and, for each shard of records, `labels_NNNNN.npy` (int32 [records],
where there are labels) and `codes_NNNNN.npy` ([records, crops, tokens], in the smallest unsigned type),
which is written last: a shard that has it is complete.
"""

import dataclasses
import io
import json
from typing import Any

import numpy as np
from etils import epath

from maskgen import files
from maskgen.errors import UserError

_MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """What a cache holds, and what it was made of.

  Attributes:
    tokenizer: the fingerprint of the tokenizer's parameters.
    image_shape: (h, w, c) of the crops.
    codebook_size: codes are smaller than this.
    tokens: codes per crop.
    crops: crops per record.
    source, split, fingerprint: the records.
    preprocess, seed: crop k of a record is what training makes of it when it is drawn for the k-th time.
    records: how many there are.
    class_names: the name of each label, or None.
    shard_records: records per shard; the last one may have fewer.
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

  @property
  def dtype(self) -> np.dtype:
    """Of the codes."""
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
    """Begins a cache, or continues one that was begun with the same manifest.

    Raises:
      UserError: if the folder holds something else.
    """
    if (folder / _MANIFEST).exists():
      cache = cls.open(folder)
      for field in dataclasses.fields(Manifest):
        before, now = getattr(cache.manifest, field.name), getattr(manifest, field.name)
        if before != now:
          raise UserError(
            f"{folder} holds a cache with {field.name}={before}, not {now}: give another folder, or delete it"
          )
      return cache
    if folder.exists() and any(file.suffix != ".tmp" for file in folder.iterdir()):
      raise UserError(f"{folder} is not empty: give a new folder for the cache")
    folder.mkdir(parents=True, exist_ok=True)
    files.replace(folder / _MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=2))
    return cls(folder, manifest)

  @classmethod
  def open(cls, folder: epath.Path) -> "Cache":
    """Opens a cache, complete or not.

    Raises:
      UserError: if there is none.
    """
    try:
      values: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
      names = values["class_names"]
      values |= {"image_shape": tuple(values["image_shape"]), "class_names": names and tuple(names)}
      return cls(folder, Manifest(**values))
    except FileNotFoundError:
      raise UserError(
        f"{folder} is no token cache (it has no {_MANIFEST}): make one with maskgen.tools.tokenize"
      ) from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
      raise UserError(f"{folder / _MANIFEST} is damaged ({error}): make the cache anew") from None

  def missing(self) -> list[int]:
    """The shards that are not complete."""
    return [number for number in range(self.manifest.num_shards) if not self._file("codes", number).exists()]

  def write(self, number: int, codes: np.ndarray, labels: np.ndarray | None) -> None:
    """Writes a shard: codes int [records, crops, tokens], labels int [records]."""
    expected = (len(self.manifest.shard(number)), self.manifest.crops, self.manifest.tokens)
    assert codes.shape == expected, (codes.shape, expected)
    if labels is not None:
      files.replace(self._file("labels", number), _npy(labels.astype(np.int32)))
    files.replace(self._file("codes", number), _npy(codes.astype(self.manifest.dtype)))

  def read(self, kind: str) -> list[np.ndarray]:
    """The arrays "codes" or "labels" of all shards; those on a local disk are mapped, not read.

    Raises:
      UserError: if the cache is incomplete or damaged.
    """
    missing = self.missing()
    if missing:
      raise UserError(
        f"the token cache {self.folder} is incomplete (it lacks {len(missing)} of {self.manifest.num_shards} "
        "shards): run maskgen.tools.tokenize again with the same flags, it continues"
      )
    arrays = []
    for number in range(self.manifest.num_shards):
      file = self._file(kind, number)
      try:
        remote = "://" in str(file)
        array = np.load(io.BytesIO(file.read_bytes())) if remote else np.load(file, mmap_mode="r")
        if len(array) != len(self.manifest.shard(number)):
          raise ValueError(f"{len(array)} records instead of {len(self.manifest.shard(number))}")
      except (OSError, ValueError) as error:
        raise UserError(
          f"{file} is damaged ({error}): delete it and run maskgen.tools.tokenize again with the same flags"
        ) from None
      arrays.append(array)
    return arrays

  def _file(self, kind: str, number: int) -> epath.Path:
    return self.folder / f"{kind}_{number:05d}.npy"


def _npy(array: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  np.save(buffer, array)
  return buffer.getvalue()
