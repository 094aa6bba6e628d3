"""Which dataclass each section of a config becomes, where `config.RunConfig` leaves it open."""

from collections.abc import Callable, Mapping
from typing import Any

from maskgen.errors import UserError


def find_type(path: tuple[str, ...], section: Mapping[str, Any]) -> type | None:
  """Returns the dataclass of the section at a path of one model's config, or None if it has none."""
  # Imports take seconds, and few commands need the class of any section before they have checked the rest.
  match path:
    case ("objective",):
      from maskgen import objectives

      return _if_known(lambda: objectives.find(section))
    case ("optimizer", _):
      from maskgen.training.optim import Optimizer

      return Optimizer
    case ("data",):
      from maskgen.data.pipeline import Data

      return Data
    case ("evals", _):
      from maskgen import evaluators

      return _if_known(lambda: evaluators.find(str(section.get("type")), ".".join(path)))
  return None


def _if_known(find: Callable[[], type]) -> type | None:
  try:
    return find()
  except UserError:  # an unknown name, which building the section reports
    return None
