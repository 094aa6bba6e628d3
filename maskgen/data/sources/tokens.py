"""Cached codes, created by `maskgen.tools.tokenize`."""

import dataclasses
import hashlib
import os

import numpy as np
from etils import epath

from maskgen.data.cache import Cache
from maskgen.data.cpu_tf import tf
from maskgen.data.sources import Codes, Source, source
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
  labels = None
  if manifest.class_names:
    labels = tf.constant(np.concatenate(cache.read("labels")), tf.int64)
  dtype = tf.as_dtype(manifest.dtype)
  identity = dataclasses.astuple(manifest)
  if not manifest.jpeg_decoding:
    identity = identity[:-1]  # as before the manifest had it

  def read(index: np.int64) -> np.ndarray:
    shard, row = divmod(int(index), manifest.shard_records)
    return codes[shard][row]

  def fetch(index: tf.Tensor) -> dict[str, tf.Tensor]:
    tokens = tf.numpy_function(read, [index], dtype)
    record = {"tokens": tf.ensure_shape(tokens, (manifest.crops, manifest.tokens))}
    if labels is not None:
      record["label"] = tf.gather(labels, index)
    return record

  return Source(
    f"token cache '{path}'",
    manifest.records,
    manifest.class_names,
    fetch,
    hashlib.sha256(repr(identity).encode()).hexdigest(),
    codes=Codes(manifest.tokenizer, manifest.image_shape),
  )
