"""Evaluations of a run: at a step, or of any model."""

import logging
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from maskgen import storage
from maskgen.errors import UserError, out_of_memory
from maskgen.evaluators import Evaluator, Report, receipts
from maskgen.training import metrics as metrics_lib
from maskgen.training import receipt
from maskgen.training.experiment import Experiment

log = logging.getLogger("maskgen")


def evaluate(experiment: Experiment, variables: Any, step: int | None) -> Report:
  """Runs the evaluations of `due_evaluators`; all names begin with that of the evaluation.

  Raises:
    UserError: naming the evaluation, if it raises one or exhausts the devices' memory.
  """
  numbers: dict[str, float] = {}
  pictures: dict[str, Any] = {}
  tables: dict[str, Any] = {}
  for name, evaluator in due_evaluators(experiment, step).items():
    try:
      report = evaluator.run(variables, jax.random.key(experiment.config.seed))
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
    numbers |= {f"{name}/{key}": float(value) for key, value in report.numbers.items()}
    pictures |= {f"{name}/{key}": picture for key, picture in report.pictures.items()}
    tables |= {f"{name}/{key}": rows for key, rows in report.tables.items()}
  return Report(numbers, pictures, tables)


def due_evaluators(experiment: Experiment, step: int | None) -> dict[str, Evaluator]:
  """The evaluators that run at a step, by name; all of them at the last step and for `step=None`."""
  return {
    name: evaluator
    for name, (every, evaluator) in experiment.evaluators.items()
    if step is None or step == experiment.total_steps or step % every == 0
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
  if not storage.is_export(path):
    parts["step"] = state.step
  variables = storage.load_variables(path, parts)
  return variables, int(variables.pop("step")) if "step" in variables else None


def show(name: str, where: str, numbers: Mapping[str, float]) -> None:
  """Logs an evaluation, one line per number; `where` says of what, such as "at step 6"."""
  if jax.process_index() == 0:
    lines = "".join(f"\n  {key:<36} {value:.4g}" for key, value in sorted(numbers.items()))
    log.info("%s evaluation %s%s", name, where, lines)
