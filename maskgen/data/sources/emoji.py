"""The embedded emoji: pictures uint8 [32, 32, 3] on white with captions; see `maskgen.data.emoji`."""

import numpy as np

from maskgen.data import emoji
from maskgen.data.sources import Source, check_split, fetch_of, source

_VERSION = 1


@source("emoji")
def open_emoji(argument: str, split: str) -> Source:
  """Opens a split, held in memory.

  Training pictures have several captions; those for testing have their Unicode names.
  """
  del argument
  check_split("emoji", split, emoji.SPLITS)
  known = emoji.load()
  indices, most = known.split(split), None if split == "train" else 1
  images = known.images[indices]
  labels = np.array([known.classes.index(known.categories[i]) for i in indices])
  captions = np.fromiter((tuple(known.captions(i)[:most]) for i in indices), object)

  def rows(chosen: np.ndarray) -> dict[str, np.ndarray]:
    return {"image": images[chosen], "label": labels[chosen], "caption": captions[chosen]}

  def describe(index: int) -> str:
    return f"'{known.names[indices[index]]}'"

  return Source(
    "emoji",
    len(indices),
    known.classes,
    fetch_of(rows),
    f"{_VERSION} {split}",
    describe,
    rows=rows,
    labels=labels,
  )
