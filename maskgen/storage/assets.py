"""Small files that a model's config names by path, such as text tokenizers: copies in the model's folder.

`assets/index.json` says which value of the config each copy belongs to. A model whose folder has it is built
from the copies, wherever the folder is; the paths in its config.json stay as they were.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from maskgen import files
from maskgen.config import fields

ASSETS = "assets"
INDEX = "index.json"


def write_assets(model: epath.Path, named: Mapping[str, fields.Files]) -> None:
  """Copies the files that a config names into a model's folder, unless it has copies.

  Args:
    model: the folder.
    named: the files by the value of the config that names them.
  """
  root = model / ASSETS
  if not named or (root / INDEX).exists():
    return
  index = {}
  for number, (value, found) in enumerate(sorted(named.items())):
    source, home, names = epath.Path(os.path.expanduser(found.path)), str(number), found.names
    if names == ("",):
      source, home, names = source.parent, f"{number}/{source.name}", (source.name,)
    for name in names:
      copy = root / str(number) / name
      copy.parent.mkdir(parents=True, exist_ok=True)
      files.replace(copy, (source / name).read_bytes())
    index[value] = {"before": value.removesuffix(found.path), "path": home}
  files.replace(root / INDEX, json.dumps(index, indent=2))  # last: without it there are no copies


def use_assets(config: dict[str, Any], model: epath.Path) -> dict[str, Any]:
  """Returns a config with the paths of a model's own copies.

  Raises:
    UserError: if the index is damaged.
  """
  file = model / ASSETS / INDEX
  if not file.exists():
    return config
  remedy = "restore it from a copy"
  paths = {}
  for value, entry in files.read_json(file, remedy).items():
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("before", "path")):
      raise files.damaged(file, f"'{value}' has no copy", remedy)
    if not files.is_inside(entry["path"]):
      raise files.damaged(file, f"'{entry['path']}' is not in its folder", remedy)
    paths[value] = f"{entry['before']}{model / ASSETS / entry['path']}"

  def use(node: Any) -> Any:
    if isinstance(node, Mapping):
      return {key: use(item) for key, item in node.items()}
    if isinstance(node, list):
      return [use(item) for item in node]
    return paths.get(node, node) if isinstance(node, str) else node

  return {key: use(value) for key, value in config.items()}
