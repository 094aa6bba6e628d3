"""Locates the records of a tar archive in WebDataset's layout by reading its headers."""

import collections
import json
import posixpath
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from maskgen.data.cpu_tf import tf
from maskgen.data.listing import SUFFIXES, is_hidden
from maskgen.errors import UserError

# Identifies the arrays that `scan` returns, and what it takes for pictures: change all together.
LAYOUT = f"tar 2 {' '.join(SUFFIXES)}"

_PACKERS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# A limit because there is a class name for each number up to the largest label.
_MAX_LABEL = 10**6


class _Member(NamedTuple):
  """The position of a member's content, and what was read from it."""

  offset: int
  length: int
  label: int = -1
  has_caption: bool = False


_NONE = _Member(0, 0)


def scan(path: str) -> dict[str, np.ndarray]:
  """Locates the pictures and captions of an archive; reads only headers and labels.

  Returns:
    "key" bytes [n];
    "image_offset", "image_length" int64 [n];
    "label" int64 [n], -1 if there is none;
    "caption_offset", "caption_length" int64 [n], length 0 if there is none;
    "caption_json" bool [n], whether these bytes are JSON for `json_captions`;
    "ignored" bytes [m], the keys of records without a picture;
    "extension" bytes [k], "extension_count" int64 [k], how many members of which extensions are ignored.

  Raises:
    UserError: if the archive is damaged, truncated or compressed, or a member malformed or duplicated.
  """
  samples: dict[str, dict[str, _Member]] = {}
  extensions: collections.Counter[str] = collections.Counter()
  with tf.io.gfile.GFile(path, "rb") if "://" in path else open(path, "rb", buffering=0) as file:
    for info in _members(path, file):
      name = posixpath.normpath(info.name)
      if any(map(is_hidden, name.split("/"))):
        continue
      folder, base = posixpath.split(name)
      stem, _, extension = base.partition(".")
      key, kind = posixpath.join(folder, stem), extension.lower()
      sample = samples.setdefault(key, {})
      if f".{kind}" in SUFFIXES:
        kind = "picture"
      elif kind not in ("cls", "txt", "json"):
        extensions[f".{kind}" if kind else ""] += 1
        continue
      if kind in sample:
        raise UserError(f"'{name}' in '{path}' is the second {kind} of '{key}': give each record its own key")
      member = _Member(info.offset_data, info.size)
      if kind in ("cls", "json"):
        file.seek(member.offset)
        try:
          member = _read_label(member, kind, file.read(member.length))
        except ValueError as error:
          raise UserError(f"'{name}' in '{path}' is malformed ({error}): repair or remove it") from error
      sample[kind] = member
  return _arrays(samples) | {
    "extension": np.array([*map(_encode, extensions)], np.bytes_),
    "extension_count": np.array([*extensions.values()], np.int64),
  }


def json_captions(content: bytes) -> list[str]:
  """Returns the captions in a .json member, without line breaks and blank captions.

  Raises:
    ValueError: if it is not a JSON object, or "caption" is neither a string nor a list of strings.
  """
  value = _json_object(content).get("caption") or []
  captions = [value] if isinstance(value, str) else value
  if not (isinstance(captions, list) and all(isinstance(caption, str) for caption in captions)):
    raise ValueError("'caption' is neither a string nor a list of strings")
  return [words for caption in captions if (words := " ".join(caption.split()))]


def _json_object(content: bytes) -> dict:
  try:
    value = json.loads(content)
  except RecursionError:
    raise ValueError("it is nested too deeply") from None
  if not isinstance(value, dict):
    raise ValueError("it is not a JSON object")
  return value


def _read_label(member: _Member, kind: str, content: bytes) -> _Member:
  """Adds the label of a .cls or .json member, and whether it has a caption."""
  if kind == "json":
    values = _json_object(content)
    label = values.get("cls", values.get("label"))
    if not isinstance(label, int) or isinstance(label, bool):
      label = -1  # not a class number
    elif label < 0:
      raise ValueError(f"{label} is not a label: labels are numbers from 0")
    member = member._replace(has_caption=bool(json_captions(content)))
  else:
    text = content.strip()
    if not text.isdigit():
      raise ValueError(f"'{text[:20].decode(errors='replace')}' is not a label: labels are numbers from 0")
    label = int(text)
  if label > _MAX_LABEL:
    raise ValueError(f"label {label} is too large: labels are numbers from 0, without gaps")
  return member._replace(label=label)


def _arrays(samples: dict[str, dict[str, _Member]]) -> dict[str, np.ndarray]:
  """Builds the arrays of records that `scan` returns."""
  keys, rows = [], []
  for key, sample in samples.items():
    if "picture" not in sample:
      continue
    picture, txt, json_member = (sample.get(kind, _NONE) for kind in ("picture", "txt", "json"))
    label = sample.get("cls", json_member).label
    from_json = not txt.length and json_member.has_caption
    caption = json_member if from_json else txt
    keys.append(_encode(key))
    rows.append((picture.offset, picture.length, label, caption.offset, caption.length, from_json))
  columns = np.array(rows, np.int64).reshape(-1, 6).T
  names = ("image_offset", "image_length", "label", "caption_offset", "caption_length")
  return {
    "key": np.array(keys, np.bytes_),
    **dict(zip(names, columns, strict=False)),
    "caption_json": columns[5].astype(bool),
    "ignored": np.array([_encode(key) for key in samples if "picture" not in samples[key]], np.bytes_),
  }


def _encode(name: str) -> bytes:
  return name.encode("utf-8", "surrogateescape")


def _members(path: str, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
  """Yields the regular files of an archive; the caller may seek and read in between."""
  start = file.read(max(map(len, _PACKERS)))
  for magic, packer in _PACKERS.items():
    if start.startswith(magic):
      raise UserError(f"'{path}' is compressed with {packer}, which has no random access: unpack it")
  file.seek(0)
  try:
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
      while member := archive.next():
        archive.members.clear()  # type: ignore[attr-defined]  # a million would exhaust memory
        if member.size < 0:  # tarfile would go backwards and repeat it
          raise tarfile.ReadError(f"'{member.name}' has a negative size")
        if member.issparse():
          raise UserError(
            f"'{member.name}' in '{path}' is a sparse file: create the archive without --sparse"
          )
        if member.isreg():
          yield member
      # Except for the first header, tarfile treats an unreadable one as the end.
      file.seek(archive.offset)
      if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no member or end mark at byte {archive.offset}")
  except tarfile.TarError as error:
    raise UserError(
      f"'{path}' is not a tar archive, or is damaged or truncated ({error}): create it again"
    ) from error
