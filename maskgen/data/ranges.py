"""Records that are byte ranges in large files, and the index files that locate them.

Local files are read by position; files in other stores, such as `gs://bucket/file`, through `tf.io.gfile`.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import logging
import os
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from maskgen.data.cpu_tf import tf
from maskgen.errors import UserError

Arrays = dict[str, np.ndarray]

# Enough threads to hide the latency of a remote store.
_THREADS = 16
_SECONDS_BETWEEN_LOGS = 10
# Fewer than the 1024 files that a process may usually have open.
_OPEN_FILES = 256
# The name of the array in an index file that identifies the indexed file.
_STAMP = "stamp"


@dataclasses.dataclass(frozen=True, eq=False)
class Ranges:
  """Byte ranges, n of them.

  Attributes:
    paths: the files.
    file: int32 [n], the index of each range's file.
    offset: int64 [n], the first byte.
    length: int64 [n], the number of bytes.
  """

  paths: Sequence[str]
  file: np.ndarray
  offset: np.ndarray
  length: np.ndarray

  @classmethod
  def of_shards(
    cls, paths: Sequence[str], offsets: Sequence[np.ndarray], lengths: Sequence[np.ndarray]
  ) -> "Ranges":
    """Joins the ranges of several files, given as one array of offsets and one of lengths per file."""
    file = np.repeat(np.arange(len(paths), dtype=np.int32), [len(offset) for offset in offsets])
    empty = np.zeros(0, np.int64)
    return cls(paths, file, np.concatenate([empty, *offsets]), np.concatenate([empty, *lengths]))

  def __len__(self) -> int:
    return len(self.offset)

  def take(self, indices: np.ndarray) -> "Ranges":
    """Returns the ranges of these indices (or of a mask, or a slice)."""
    return Ranges(self.paths, self.file[indices], self.offset[indices], self.length[indices])

  def path(self, index: int) -> str:
    """The file that contains a range."""
    return self.paths[self.file[index]]

  def read_bytes(self, index: int) -> bytes:
    """Reads one range. Thread-safe.

    Raises:
      UserError: if the file does not exist, or ends before the range does.
      OSError, tf.errors.OpError: if it cannot be read, perhaps temporarily.
    """
    path, offset, length = self.path(index), int(self.offset[index]), int(self.length[index])
    try:
      content = _read(path, offset, length)
    except (FileNotFoundError, tf.errors.NotFoundError) as error:
      raise UserError(f"'{path}' cannot be read: {_reason(error)}") from error
    if len(content) < length:
      raise UserError(
        f"'{path}' ends before byte {offset + length}, the end of a record: it is truncated, copy it again"
      )
    return content

  def read(self, index: tf.Tensor) -> tf.Tensor:
    """Reads one range, given by an int64 scalar, as a scalar string. Traceable in a `tf.data` map.

    When traced, errors of `read_bytes` become `tf.errors`, as for a damaged record.
    """

    @tf.autograph.experimental.do_not_convert
    def read(index: np.ndarray) -> np.ndarray:
      return np.array(self.read_bytes(int(index)), object)  # a bytes array would lose trailing zeros

    return tf.ensure_shape(tf.numpy_function(read, [index], tf.string, stateful=False), ())


class _File:
  """A local file, closed when the last thread releases it."""

  def __init__(self, path: str):
    self.descriptor = os.open(path, os.O_RDONLY)

  def __del__(self):
    if hasattr(self, "descriptor"):
      os.close(self.descriptor)


_open = functools.lru_cache(maxsize=_OPEN_FILES)(_File)


def _read(path: str, offset: int, length: int) -> bytes:
  """Reads a range, or as much of it as exists."""
  if "://" in path:
    with tf.io.gfile.GFile(path, "rb") as file:
      file.seek(offset)
      return file.read(length)
  file, parts = _open(path), []
  while length and (part := os.pread(file.descriptor, length, offset)):
    parts.append(part)
    offset += len(part)
    length -= len(part)
  return b"".join(parts)


def _reason(error: OSError | tf.errors.OpError) -> str:
  text = error.message if isinstance(error, tf.errors.OpError) else error.strerror
  return text or type(error).__name__


def cached_index(path: str, build: Callable[[str], Arrays], layout: str) -> Arrays:
  """Returns `build(path)`, cached in the file `<path>.index.npz` if possible.

  The index is rebuilt if the size or modification time of `path` has changed, or if the index file is
  damaged. It is not cached if it cannot be written.

  Args:
    path: a large file.
    build: scans the file and returns arrays (no Python objects), such as the offsets of its records.
    layout: a name for the arrays that `build` returns; change it when their meaning changes.

  Raises:
    UserError: if `path` cannot be read.
  """
  try:
    stat = tf.io.gfile.stat(path)
    stamp = np.array([layout, str(stat.length), str(stat.mtime_nsec)])
    index = _load(f"{path}.index.npz")
    if index is None or not np.array_equal(index.pop(_STAMP, np.array([])), stamp):
      index = build(path)
      _save(f"{path}.index.npz", {**index, _STAMP: stamp})
  except (OSError, tf.errors.OpError) as error:
    raise UserError(f"'{path}' cannot be read: {_reason(error)}") from error
  return index


def cached_indices(paths: Sequence[str], build: Callable[[str], Arrays], layout: str) -> list[Arrays]:
  """Returns the `cached_index` of each file; indices are built in parallel.

  Raises:
    UserError: naming the first file that cannot be read.
  """
  indices: list[Arrays] = []
  logged = time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as executor:
    futures = [executor.submit(cached_index, path, build, layout) for path in paths]
    try:
      for future in futures:
        indices.append(future.result())
        if time.monotonic() - logged > _SECONDS_BETWEEN_LOGS:
          logged = time.monotonic()
          logging.getLogger("maskgen").info("indexed %d of %d files", len(indices), len(paths))
    finally:
      executor.shutdown(wait=False, cancel_futures=True)
  return indices


def _load(path: str) -> Arrays | None:
  """Reads an index file, or returns None if it is missing or damaged."""
  try:
    with tf.io.gfile.GFile(path, "rb") as file, np.load(io.BytesIO(file.read())) as arrays:
      return dict(arrays)
  except (OSError, tf.errors.OpError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
    return None


def _save(path: str, index: Arrays) -> None:
  """Writes an index file atomically."""
  buffer = io.BytesIO()
  np.savez_compressed(buffer, allow_pickle=False, **index)
  temporary = f"{path}.{uuid.uuid4().hex}.tmp"
  try:
    with tf.io.gfile.GFile(temporary, "wb") as file:
      file.write(buffer.getvalue())
    tf.io.gfile.rename(temporary, path, overwrite=True)
  except (OSError, tf.errors.OpError):
    with contextlib.suppress(OSError, tf.errors.OpError):
      tf.io.gfile.remove(temporary)
