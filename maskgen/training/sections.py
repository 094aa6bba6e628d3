"""Which dataclass each section of a config becomes, where `config.RunConfig` leaves it open."""

from collections.abc import Mapping
from typing import Any

from maskgen import objectives
from maskgen.errors import UserError
from maskgen.training.optim import Optimizer


def find_type(path: tuple[str, ...], section: Mapping[str, Any]) -> type | None:
  """Returns the dataclass of the section at a path of one model's config, or None if it has none."""
  try:
    match path:
      case ("objective",):
        return objectives.find(section)
      case ("optimizer", _):
        return Optimizer
      case ("data",):
        from maskgen.data.pipeline import Data  # and TensorFlow

        return Data
  except UserError:  # an unknown name: building the section says so
    pass
  return None
