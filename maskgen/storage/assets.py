"""Small files that a model's config names by path, such as text tokenizers: copies in the model's folder.

`assets/index.json` says which value of the config each copy belongs to. A model whose folder has it is built
from the copies, wherever the folder is. The config.json of a run keeps its paths; that of an export names the
copies, so that it tells nothing of the machine that made it.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from maskgen import files
from maskgen.config import fields

ASSETS = "assets"
INDEX = "index.json"


def write_assets(
  model: epath.Path, named: Mapping[str, fields.Files], config: Mapping[str, Any] | None = None
) -> Any:
  """Copies the files that a config names into a model's folder, unless it has copies.

  Args:
    model: the folder.
    named: the files by the value of the config that names them.
    config: which is to name the copies, such as `bpe:assets/0`; None for one that keeps its paths.

  Returns:
    The config.
  """
  root = model / ASSETS
  if not named or (root / INDEX).exists():
    return config
  index, renamed = {}, {}
  for number, (value, found) in enumerate(sorted(named.items())):
    source, home, names = epath.Path(os.path.expanduser(found.path)), str(number), found.names
    if names == ("",):
      source, home, names = source.parent, f"{number}/{source.name}", (source.name,)
    for name in names:
      copy = root / str(number) / name
      copy.parent.mkdir(parents=True, exist_ok=True)
      files.replace(copy, (source / name).read_bytes())
    before = value.removesuffix(found.path)
    renamed[value] = value if config is None else f"{before}{ASSETS}/{home}"
    index[renamed[value]] = {"before": before, "path": home}
  files.replace(root / INDEX, json.dumps(index, indent=2))  # last: without it there are no copies
  return _map_texts(config, lambda text: renamed.get(text, text))


def use_assets(config: dict[str, Any], model: epath.Path) -> dict[str, Any]:
  """Returns a config with the paths of a model's own copies.

  Raises:
    UserError: if the index is damaged.
  """
  copies = _read_index(model)
  return _map_texts(config, lambda text: copies.get(text, ("", text))[1])


def use_assets_if_gone(config: dict[str, Any], model: epath.Path) -> dict[str, Any]:
  """Returns a run's config in which copies stand for files that are gone, also within texts such as ops.

  Raises:
    UserError: if the index is damaged.
  """
  copies = _read_index(model).items()
  gone = {value: copy for value, (path, copy) in copies if not epath.Path(os.path.expanduser(path)).exists()}
  if not gone:
    return config
  # Whole paths: not the start or the end of a longer name.
  values = "|".join(map(re.escape, sorted(gone, key=len, reverse=True)))
  named = re.compile(rf"(?<![\w./~-])(?:{values})(?=[/'\"|,)]|\Z)")
  return _map_texts(config, lambda text: named.sub(lambda found: gone[found[0]], text))


def _read_index(model: epath.Path) -> dict[str, tuple[str, str]]:
  """For each value of a config that names local files: their path, and the value that names the copies."""
  file = model / ASSETS / INDEX
  if not file.exists():
    return {}
  remedy = "restore it from a copy"
  found = {}
  for value, entry in files.read_json(file, remedy).items():
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("before", "path")):
      raise files.damaged(file, f"'{value}' has no copy", remedy)
    if not files.is_inside(entry["path"]):
      raise files.damaged(file, f"'{entry['path']}' is not in its folder", remedy)
    before = entry["before"]
    found[value] = (value.removeprefix(before), f"{before}{model / ASSETS / entry['path']}")
  return found


def _map_texts(node: Any, change: Callable[[str], str]) -> Any:
  """Changes the texts in a plain config."""
  if isinstance(node, Mapping):
    return {key: _map_texts(item, change) for key, item in node.items()}
  if isinstance(node, list):
    return [_map_texts(item, change) for item in node]
  return change(node) if isinstance(node, str) else node
