"""One run per folder: a file-system lock, or in a store, a file that its owner keeps signing."""

import contextlib
import errno
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Generator
from typing import IO

from etils import epath

from maskgen import files
from maskgen.errors import TransientError

try:
  import fcntl
except ImportError:  # on Windows
  fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
# Stores accept one write per second and file, and a stale lock costs two intervals.
SECONDS = 20.0


class TakenError(TransientError):
  """Another process holds a folder."""


@contextlib.contextmanager
def hold(folder: epath.Path) -> Generator[None]:
  """Holds an existing folder exclusively while the context lasts.

  A local file system releases the lock when the process ends for any reason. In a store, on Windows, or on a
  file system without locks, a lock that has not been signed for a while is taken over; a process that finds
  its own lock taken over ends immediately, as if killed, because further writes would do harm.

  Raises:
    TakenError: if another process holds the folder.
  """
  if "://" not in str(folder):
    with open(folder / LOCK, "a+") as file:
      if _lock(file, folder):
        yield
        return
  with contextlib.closing(Signature(folder / LOCK, lambda: _end(folder))):
    yield


def _lock(file: IO[str], folder: epath.Path) -> bool:
  """Locks a file of a folder until it is closed; returns False if the file system or Python has no locks.

  Raises:
    TakenError: if another process holds it.
  """
  if fcntl is None:
    return False
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.seek(0)
    raise taken(folder, file.read()) from None
  except OSError as error:
    if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):  # as Lustre and NFS may answer
      raise
    return False
  file.truncate(0)
  file.write(_name())
  file.flush()
  return True


class Signature:
  """A file that this process signs repeatedly to show others that it is alive.

  Clocks are not compared across machines: other processes watch whether the file changes.
  """

  def __init__(self, file: epath.Path, lost: Callable[[], None], seconds: float = SECONDS):
    """Signs the file, immediately if it is unsigned, otherwise once it has stopped changing.

    Args:
      file: to sign.
      lost: called once, in another thread, if another process signs or removes the file.
      seconds: between two signatures, the same for all processes.

    Raises:
      TakenError: if the file keeps changing.
    """
    self._file, self._lost, self._seconds = file, lost, seconds
    self._token = uuid.uuid4().hex
    found = self._read()
    deadline = time.monotonic() + 2.5 * seconds
    while found and time.monotonic() < deadline:
      time.sleep(seconds / 10)
      before, found = found, self._read()
      if found not in (before, ""):
        raise taken(file.parent, found)
    self._sign(0)
    # If several processes sign at the same time, the last one owns the file.
    time.sleep(seconds / 10)
    if self._token not in (found := self._read()):
      raise taken(file.parent, found)
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._go_on, name="lock", daemon=True)
    self._thread.start()

  def close(self) -> None:
    """Stops signing, and removes the file if this process still owns it."""
    self._closed.set()
    self._thread.join()
    if self._token in self._read():
      self._file.unlink()

  def _go_on(self) -> None:
    count = 0
    while not self._closed.wait(self._seconds):
      count += 1
      try:
        mine = self._token in self._read()
        if mine:
          self._sign(count)
      except Exception:  # Stores raise many kinds, and may recover.
        continue
      if not mine:
        self._lost()
        return

  def _read(self) -> str:
    try:
      return self._file.read_text() if self._file.exists() else ""
    except FileNotFoundError:  # removed in between
      return ""

  def _sign(self, count: int) -> None:
    # Atomically: to others, an empty file is nobody's.
    files.replace(self._file, f"{_name()}\n{self._token} {count}\n", sync=False)


def taken(folder: epath.Path, signature: str) -> TakenError:
  """The error for a folder that the process with this signature holds."""
  name = (signature.splitlines() or ["a process without a name"])[0]
  return TakenError(
    f"another run is active in {folder} ({name}): wait until it ends, or give another --workdir"
  )


def _name() -> str:
  return f"process {os.getpid()} on {socket.gethostname()}"


def _end(folder: epath.Path) -> None:
  print(f"error: another run has taken over {folder}: this run ends, see the other's log", file=sys.stderr)
  sys.stderr.flush()
  os._exit(TransientError.status)
