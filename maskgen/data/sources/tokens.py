"""Cached codes, created by `maskgen.tools.tokenize`."""

import dataclasses
import hashlib
import os

import numpy as np
from etils import epath

from maskgen.data.cache import Cache
from maskgen.data.sources import Codes, Source, fetch_of, source
from maskgen.errors import UserError


@source("tokens:/path")
def open_tokens(path: str, split: str) -> Source:
  """Opens a cache; "tokens" are all crops of a record, of which `take_crop` takes one."""
  cache = Cache.open(epath.Path(os.path.expanduser(path)))
  manifest = cache.manifest
  if split != manifest.split:
    raise UserError(
      f"the token cache '{path}' holds split '{manifest.split}', not '{split}': set data.split to it, and "
      "data.eval_source to the pictures that evaluations read"
    )
  codes = cache.read("codes")
  labels = np.concatenate(cache.read("labels")).astype(np.int64) if manifest.class_names else None
  identity = dataclasses.astuple(manifest)
  if not manifest.jpeg_decoding:
    identity = identity[:-1]  # as before the manifest had it

  def rows(indices: np.ndarray) -> dict[str, np.ndarray]:
    places = zip(*np.divmod(indices, manifest.shard_records), strict=True)
    tokens = np.stack([codes[shard][row] for shard, row in places])
    return {"tokens": tokens} if labels is None else {"tokens": tokens, "label": labels[indices]}

  return Source(
    f"token cache '{path}'",
    manifest.records,
    manifest.class_names,
    fetch_of(rows),
    hashlib.sha256(repr(identity).encode()).hexdigest(),
    codes=Codes(manifest.tokenizer, manifest.image_shape),
    rows=rows,
    labels=labels,
  )
