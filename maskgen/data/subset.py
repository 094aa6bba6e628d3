"""Balanced subsets of a data set: some records of each class, reproducible on any machine."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from maskgen.data.cpu_tf import tf
from maskgen.data.reader import reason_of
from maskgen.data.sources import Source
from maskgen.errors import UserError

_BATCH = 1024


def take(source: Source, *, shots: int | None, share: float | None, seed: int) -> Source:
  """Returns a subset of a source with the same number, or the same fraction, of the records of each class.

  Each class is shuffled by the seed and its first records are taken, so that subsets of one seed are nested.

  Args:
    source: a source with labels.
    shots: the number of records of each class; or
    share: the fraction of each class, in (0, 1], rounded up to whole records.
    seed: selects the records.

  Raises:
    UserError: if the source has no labels or cannot be read, or a class has too few records.
  """
  names, rows = source.class_names, source.rows
  if names is None:
    remedy = source.lacks.get("label", "remove data.shots and data.share")
    raise UserError(f"{source.name} has no labels to choose by: {remedy}")
  labels = _labels(source)
  chosen = _choose(labels, names, source.name, shots, share, seed)
  return dataclasses.replace(
    source,
    name=f"{len(chosen)} records of {source.name}",
    size=len(chosen),
    fetch=lambda index: source.fetch(tf.gather(tf.constant(chosen), index)),
    fingerprint=hashlib.blake2b(
      f"{source.fingerprint} ".encode() + chosen.tobytes(), digest_size=16
    ).hexdigest(),
    describe=lambda index: source.describe(int(chosen[index])),
    rows=rows and (lambda indices: rows(chosen[indices])),
    labels=labels[chosen],
  )


def _choose(
  labels: np.ndarray, names: Sequence[str], where: str, shots: int | None, share: float | None, seed: int
) -> np.ndarray:
  """The chosen records in ascending order, int64."""
  parts = []
  for label, name in enumerate(names):
    members = np.flatnonzero(labels == label)
    count = shots if share is None else math.ceil(round(share * len(members), 6))
    assert count is not None
    if count > len(members):
      raise UserError(
        f"class '{name}' of {where} has {len(members)} records, but data.shots is {shots}: give at most that"
      )
    parts.append(np.random.default_rng((seed, label)).permutation(members)[:count])
  return np.sort(np.concatenate(parts)).astype(np.int64)


def _labels(source: Source) -> np.ndarray:
  """All labels, int64 [size]; pictures are not read if the source stores labels separately."""
  if source.labels is not None:
    return source.labels

  @tf.autograph.experimental.do_not_convert
  def label(index: tf.Tensor) -> tf.Tensor:
    return source.fetch(index)["label"]

  dataset = tf.data.Dataset.range(source.size).map(label, tf.data.AUTOTUNE, deterministic=True)
  try:
    return np.concatenate(list(dataset.batch(_BATCH).as_numpy_iterator()))
  except tf.errors.OpError as error:
    raise UserError(f"the labels of {source.name} cannot be read ({reason_of(error)}): repair it") from error
