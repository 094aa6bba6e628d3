"""The receipt of a run's evaluations; see `maskgen.evaluators.receipts`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from maskgen import files, storage, tree
from maskgen.config import RunConfig, fields
from maskgen.evaluators import receipts
from maskgen.training.experiment import Experiment


def of_run(
  experiment: Experiment, variables: Any, model: Mapping[str, Any], numbers: Mapping[str, float]
) -> dict[str, Any]:
  """What the numbers of evaluations were computed from. A collective call.

  Args:
    experiment: of the model.
    variables: what was evaluated.
    model: `path`, absolute or relative to the receipt's folder; `step`, None for an export; `averages`, the
      groups of parameters in whose place averages were evaluated, None for an export.
    numbers: of all evaluations, by `NAME/METRIC`.
  """
  found = {
    "data": of_data(experiment),
    "model": of_model(experiment, variables, model),
    "evaluations": of_evaluations(experiment),
    **receipts.surroundings(**layout(experiment)),
    "config": plain_config(experiment.config),
  }
  for name, facts in found["evaluations"].items():
    own = {key: value for key, value in numbers.items() if key.split("/")[0] == name}
    facts["numbers"] = {key.removeprefix(f"{name}/"): value for key, value in own.items()}
  return found


def plain_config(config: RunConfig) -> dict[str, Any]:
  """A config of one stage with all of its keys, as it is read from a file."""
  return receipts.plain(dataclasses.asdict(config))


def located(path: epath.PathLike, step: int | None) -> dict[str, Any]:
  """Where a model is, as `of_run` takes it; `step` is None for an export."""
  folder = files.absolute(str(storage.locate(path)[0]))
  return {"path": folder, "step": step, "averages": storage.averages(path)}


def layout(experiment: Experiment) -> dict[str, Any]:
  """How evaluations are split over devices."""
  return {"mesh": dict(experiment.mesh.shape), "batch_size": experiment.eval_batch_size}


def of_data(experiment: Experiment) -> dict[str, Any]:
  """What identifies the records, and how they are prepared for evaluations."""
  return {**experiment.data.fingerprints, "preprocess": experiment.config.data["eval_preprocess"]}


def of_model(experiment: Experiment, variables: Any, model: Mapping[str, Any]) -> dict[str, Any]:
  """What identifies a model, and its precision; for arguments see `of_run`."""
  objective, frozen = experiment.objective, variables["frozen"] or {}
  walked = fields.walk(type(objective), objective)
  return {
    **model,
    "precision": {".".join(path): value for path, field, value in walked if field.metadata.get("precision")},
    "frozen": {name: tree.fingerprint(part) for name, part in frozen.items()},
    "weights": tree.fingerprint(variables),
  }


def of_evaluations(experiment: Experiment) -> dict[str, Any]:
  """The facts of each evaluation."""
  return {
    name: {"type": experiment.config.evals[name]["type"], **receipts.of_evaluator(evaluator)}
    for name, (_, evaluator) in experiment.evaluators.items()
  }
