"""Weights of other projects: their names and layouts to our parameter trees."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Converted:
  """Another project's model, ready for `maskgen.storage.write_export`.

  Attributes:
    config: what the export's config.json holds.
    variables: `{"params": {group: tree}, "frozen": tree, "extra": tree}`, float32.
    dead: names of tensors that the other project stores and never uses either.
    unknown: names of tensors that were not used and that maskgen does not know.
  """

  config: dict[str, Any]
  variables: Any
  dead: tuple[str, ...] = ()
  unknown: tuple[str, ...] = ()
