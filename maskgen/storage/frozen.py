"""Frozen parts of a model: written into a workdir once, with a checksum."""

import hashlib
import json
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from etils import epath

from maskgen import tree
from maskgen.errors import UserError
from maskgen.storage.tensors import WEIGHTS, parse, place, read_file, to_host


def write_frozen(workdir: epath.Path, frozen: Any) -> None:
  """Writes frozen parts, however sharded, into a workdir."""
  data = safetensors.numpy.save(to_host(tree.flatten({"frozen": frozen})))
  if jax.process_index() == 0:
    folder = workdir / "frozen"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(data)
    manifest = {WEIGHTS: {"sha256": hashlib.sha256(data).hexdigest()}}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


def read_frozen(workdir: epath.Path, target: Any) -> Any:
  """Reads frozen parts and checks that not a bit has changed since they were written."""
  if not jax.tree.leaves(target):
    return target
  flat = tree.flatten({"frozen": target})
  arrays = read_frozen_arrays(workdir)
  tree.check_same(arrays, flat, f"{workdir}/frozen")
  placed = [place(arrays[name], leaf) for name, leaf in flat.items()]
  return jax.tree.unflatten(jax.tree.structure(target), placed)


def read_frozen_arrays(workdir: epath.Path) -> dict[str, np.ndarray]:
  """The frozen arrays of a workdir or an export by their path names; none where it has no frozen parts.

  Raises:
    UserError: if a bit has changed.
  """
  if (workdir / WEIGHTS).exists():
    found = read_file(workdir / WEIGHTS)
    return {name: array for name, array in found.items() if name.startswith("frozen/")}
  folder = workdir / "frozen"
  if not folder.exists():
    return {}
  data = (folder / WEIGHTS).read_bytes()
  expected = json.loads((folder / "manifest.json").read_text())[WEIGHTS]["sha256"]
  if hashlib.sha256(data).hexdigest() != expected:
    raise UserError(
      f"{folder / WEIGHTS} is damaged (its checksum differs from manifest.json's): restore it from a copy"
    )
  return parse(data)
