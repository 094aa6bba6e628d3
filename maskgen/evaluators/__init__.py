"""Metrics and pictures from prediction functions: one module per evaluator.

Each module has a frozen dataclass `Evaluator` whose fields are its options in `config.evals`. The `type` of
an evaluation is the name of a module in this package or of your own (docs/extending.md).
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax

from maskgen import config as config_lib
from maskgen import plugins
from maskgen.config import fields
from maskgen.errors import UserError
from maskgen.evaluators import receipts
from maskgen.evaluators.context import Call, Context, Evaluator, Report
from maskgen.evaluators.frechet import frechet_distance

__all__ = ["Call", "Context", "Evaluator", "Report", "build", "frechet_distance", "trace"]

log = logging.getLogger("maskgen")

# Earlier names of evaluators.
_RENAMED = {"lexicon": "vilex"}
# Keys of a section that are not fields of the evaluator: they are read here and by the training loop.
_NOT_OPTIONS = ("type", "every_steps", "first_step")


def find(kind: str, where: str) -> type:
  """Returns the class of the evaluator with a type.

  Args:
    kind: the type.
    where: the section of an evaluation for error messages, such as `config.evals.samples`.

  Raises:
    UserError: if there is no such type.
  """
  module: Any = plugins.find_module(_RENAMED.get(kind, kind), __name__, f"{where}.type", "Evaluator")
  found: type = module.Evaluator
  return found


def build(name: str, config: Mapping[str, Any], context: Context) -> Evaluator:
  """Builds the evaluator that the section `config.evals.<name>` describes, with a context of its own.

  Raises:
    UserError: if its type does not exist, an option is wrong, or the objective lacks a prediction
      function that it needs.
  """
  where = f"config.evals.{name}"
  if "type" not in config:
    known = ", ".join(plugins.short_names(__name__, "Evaluator"))
    raise UserError(f"{where} needs the key 'type', one of {known}")
  kind = str(config["type"])
  if kind in _RENAMED:
    log.warning("%s.type '%s' is now called '%s': rename it", where, kind, _RENAMED[kind])
  cls: Any = find(kind, where)
  for option in fields.of(cls).keys() & {*_NOT_OPTIONS, *receipts.NOT_OPTIONS}:
    raise UserError(f"{where}: evaluator '{kind}' has an option '{option}', a name that is taken: rename it")
  options = {key: value for key, value in config.items() if key not in _NOT_OPTIONS}
  for function in cls.requires:
    if function not in context.predict:
      raise UserError(
        f"{where} needs the prediction function '{function}', which the objective does not have "
        f"(it has {', '.join(sorted(context.predict))}): remove this evaluation"
      )
  own = dataclasses.replace(context, networks={})
  built: Evaluator = config_lib.build_dataclass(cls, options, where, context=own)
  if "seed" in options:
    config_lib.check_seed(f"{where}.seed", options["seed"])
  return built


def trace(evaluator: Evaluator, call: Call, batch: Mapping[str, jax.ShapeDtypeStruct]) -> None:
  """Calls the prediction functions of an evaluator with shapes; see `Evaluator.trace`."""
  if hasattr(evaluator, "trace"):
    evaluator.trace(call, batch)
  else:
    for name in evaluator.requires:
      call(name, batch)
