"""What differs between two configs, and whether it matters to a run that continues."""

import re
from collections.abc import Mapping
from typing import Any

# Keys, of a run or of one of its stages, that say how it is carried out, not what it computes: they may
# change when it is resumed.
OPERATIONAL = re.compile(
  r"(\w+\.)?(version|evals|mesh|sharding|accumulation|log_every_steps|checkpoint|profile"
  r"|objective\.(attention|remat|scan))(\.|$)"
)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Lists `key: old -> new` for what differs between two `to_dict` results and changes a run's numbers."""
  old_flat, new_flat = _flatten(old), _flatten(new)
  return [
    f"{key}: {old_flat.get(key, '(absent)')} -> {new_flat.get(key, '(absent)')}"
    for key in sorted(old_flat.keys() | new_flat.keys())
    if old_flat.get(key) != new_flat.get(key) and not OPERATIONAL.match(key)
  ]


def _flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in node.items():
    if isinstance(value, Mapping) and value:
      flat.update(_flatten(value, f"{prefix}{key}."))
    else:
      flat[f"{prefix}{key}"] = value
  return flat
