"""Evaluations of a run: at a step, or of any model."""

import logging
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from maskgen import objectives, storage
from maskgen.errors import UserError, out_of_memory
from maskgen.evaluators import Evaluator, Report, receipts
from maskgen.training import metrics as metrics_lib
from maskgen.training import receipt
from maskgen.training.best import Best
from maskgen.training.experiment import Experiment

log = logging.getLogger("maskgen")


def evaluate(experiment: Experiment, variables: Any, step: int | None, best: Best | None = None) -> Report:
  """Runs the evaluations of `due_evaluators`; all names begin with that of the evaluation.

  Args:
    experiment: the run.
    variables: of the model.
    step: see `due_evaluators`.
    best: learns the numbers; if it then ends the run, all evaluations are due.

  Raises:
    UserError: naming the evaluation, if it raises one or exhausts the devices' memory.
  """
  total = Report()
  due = due_evaluators(experiment, step)
  if best is not None and step is not None and best.evaluation in due:
    followed = _run(experiment, best.evaluation, variables)
    best.update(step, followed.numbers)
    total = followed
    due = due_evaluators(experiment, None if best.over else step)
    due.pop(best.evaluation)
  for name in due:
    total = _merged(total, _run(experiment, name, variables))
  return total


def _merged(a: Report, b: Report) -> Report:
  return Report({**a.numbers, **b.numbers}, {**a.pictures, **b.pictures}, {**a.tables, **b.tables})


def _run(experiment: Experiment, name: str, variables: Any) -> Report:
  """Runs one evaluation; its names begin with that of the evaluation."""
  log.info("evaluating %s", name)
  try:
    report = experiment.evaluators[name][1].run(variables, jax.random.key(experiment.config.seed))
  except UserError as error:
    error.args = (f"config.evals.{name}: {error}",)
    raise
  except Exception as error:
    if found := out_of_memory(error):
      raise UserError(
        f"config.evals.{name}: the memory of the devices is exhausted ({found}): raise config.accumulation "
        "for smaller batches, or remove it"
      ) from error
    error.add_note(f"in config.evals.{name}")
    raise
  return Report(
    {f"{name}/{key}": float(value) for key, value in report.numbers.items()},
    {f"{name}/{key}": picture for key, picture in report.pictures.items()},
    {f"{name}/{key}": rows for key, rows in report.tables.items()},
  )


def due_evaluators(experiment: Experiment, step: int | None) -> dict[str, Evaluator]:
  """The evaluators that run at a step, by name; all of them at the last step and for `step=None`."""
  if step is None or step == experiment.total_steps:
    return {name: evaluator for name, (_, evaluator) in experiment.evaluators.items()}
  return {
    name: evaluator
    for name, (every, evaluator) in experiment.evaluators.items()
    if step % every == 0 or step == experiment.config.evals[name].get("first_step")
  }


def evaluate_model(experiment: Experiment, path: epath.PathLike, workdir: epath.Path) -> dict[str, float]:
  """Runs all evaluations on a model; writes `samples/` and, in `eval/` of a run's workdir, `receipts.json`.

  Args:
    experiment: of the model's objective.
    path: a workdir, whose newest checkpoint counts, a step in it, or an export.
    workdir: the folder.
  """
  variables, step = load(experiment, path)
  report = evaluate(experiment, variables, None)
  show(workdir.name, f"of {path}" if step is None else f"at step {step}", report.numbers)
  metrics_lib.write_samples(workdir, "eval", report)
  # A run's own receipts are those of its results.
  folder = workdir / "eval" if (workdir / storage.CHECKPOINTS).exists() else workdir
  receipts.write(folder, receipt.of_run(experiment, variables, receipt.located(path, step), report.numbers))
  return dict(report.numbers)


def load(experiment: Experiment, path: epath.PathLike) -> tuple[Any, int | None]:
  """The variables of a model, see `storage.load_variables`, and its step unless it is an export."""
  state, frozen = experiment.targets["state"], experiment.targets["frozen"]
  parts = {"params": state.params, "frozen": frozen, "extra": state.model_state}
  if storage.is_export(path):
    parts = objectives.without_training_only(experiment.objective, parts)
  else:
    parts["step"] = state.step
  variables = storage.load_variables(path, parts)
  return variables, int(variables.pop("step")) if "step" in variables else None


def show(name: str, where: str, numbers: Mapping[str, float]) -> None:
  """Logs an evaluation, one line per number; `where` says of what, such as "at step 6"."""
  if jax.process_index() == 0:
    lines = "".join(f"\n  {key:<36} {value:.4g}" for key, value in sorted(numbers.items()))
    log.info("%s evaluation %s%s", name, where, lines)
