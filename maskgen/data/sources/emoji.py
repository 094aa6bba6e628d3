"""The embedded emoji: pictures uint8 [32, 32, 3] on white with captions; see `maskgen.data.emoji`."""

import numpy as np

from maskgen.data import emoji
from maskgen.data.cpu_tf import tf
from maskgen.data.sources import Source, check_split, source

_VERSION = 1


@source("emoji")
def open_emoji(argument: str, split: str) -> Source:
  """Opens a split, held in memory.

  Training pictures have several captions; those for testing have their Unicode names.
  """
  del argument
  check_split("emoji", split, emoji.SPLITS)
  known = emoji.load()
  indices = known.split(split)
  images = tf.constant(known.images[indices])
  labels = tf.constant([known.classes.index(known.categories[i]) for i in indices], tf.int64)
  said = [known.captions(i)[: None if split == "train" else 1] for i in indices]
  captions = tf.constant([caption for texts in said for caption in texts])
  ends = tf.constant(np.cumsum([0, *map(len, said)]))

  def fetch(index: tf.Tensor) -> dict[str, tf.Tensor]:
    return {
      "image": tf.gather(images, index),
      "label": tf.gather(labels, index),
      "caption": captions[ends[index] : ends[index + 1]],
    }

  def describe(index: int) -> str:
    return f"'{known.names[indices[index]]}'"

  return Source("emoji", len(indices), known.classes, fetch, f"{_VERSION} {split}", describe)
