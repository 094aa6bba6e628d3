"""Frozen parts of a model: written into a workdir once, with a checksum."""

from typing import Any

import jax
import numpy as np
from etils import epath

from maskgen import tree
from maskgen.errors import UserError
from maskgen.storage.tensors import has_weights, place, read_weights, to_host, write_weights

FROZEN = "frozen"


def write_frozen(workdir: epath.Path, frozen: Any) -> None:
  """Writes frozen parts, however sharded, into a workdir."""
  arrays = to_host(tree.flatten({"frozen": frozen}))
  if jax.process_index() == 0:
    write_weights(workdir / FROZEN, arrays)


def read_frozen(workdir: epath.Path, target: Any) -> Any:
  """Reads frozen parts and checks that not a bit has changed since they were written."""
  if not jax.tree.leaves(target):
    return target
  if not (workdir / FROZEN).exists():
    raise UserError(f"{workdir / FROZEN} is missing: restore it from a copy")
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
  if has_weights(workdir):
    return {name: array for name, array in read_weights(workdir).items() if name.startswith("frozen/")}
  return read_weights(workdir / FROZEN) if (workdir / FROZEN).exists() else {}
