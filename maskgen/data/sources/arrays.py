"""Small pictures as arrays in NumPy files, which are read without TensorFlow."""

import hashlib
import zipfile

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
  by default the numbers; and `caption`, texts [n] or [n, k].
  """
  if "{split}" not in path:
    raise UserError(f"arrays:{path} names one file for all splits: put {{split}} into its name")
  file = epath.Path(path.replace("{split}", split)).expanduser()
  try:
    with file.open("rb") as opened, np.load(opened) as found:
      entries = {key: found[key] for key in ("image", "label", "classes", "caption") if key in found}
  except FileNotFoundError:
    raise UserError(f"{file} does not exist: give the path of the arrays of split '{split}'") from None
  except (ValueError, EOFError, zipfile.BadZipFile) as error:
    raise files.damaged(file, error, _REMEDY) from None
  _check(file, entries)
  names = None
  if "label" in entries:
    names = tuple(map(str, entries.get("classes", range(entries["label"].max() + 1))))
    entries["label"] = entries["label"].astype(np.int64)
  if "caption" in entries:
    texts = (tuple(map(str, np.atleast_1d(caption))) for caption in entries["caption"])
    entries["caption"] = np.fromiter(texts, object)
  entries.pop("classes", None)

  def rows(indices: np.ndarray) -> dict[str, np.ndarray]:
    return {key: values[indices] for key, values in entries.items()}

  digest = hashlib.sha256()
  for key, values in entries.items():
    content = repr(values.tolist()).encode() if values.dtype == object else np.ascontiguousarray(values).data
    digest.update(f"{key} {values.shape}".encode())
    digest.update(content)
  lacks = {key: f"{file} has none: {_REMEDY}" for key in ("label", "caption") if key not in entries}
  size, fingerprint = len(entries["image"]), digest.hexdigest()
  return Source(f"'{file}'", size, names, fetch_of(rows), fingerprint, lacks=lacks, rows=rows)


def _check(file: epath.Path, entries: dict[str, np.ndarray]) -> None:
  """Checks names, types, shapes and ranges."""
  image, label, count = entries.get("image"), entries.get("label"), len(entries.get("image", ()))
  classes = entries.get("classes")
  wrong = None
  if image is None or image.ndim != 4 or image.dtype != np.uint8:
    wrong = "has no image" if image is None else f"has images {image.dtype}{list(image.shape)}"
  elif label is not None and (label.shape != (count,) or label.dtype.kind not in "iu"):
    wrong = f"has {count} images and labels {label.dtype}{list(label.shape)}"
  elif label is not None and not 0 <= label.min() <= label.max() < (
    1 << 31 if classes is None else len(classes)
  ):
    known = "" if classes is None else f" for {len(classes)} classes"
    wrong = f"has labels from {label.min()} to {label.max()}{known}"
  elif "caption" in entries and (len(entries["caption"]) != count or entries["caption"].dtype.kind != "U"):
    wrong = f"has {count} images and captions {entries['caption'].dtype}{list(entries['caption'].shape)}"
  if wrong:
    raise UserError(f"{file} {wrong}: {_REMEDY}")
