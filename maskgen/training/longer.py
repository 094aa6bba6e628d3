"""A finished run that goes on because its config now has more steps."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from maskgen import config as config_lib
from maskgen import files
from maskgen.errors import UserError

if TYPE_CHECKING:
  from maskgen.training.experiment import Experiment

RESULTS, METRICS = "results.json", "metrics.jsonl"
log = logging.getLogger("maskgen")


def find(
  root: epath.Path, old: Mapping[str, Any], new: Mapping[str, Any], changes: Sequence[str]
) -> epath.Path | None:
  """The workdir of the run or of its last stage that goes on, if its length was raised and it is finished.

  Args:
    root: of the run.
    old: the config that it had.
    new: the config that it shall have.
    changes: their differences, see `config.difference`.
  """
  stages = list(new.get("stages", ()))
  prefix = f"{stages[-1]}." if stages else ""
  keys = {change.partition(": ")[0] for change in changes}
  workdir = root / stages[-1] if stages else root
  for key in ("total_steps", "total_epochs"):
    if keys == {f"{prefix}{key}"}:
      before, after = ((config[stages[-1]] if stages else config).get(key) for config in (old, new))
      raised = before is not None and after is not None and after > before
      is_finished = (workdir / RESULTS).exists() or _aside(workdir).exists()
      return workdir if raised and is_finished else None
  return None


def _aside(workdir: epath.Path) -> epath.Path:
  """Where the results of the newest step are kept when a run goes on."""
  file, remedy = workdir / METRICS, "restore it from a copy, or delete this line"
  lines = files.read_json_lines(file, {"step": int}, remedy) if file.exists() else []
  return workdir / f"results_{lines[-1]['step'] if lines else 0:07d}.json"


def check(workdir: epath.Path, section: config_lib.Checkpointing) -> None:
  """Checks that a finished run that goes on would not stop early at once.

  Raises:
    UserError: if it would.
  """
  from maskgen import storage  # takes seconds, unlike `find`
  from maskgen.training import metrics
  from maskgen.training.best import Best

  if not section.patience:
    return
  with contextlib.closing(storage.Checkpoints(workdir)) as checkpoints:
    best = Best(section, metrics.read(workdir), checkpoints.steps())
  if best.over:
    raise UserError(
      f"{workdir.name} ended {best.misses} evaluations after its best, {best}, and would stop at once by "
      f"config.checkpoint.patience={section.patience}: raise it above {best.misses} as well, or set it to 0"
    )


def go_on(workdir: epath.Path, experiment: "Experiment") -> None:
  """Sets the results of a finished run aside, so that it counts as unfinished, and says what follows.

  Before `config.json` is replaced: a run that is killed in between is found finished by these results.
  """
  import jax  # takes seconds, unlike `find`

  from maskgen import processes

  aside = _aside(workdir)
  step = int(aside.stem.rpartition("_")[2])
  if jax.process_index() == 0 and (workdir / RESULTS).exists():
    (workdir / RESULTS).rename(aside)
  processes.wait("the results of the finished run are set aside")
  rates = ", ".join(f"{group} {float(rate(step)):.3g}" for group, rate in experiment.schedules.items())
  log.info(
    "%s: goes on from its end at step %d to step %d; its results so far are in %s. Learning rates follow the "
    "schedules of %d steps from here on (%s): the result is not that of a run which had this length from the "
    "start",
    workdir.name,
    step,
    experiment.total_steps,
    aside.name,
    experiment.total_steps,
    rates,
  )
