"""Weights of other projects, converted from their names and layouts to our parameter trees."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from maskgen.config import fields


@dataclasses.dataclass(frozen=True)
class Converted:
  """Another project's model, ready for `maskgen.storage.write_export`.

  Attributes:
    config: the content of the export's config.json.
    variables: `{"params": {group: tree}, "frozen": tree, "extra": tree}`, float32.
    dead: names of unused tensors that the other project stores but does not use, either.
    unknown: names of unused tensors that maskgen does not know.
    local_files: files that the config names, by the value that names them.
  """

  config: dict[str, Any]
  variables: Any
  dead: tuple[str, ...] = ()
  unknown: tuple[str, ...] = ()
  local_files: Mapping[str, fields.Files] = dataclasses.field(default_factory=dict)
