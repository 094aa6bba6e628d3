"""Pictures stored as files in a folder.

The folder contains pictures, in sub-folders or not, and may be in any store that TensorFlow can read
(`folder:gs://bucket/pictures`).

Labels, if any, come from one of
- sub-folders: each one that contains pictures is a class;
- `labels.csv` in the folder, with the header `file,label` and a row for each picture, such as
  `some/where/1.jpg,cat`; sub-folders are then not classes.
Label i is the class whose name is the i-th in alphabetical order, or in numeric order if all are numbers.

There are no labels if a picture lies next to the sub-folders, or if those of two splits differ.

Captions, if any, come from one of
- `captions.csv` in the folder, with the header `file,caption` and one or more rows for each picture;
- text files next to the pictures: `1.txt` has the captions of `1.jpg`, one per line.
There are none if one picture has none. They are read only if the preprocessing uses them.

Splits: if there is a sub-folder `train` and one of `test`, `val`, `validation`, `valid` and `dev`, these are
the splits, and each is laid out as above; tables may also be in the folder itself and then cover all splits
(`train/1.jpg,cat`). Upper case is the same, and so are `training`, `testing`, `eval` and `evaluation`.
Otherwise a tenth of the pictures, chosen by hashes of their names, is held out.

Hidden files and folders, those of operating systems (`__MACOSX`, `@eaDir`, `lost+found` and so on), named
pipes and files that are not pictures are ignored; the log counts the latter.
"""

import hashlib
import itertools
import os

import numpy as np

from maskgen.data.cpu_tf import tf
from maskgen.data.listing import Listing, list_pictures
from maskgen.data.sources import Source, source
from maskgen.data.tables import text_lines

_SAMPLED_SIZES = 4096


@source("folder:/path")
def open_folder(argument: str, split: str) -> Source:
  """Opens a split of a folder; files are read when they are fetched.

  Raises:
    UserError: as `list_pictures` does.
  """
  root = argument.rstrip("/") or "/"
  listing = list_pictures(root if "://" in root else os.path.expanduser(root), split)
  folder = os.fsencode(listing.root)
  names = tf.constant([os.fsencode(name) for name in listing.names], tf.string)
  labels = None if listing.labels is None else tf.constant(listing.labels, tf.int64)
  captions: tf.Tensor | None = None
  if isinstance(listing.captions, list):
    captions = tf.constant([text for texts in listing.captions for text in texts], tf.string)
    ends = tf.constant(list(itertools.accumulate(map(len, listing.captions), initial=0)), tf.int64)

  def fetch(index: tf.Tensor) -> dict[str, tf.Tensor]:
    path = tf.strings.join([folder, "/", tf.gather(names, index)])
    record = {"image": tf.io.read_file(path)}
    if labels is not None:
      record["label"] = tf.gather(labels, index)
    if captions is not None:
      record["caption"] = captions[tf.gather(ends, index) : tf.gather(ends, index + 1)]
    elif listing.captions == "beside":
      record["caption"] = text_lines(tf.io.read_file(tf.strings.regex_replace(path, r"\.[A-Za-z]+$", ".txt")))
    return record

  return Source(
    name=f"folder '{argument}'",
    size=len(listing.names),
    class_names=listing.class_names,
    fetch=fetch,
    fingerprint=_fingerprint(listing),
    describe=lambda index: os.path.join(listing.root, listing.names[index]),
    lacks=listing.lacks,
  )


def _fingerprint(listing: Listing) -> str:
  """Hashes names, labels and captions, and if files are local the sizes of some of them."""
  digest = hashlib.blake2b(os.fsencode("\0".join(listing.names)), digest_size=16)
  digest.update(repr((listing.labels, listing.class_names, listing.captions)).encode())
  if "://" not in listing.root:
    count = len(listing.names)
    sample = np.linspace(0, count - 1, min(count, _SAMPLED_SIZES)).astype(int)
    digest.update(
      repr([_size(os.path.join(listing.root, listing.names[index])) for index in sample]).encode()
    )
  return digest.hexdigest()


def _size(path: str) -> int:
  try:
    return os.stat(path).st_size
  except OSError:  # a dangling link, which fails when it is read
    return -1
