"""Files that are written atomically, and checked for damage when they are read."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import uuid
from collections.abc import Mapping
from typing import Any

from etils import epath

from maskgen.errors import UserError

MANIFEST = "manifest.json"
# What the float32 arrays of an export can be stored as; they are read as float32.
DTYPES = ("float32", "float16", "int8")


def replace(path: epath.Path, content: str | bytes, *, sync: bool = True) -> None:
  """Writes a file atomically, replacing an existing one: writes under another name, then renames.

  On a local disk the file also survives a power failure, unless `sync` is off, which is much faster.
  """
  data = content.encode() if isinstance(content, str) else content
  temporary = path.parent / f"{path.name}.{uuid.uuid4().hex}.tmp"
  local = sync and "://" not in str(path)
  try:
    with temporary.open("wb") as file:
      file.write(data)
      if local:
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
  except OSError:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    raise
  if local:
    with contextlib.suppress(OSError):  # not every file system syncs folders
      folder = os.open(path.parent, os.O_RDONLY)
      try:
        os.fsync(folder)
      finally:
        os.close(folder)


def cache_folder() -> pathlib.Path:
  """Where to keep what can be made again: `$XDG_CACHE_HOME/maskgen`, by default `~/.cache/maskgen`."""
  return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "maskgen"


def absolute(path: str) -> str:
  """The absolute path of what exists; any other text, such as the name of a model, as it is given."""
  local = os.path.abspath(os.path.expanduser(path))
  return local if path and os.path.exists(local) else path


def hide_folders(text: str, after: str = ":'\"") -> str:
  """Leaves the last part of local paths that are quoted in a text, also after a kind as in "bpe:/me/words".

  Args:
    text: the text.
    after: the characters after which a path may begin.
  """
  path = rf"""(?<=[{after}])(?:/(?!/)|~/|\.\.?/)(?:[^'"]*/)?([^'"/]+)/?(?=['"])"""
  return re.sub(path, r"\1", text)


def is_inside(name: str) -> bool:
  """Whether a name in an index, which may come from elsewhere, stays within the index's folder."""
  path = pathlib.PurePosixPath(name)
  return not path.is_absolute() and ".." not in path.parts


def damaged(path: epath.PathLike, reason: Any, remedy: str) -> UserError:
  """Returns the error for a file with unexpected contents."""
  return UserError(f"{path} is damaged ({reason}): {remedy}")


def read_json(path: epath.Path, remedy: str) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    UserError: if the file contains anything else.
  """
  return _object(path, path.read_bytes(), "", remedy)


def read_json_lines(path: epath.Path, keys: Mapping[str, type], remedy: str) -> list[dict[str, Any]]:
  """Reads a JSON object from each line; ignores a truncated last line.

  Args:
    path: the file.
    keys: the keys of each object, with the types of their values.
    remedy: what to do if the file contains anything else, for the error message.

  Raises:
    UserError: if the file contains anything else.
  """
  objects = []
  for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
    found = _object(path, line, f"line {number}: ", remedy)
    for key, kind in keys.items():
      if type(found.get(key)) is not kind:
        raise damaged(path, f"line {number}: {key} is {found.get(key)!r}", remedy)
    objects.append(found)
  return objects


def _object(path: epath.Path, data: bytes, where: str, remedy: str) -> dict[str, Any]:
  try:
    value = json.loads(data.decode())
  except (ValueError, RecursionError) as error:
    raise damaged(path, f"{where}{error}", remedy) from None
  if not isinstance(value, dict):
    raise damaged(path, f"{where}not a JSON object", remedy)
  return value


def make_manifest(contents: Mapping[str, bytes]) -> str:
  """Returns the text of a manifest: the checksums of files by name."""
  digests = {name: {"sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
  return json.dumps(digests, indent=2)


def check_manifest(manifest: epath.Path, name: str, data: Any, remedy: str) -> bool:
  """Compares the contents of a file with its checksum in a manifest; returns False if there is no manifest.

  Raises:
    UserError: if the checksums differ, or the manifest is damaged.
  """
  try:
    digests = read_json(manifest, remedy)
  except FileNotFoundError:
    return False
  entry = digests.get(name)
  if not isinstance(entry, dict) or "sha256" not in entry:
    raise damaged(manifest, f"no checksum of {name}", remedy)
  if hashlib.sha256(data).hexdigest() != entry["sha256"]:
    raise damaged(manifest.parent / name, f"its checksum differs from that in {manifest.name}", remedy)
  return True
