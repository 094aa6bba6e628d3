"""Pictures in tar archives with WebDataset's layout.

`tar:/path/{000..099}.tar` names the archives; `{a,b}.tar`, `*.tar` and plain paths work too, in any store
that TensorFlow can read. Access is random, so archives must not be compressed.

The members `KEY.EXT` of an archive with the same KEY, the file name up to its first dot, form a record:
- a picture (`KEY.jpg`, `KEY.png` and so on);
- `KEY.cls`, if there are labels: the label as a number, from 0;
- `KEY.txt`, if there are captions: one per line;
- `KEY.json`, instead of the two above or in addition: an object with the number "cls" or "label" and the
  string or list of strings "caption"; other keys are ignored.
Records without a picture are ignored, as are hidden files, links and folders. Labels and captions that only
some records have are not used. Class names are the lines of `classes.txt` in the folder of the first archive,
or else the numbers up to the largest label.

Splits: `{split}` in the path stands for the name of the split, as in `tar:/path/{split}-{000..009}.tar`.
Without it a tenth of the records, chosen by hashes of their keys, is held out.

The first use scans the headers of each archive and writes the index `<archive>.index.npz` next to it.
"""

import collections
import hashlib
import os

import numpy as np

from maskgen.data.cpu_tf import tf
from maskgen.data.listing import SPLITS, only_some, say, say_ignored, smallest_tenth
from maskgen.data.ranges import Ranges, cached_indices
from maskgen.data.shards import shard_paths
from maskgen.data.sources import Source, check_split, source
from maskgen.data.tables import text_lines
from maskgen.data.tar_index import LAYOUT, json_captions, scan
from maskgen.errors import UserError


@source("tar:/path/{000..099}.tar")
def open_tar(pattern: str, split: str) -> Source:
  """Opens a split of the archives that a pattern names; members are read when they are fetched.

  Raises:
    UserError: if archives are missing, damaged or compressed, a member is malformed, two pictures of an
      archive have the same key, or no record has a picture.
  """
  name = f"tar '{pattern}'"
  if "{split}" not in pattern:
    check_split(name, split, SPLITS)
  paths = shard_paths(pattern, split)
  shards = cached_indices(paths, scan, LAYOUT)
  index = {key: np.concatenate([shard[key] for shard in shards]) for key in shards[0]}
  images, texts = (
    Ranges.of_shards(
      paths, [shard[f"{kind}_offset"] for shard in shards], [shard[f"{kind}_length"] for shard in shards]
    )
    for kind in ("image", "caption")
  )
  keys, labels, ignored = index["key"], index["label"], index["ignored"]
  extensions: collections.Counter[str] = collections.Counter()
  for extension, count in zip(index.pop("extension"), index.pop("extension_count"), strict=True):
    extensions[os.fsdecode(extension)] += int(count)

  def describe(number: int) -> str:
    return f"{os.fsdecode(keys[number])} in {os.path.basename(images.path(number))}"

  if len(ignored):
    say(f"{name}: ignored {len(ignored):,} records without a picture, such as {os.fsdecode(ignored[0])}")
  say_ignored(name, extensions)
  if not len(keys):
    raise UserError(f"{name} has no pictures: give archives with members such as 0001.jpg")
  has = {"label": labels >= 0, "caption": texts.length > 0}
  lacks = {key: only_some(name, key, given, describe) for key, given in has.items()}
  class_names = None
  if has["label"].all():
    largest = _largest_label(pattern, split, int(labels.max()))
    class_names = _class_names(os.path.dirname(paths[0]), largest)
  numbers = np.arange(len(keys))
  if "{split}" not in pattern:
    numbers = numbers[smallest_tenth(list(keys)) == (split != "train")]

  number_table, label_table = tf.constant(numbers, tf.int64), tf.constant(labels, tf.int64)

  @tf.autograph.experimental.do_not_convert
  def read_text(number: np.ndarray) -> np.ndarray:
    content = texts.read_bytes(int(number))
    if index["caption_json"][number]:
      content = "\n".join(json_captions(content)).encode()
    return np.array(content, object)

  def fetch(position: tf.Tensor) -> dict[str, tf.Tensor]:
    number = tf.gather(number_table, position)
    record = {"image": images.read(number)}
    if class_names:
      record["label"] = tf.gather(label_table, number)
    if has["caption"].all():
      text = tf.numpy_function(read_text, [number], tf.string, stateful=False)
      record["caption"] = text_lines(tf.ensure_shape(text, ()))
    return record

  digest = hashlib.blake2b(repr(class_names).encode() + numbers.tobytes(), digest_size=16)
  for key, value in sorted(index.items()):
    digest.update(f"{key} {value.dtype} ".encode() + value.tobytes())
  return Source(
    name,
    len(numbers),
    class_names,
    fetch,
    digest.hexdigest(),
    lambda index: describe(numbers[index]),
    lacks={key: reason for key, reason in lacks.items() if reason},
  )


def _largest_label(pattern: str, split: str, largest: int) -> int:
  """Returns the largest label of a split and the training split, so that both have the same classes."""
  if split == "train" or "{split}" not in pattern:
    return largest
  try:
    paths = shard_paths(pattern, "train")
  except UserError:  # this is the only split
    return largest
  shards = cached_indices(paths, scan, LAYOUT)
  return max(largest, *(int(shard["label"].max(initial=-1)) for shard in shards))


def _class_names(folder: str, largest: int) -> tuple[str, ...]:
  """Returns the lines of `classes.txt` in a folder, or else the label numbers."""
  path = os.path.join(folder, "classes.txt")
  try:
    with tf.io.gfile.GFile(path, "rb") as file:
      names = tuple(file.read().decode("utf-8-sig").rstrip().splitlines())
  except tf.errors.NotFoundError:
    return tuple(map(str, range(largest + 1)))
  except (tf.errors.OpError, UnicodeDecodeError) as error:
    raise UserError(f"'{path}' cannot be read as UTF-8 text: repair or remove it") from error
  if len(names) <= largest:
    raise UserError(f"'{path}' names {len(names)} classes, but there is label {largest}: add a line for each")
  return tuple(name.strip() for name in names)
