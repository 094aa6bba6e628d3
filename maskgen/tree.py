"""Trees of arrays by path: names, regular expressions, differences."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from maskgen.errors import UserError


def path_name(path: Sequence[Any]) -> str:
  """Joins a key path of `jax.tree_util` into `a/b/kernel`."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def names(tree: Any) -> Any:
  """Replaces every leaf of `tree` by its path name."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), tree)


def flatten(tree: Any) -> dict[str, Any]:
  """Flattens a tree to `{path name: leaf}`."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def replace(tree: Any, leaves: Mapping[str, Any]) -> Any:
  """Replaces leaves of a tree, given by path name."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(path_name(path), leaf), tree)


def first_match(tree: Any, rules: Sequence[tuple[str, Any]], default: Any) -> dict[str, Any]:
  """Returns for each leaf's path name the value of the first (regex, value) rule that matches it.

  Raises:
    UserError: if a rule is the first match of no leaf: it has a typo or is shadowed.
  """
  chosen = {}
  used = set()
  for name in flatten(tree):
    chosen[name] = default
    for i, (pattern, value) in enumerate(rules):
      if re.search(pattern, name):
        chosen[name] = value
        used.add(i)
        break
  unused = [pattern for i, (pattern, _) in enumerate(rules) if i not in used]
  if unused:
    raise UserError(f"rule '{unused[0]}' applies to no parameter: remove or reorder it")
  return chosen


def check_same(found: Any, expected: Any, what: str, remedy: str = "") -> None:
  """Checks that two trees have the same names, shapes and dtypes.

  Raises:
    UserError: with one line per difference: name, found, expected.
  """
  left = {name: _describe(leaf) for name, leaf in flatten(found).items()}
  right = {name: _describe(leaf) for name, leaf in flatten(expected).items()}
  rows = [
    (name, left.get(name, "-"), right.get(name, "-"))
    for name in sorted(left.keys() | right.keys())
    if left.get(name) != right.get(name)
  ]
  if not rows:
    return
  shown = table([("parameter", "found", "expected"), *rows[:20]])
  more = f"\n  ... and {len(rows) - 20} more" if len(rows) > 20 else ""
  then = f" ({remedy})" if remedy else ""
  raise UserError(f"{what} does not fit this config in {len(rows)} places{then}:\n{shown}{more}")


def table(rows: Sequence[tuple[str, str, str]]) -> str:
  """Formats rows of three strings as aligned lines."""
  widths = [max(len(row[i]) for row in rows) for i in range(2)]
  return "\n".join(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


def fingerprint(tree: Any) -> str:
  """Returns a hexadecimal digest of a tree's names, dtypes, shapes and values.

  A collective call if arrays are sharded over several processes.
  """
  digest = hashlib.sha256()
  for name, leaf in sorted(flatten(tree).items()):
    digest.update(f"{name} {_describe(leaf)}\n".encode())
    if not getattr(leaf, "is_fully_addressable", True):
      leaf = multihost_utils.process_allgather(leaf, tiled=True)
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
  """Returns a 32-bit checksum of each array, for any sharding; it detects any change of a single element."""
  # Sequentially: CPU devices start concurrent programs in any order, and would then wait for each other.
  return {
    name: _checksum_on_host(np.asarray(array)) if _is_on_host(array) else int(_checksum(array))
    for name, array in arrays.items()
  }


# Odd weights are invertible modulo 2^32, so that every change of an element has an effect.
_WEIGHT = np.uint32(0x9E3779B1)


def _is_on_host(array: jax.Array) -> bool:
  """Whether the host has the whole array, and need not compile a program for each shape and sharding."""
  return array.is_fully_addressable and all(device.platform == "cpu" for device in array.devices())


def _checksum_on_host(array: np.ndarray) -> int:
  """The same as `_checksum`."""
  bits = np.ascontiguousarray(array).reshape(-1).view(f"uint{8 * array.dtype.itemsize}").astype(np.uint32)
  weight = (2 * np.arange(bits.size, dtype=np.uint32) + np.uint32(1)) * _WEIGHT
  return int(np.dot(bits + np.uint32(1), weight))


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
  if array.dtype == jnp.bool_:
    array = array.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
  place = jnp.zeros(array.shape, jnp.uint32)
  for axis, size in enumerate(array.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
  weight = (2 * place + 1) * _WEIGHT
  return ((bits + 1) * weight).sum(dtype=jnp.uint32)


def _describe(leaf: Any) -> str:
  return f"{leaf.dtype}{list(leaf.shape)}"


def count(tree: Any) -> int:
  """Returns the number of scalars in a tree of arrays or shapes."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
