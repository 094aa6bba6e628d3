"""Damaged records: the list of them, their substitutes, and the limit on their number."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from maskgen import files
from maskgen.data.cpu_tf import tf
from maskgen.data.sources import Source
from maskgen.errors import UserError

FILE = "skipped.jsonl"
# A run stops when the damaged records of a split exceed both of these.
MAX_RECORDS, MAX_SHARE = 20, 0.01

# The use of a split whose batch numbers are training steps.
TRAINING = "training"

log = logging.getLogger("maskgen")


class Skipped:
  """The damaged records that all processes of a run have found, and the file `skipped.jsonl`.

  Nothing is written before `attach` sets a folder.
  """

  def __init__(self) -> None:
    self._folder: epath.Path | None = None
    self._step: int | None = None
    self._written = 0
    # By split and index. "step" is None until all processes know the entry.
    self._entries: dict[tuple[str, int], dict[str, Any]] = {}
    self._substitutes: dict[str, Substitutes] = {}

  def __len__(self) -> int:
    return len(self._entries)

  def substitutes(self, use: str, split: str, source: Source) -> Substitutes:
    """Creates the substitutes for one use of a split, such as training."""
    self._substitutes[use] = opened = Substitutes(self, use, split, source)
    return opened

  def attach(self, folder: epath.Path, step: int) -> None:
    """Sets the folder of `skipped.jsonl`, and truncates the file to what was known at a step."""
    self._folder, self._step = folder, step
    file = folder / FILE
    texts = ("use", "split", "record", "reason", "fingerprint")
    keys = {"step": int, "index": int, **dict.fromkeys(texts, str)}
    try:
      known = files.read_json_lines(file, keys, "its records are detected again") if file.exists() else []
    except UserError as error:
      log.warning("%s", error)
      known = []
    sources = {each.split: each.source.fingerprint for each in self._substitutes.values()}
    self._merge(
      entry
      for entry in known
      if entry["step"] <= step and sources.get(entry["split"]) == entry["fingerprint"]
    )
    if file.exists():
      self._write(list(self._entries.values()))
    self._check()

  def add(self, use: str, split: str, source: Source, index: int, reason: str, batch: int) -> None:
    """Adds a record that was found in the batch with this number; a later `flush` writes it."""
    record = source.describe(index)
    if (split, index) not in self._entries:
      log.warning("skipping %s: %s", record, reason)
    entry = dict(use=use, split=split, index=index, record=record, reason=reason, batch=batch)
    self._merge([dict(entry, step=None, fingerprint=source.fingerprint)])

  def flush(self, step: int) -> int:
    """Writes new entries as of a step; a collective call that exchanges them between processes.

    Entries from prefetched training batches wait until their step, so that the file is the same whether or
    not a run was interrupted.

    Returns:
      The number of damaged records that are known, over all splits.
    """
    self._step = step
    fresh = [
      entry
      for entry in list(self._entries.values())
      if entry["step"] is None and (entry["use"] != TRAINING or entry["batch"] < step)
    ]
    for entry in fresh:
      entry["step"] = step
    for entries in _exchange(fresh):
      self._merge(entries)
    self._check()
    written = [entry for entry in list(self._entries.values()) if entry["step"] is not None]
    if fresh or len(written) > self._written:
      self._write(written)
    return len(written)

  def _check(self) -> None:
    """Raises a UserError if too many records are damaged, in all processes alike."""
    for each in self._substitutes.values():
      count = sum(entry["split"] == each.split for entry in list(self._entries.values()))
      if count > max(MAX_RECORDS, MAX_SHARE * each.source.size):
        raise self.too_many(each.split, each.source)

  def too_many(self, split: str, source: Source) -> UserError:
    """Writes the list and returns an error that shows it."""
    self._write([{**entry, "step": self._step} for entry in list(self._entries.values())])
    named = [entry for entry in self._entries.values() if entry["split"] == split]
    shown = "; ".join(f"{entry['record']} ({entry['reason']})" for entry in named[:MAX_RECORDS])
    more = f"; and {len(named) - MAX_RECORDS} more" if len(named) > MAX_RECORDS else ""
    return UserError(
      f"{len(named)} of the {source.size} records of split '{split}' of {source.name} cannot be used; repair "
      f"or remove them: {shown}{more}"
    )

  def _merge(self, entries: Iterable[dict[str, Any]]) -> None:
    for entry in entries:
      self._entries.setdefault((entry["split"], entry["index"]), entry)
      if entry["use"] in self._substitutes:
        self._substitutes[entry["use"]].learn(entry["index"])

  def _write(self, entries: list[dict[str, Any]]) -> None:
    self._written = len(entries)
    if self._folder is not None and jax.process_index() == 0:
      files.replace(self._folder / FILE, "".join(json.dumps(entry) + "\n" for entry in entries))


class Substitutes:
  """The substitutes for damaged records in one use of a split.

  A substitute depends on the index that it replaces and on the set of damaged records, not on when they were
  found, so that batches do not depend on what was read before.
  """

  def __init__(self, skipped: Skipped, use: str, split: str, source: Source):
    self.split, self.source = split, source
    self._skipped, self._use = skipped, use
    self._chosen: dict[int, int] = {}  # from damaged records to substitutes
    self._table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.int64, default_value=-1)

  def lookup(self, index: tf.Tensor) -> tf.Tensor:
    """Returns the index of the record to use for an index, int64; traceable."""
    found = tf.ensure_shape(self._table.lookup(index), ())
    return tf.where(found < 0, index, found)

  def add(self, index: int, reason: str, batch: int) -> None:
    """Adds a damaged record that was found in the batch with this number.

    Raises:
      UserError: if there are too many.
    """
    self._skipped.add(self._use, self.split, self.source, index, reason, batch)
    too_many = len(self._chosen) > max(MAX_RECORDS, MAX_SHARE * self.source.size)
    # Several processes stop together, at the next `flush`.
    if len(self._chosen) == self.source.size or (too_many and jax.process_count() == 1):
      raise self._skipped.too_many(self.split, self.source)

  def learn(self, index: int) -> None:
    """Chooses a substitute for a damaged record, and new ones for the records that it replaced."""
    if index in self._chosen:
      return
    orphans = [damaged for damaged, chosen in self._chosen.items() if chosen == index]
    self._chosen[index] = index
    if len(self._chosen) < self.source.size:
      for damaged in (index, *orphans):
        self._chosen[damaged] = chosen = self._choose(damaged)
        self._table.insert(tf.constant(damaged, tf.int64), tf.constant(chosen, tf.int64))

  def _choose(self, index: int) -> int:
    attempt = 0
    while True:
      digest = hashlib.blake2b(f"{index}/{attempt}".encode(), digest_size=8).digest()
      candidate = int.from_bytes(digest) % self.source.size
      if candidate not in self._chosen:
        return candidate
      attempt += 1


def _exchange(entries: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
  """Gathers the entries of all processes."""
  if jax.process_count() == 1:
    return [entries]
  data = np.frombuffer(json.dumps(entries).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.asarray(len(data)))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: len(data)] = data
  everyone = multihost_utils.process_allgather(padded)
  return [json.loads(row[:size].tobytes()) for row, size in zip(everyone, sizes, strict=True)]
