"""Small pictures as arrays in NumPy files, which are read without TensorFlow."""

import hashlib
import zipfile
import zlib

import numpy as np
from etils import epath

from maskgen import files
from maskgen.data.sources import Source, fetch_of, source
from maskgen.errors import UserError

_REMEDY = (
  "save it by np.savez with image (uint8 [n, h, w, c]) and, if you like, label (integers [n] from 0), "
  "classes (their names) and caption (texts [n])"
)


@source("arrays:/path/{split}.npz")
def open_arrays(path: str, split: str) -> Source:
  """Opens a file with all pictures of a split, held in memory; `{split}` in its path is replaced.

  The file has `image`, uint8 [n, h, w, c], and perhaps `label`, integers [n] from 0; `classes`, their names,
  by default the numbers up to the largest label; and `caption`, texts [n] or [n, k].
  """
  if "{split}" not in path:
    raise UserError(f"arrays:{path} names one file for all splits: put {{split}} into its name")
  file = epath.Path(path.replace("{split}", split)).expanduser()
  try:
    with file.open("rb") as opened, np.load(opened) as found:
      entries = {key: found[key] for key in ("image", "label", "classes", "caption") if key in found}
  except (FileNotFoundError, IsADirectoryError):
    raise UserError(f"{file} is not a file: give the path of the arrays of split '{split}'") from None
  except (TypeError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:  # TypeError: one array
    raise files.damaged(file, error, _REMEDY) from None
  _check(file, entries)
  names, classes = None, entries.pop("classes", None)
  if "label" in entries:
    names = tuple(map(str, range(entries["label"].max() + 1) if classes is None else classes))
    entries["label"] = entries["label"].astype(np.int64)
  if "caption" in entries:
    texts = (tuple(map(str, np.atleast_1d(caption))) for caption in entries["caption"])
    entries["caption"] = np.fromiter(texts, object)

  def rows(indices: np.ndarray) -> dict[str, np.ndarray]:
    return {key: values[indices] for key, values in entries.items()}

  digest = hashlib.sha256(b"" if classes is None else repr(names).encode())
  for key, values in entries.items():
    content = repr(values.tolist()).encode() if values.dtype == object else np.ascontiguousarray(values).data
    digest.update(f"{key} {values.shape}".encode())
    digest.update(content)
  lacks = {key: f"{file} has none: {_REMEDY}" for key in ("label", "caption") if key not in entries}
  return Source(
    f"'{file}'",
    len(entries["image"]),
    names,
    fetch_of(rows),
    digest.hexdigest(),
    lacks=lacks,
    rows=rows,
    labels=entries.get("label"),
  )


def _check(file: epath.Path, entries: dict[str, np.ndarray]) -> None:
  """Checks names, types, shapes and ranges."""
  kinds = {key: f"{values.dtype}{list(values.shape)}" for key, values in entries.items()}
  image, label, classes, caption = (entries.get(key) for key in ("image", "label", "classes", "caption"))
  wrong = None
  if image is None or image.ndim != 4 or image.dtype != np.uint8 or not image.size:
    wrong = f"images {kinds.get('image', 'of no kind')}"
  elif classes is not None and (classes.ndim != 1 or label is None):
    wrong = f"classes {kinds['classes']} and " + ("no labels" if label is None else "labels")
  elif label is not None and (label.shape != image.shape[:1] or label.dtype.kind not in "iu"):
    wrong = f"{len(image)} images and labels {kinds['label']}"
  elif label is not None and not 0 <= label.min() <= label.max() < (
    1 << 31 if classes is None else len(classes)
  ):
    known = "" if classes is None else f" for {len(classes)} classes"
    wrong = f"labels from {label.min()} to {label.max()}{known}"
  elif caption is not None and (
    caption.ndim not in (1, 2) or len(caption) != len(image) or caption.dtype.kind != "U" or not caption.size
  ):
    wrong = f"{len(image)} images and captions {kinds['caption']}"
  if wrong:
    raise UserError(f"{file} has {wrong}: {_REMEDY}")
