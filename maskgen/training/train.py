"""The loop: one for every objective."""

import json
import logging
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import jax
import numpy as np
from etils import epath

from maskgen import files, storage, tree
from maskgen.errors import UserError, of_storage, shortage
from maskgen.evaluators.batches import gather
from maskgen.training import metrics as metrics_lib
from maskgen.training.clock import Clock
from maskgen.training.experiment import Experiment
from maskgen.training.preemption import Preemption
from maskgen.training.profiler import Profiler
from maskgen.training.start import check_nothing_lost, start

RESULTS = "results.json"
log = logging.getLogger("maskgen")


class PreemptedError(Exception):
  """The run has saved and stopped, since its machine is about to be taken away; it can continue."""


def train(experiment: Experiment, workdir: epath.Path) -> dict[str, float]:
  """Trains from wherever the workdir stands to the end, and returns the final evaluation.

  A run that is killed at any moment continues from its newest checkpoint and ends with the same
  parameters and metrics as one that is not.

  Raises:
    PreemptedError: after a SIGTERM.
    UserError: if a loss or another metric is not finite, naming the step and the metric, if memory or disk
      do not suffice, or if the run starts from beyond its end.
  """
  try:
    # Closed also when the run fails: saves that have begun are completed.
    with (
      of_storage(workdir),
      closing(storage.Checkpoints(workdir, experiment.config.checkpoint)) as checkpoints,
    ):
      loop(experiment, workdir, checkpoints)
  except metrics_lib.NotFiniteError as error:
    records = {"step": error.step, "records": experiment.data.describe(gather(error.records))}
    if jax.process_index() == 0:
      files.replace(workdir / metrics_lib.NOT_FINITE, json.dumps(records, indent=2))
    raise
  except jax.errors.JaxRuntimeError as error:
    if not (found := shortage(error)):
      raise
    raise UserError(
      f"the devices' memory does not suffice ({found}): raise config.accumulation or "
      "config.mesh.fsdp, lower config.batch_size, or compute in bfloat16 (config.objective.dtype)"
    ) from error
  return final_results(workdir, list(experiment.config.evals))


def loop(experiment: Experiment, workdir: epath.Path, checkpoints: storage.Checkpoints) -> None:
  """Trains from wherever the workdir stands to the end; for errors see `train`."""
  cfg, total = experiment.config, experiment.total_steps
  if checkpoints.latest() is None:
    check_nothing_lost(workdir, cfg.checkpoint.save_steps)
  state, frozen, origin = start(
    workdir,
    checkpoints,
    resume=cfg.resume,
    init_from=cfg.init_from,
    targets=experiment.targets,
    init=lambda: experiment.init(workdir),
  )
  step = first = int(state.step)
  if step > total:
    raise UserError(f"the run starts from {origin}, at step {step} of {total}: raise config.total_steps")
  own = checkpoints.latest() is not None
  log.info("%s: %s", workdir.name, describe(experiment))
  if experiment.mesh.size > 1:
    log.info("%s: state and frozen parts on the mesh\n%s", workdir.name, experiment.coverage())
  log.info("%s: starts from %s", workdir.name, origin)
  writer = metrics_lib.Writer(workdir, step if own else 0)
  progress = metrics_lib.Progress(workdir.name, step, total, cfg.batch_size)
  window = metrics_lib.Window()
  clock = Clock(writer.seconds_before, cfg.checkpoint.save_minutes)
  skipped = experiment.data.skipped
  skipped.attach(workdir, step if own else 0)
  batches = experiment.train_batches(step)
  profiler = Profiler(workdir, cfg.profile)
  preemption = Preemption()

  def write_averages() -> None:
    averages = window.close()
    averages |= progress.report(step, averages) | {"data/skipped": skipped.flush(step)}
    writer.numbers(step, averages | {"timing/seconds": clock.seconds()})

  # The order is fixed: save, evaluate, next batch, step, log. So a checkpoint and an evaluation at step i see
  # the same weights, what was logged up to step i is older than the checkpoint, and an evaluation that is
  # killed or fails costs no steps: a run that continues from step i evaluates unless that was written.
  with closing(writer), closing(progress), closing(preemption), closing(batches):
    while True:
      stop = preemption.at(step)
      restored = own and step == first
      if step > 0:
        window.check()
        began = time.monotonic()
        if stop and len(window):
          write_averages()
        due = step == total or step % cfg.checkpoint.save_steps == 0 or clock.save_is_due(step, cfg)
        if (due or stop) and not restored:
          writer.sync()
          checkpoints.save(step, state)
          clock.saved()
        # Before a stop there is no time to evaluate: the run does when it continues.
        if not stop and not (restored and writer.evaluated):
          numbers, pictures = evaluate(experiment, state.variables(frozen), step)
          if numbers or pictures:
            skipped.flush(step)
            writer.pictures(step, pictures)
            writer.numbers(step, numbers | {"timing/seconds": clock.seconds()})  # marks it as written
            show(workdir.name, step, numbers)
        progress.pause(time.monotonic() - began)
      if stop:
        raise PreemptedError
      if step == total:
        break

      began = time.monotonic()
      batch = next(batches)
      window.waited += time.monotonic() - began

      profiler.before(step)
      state, values = experiment.update(state, frozen, batch)
      step += 1
      profiler.after(step, values, last=step == total)

      window.add(step, values, batch["record"])
      progress.step()
      if step % cfg.log_every_steps == 0 or step % cfg.checkpoint.save_steps == 0 or step == total:
        write_averages()


def evaluate(
  experiment: Experiment, variables: Any, step: int | None
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
  """Runs the evaluations that are due at a step, or all of them at the last step and for `step=None`.

  Raises:
    UserError: naming the evaluation, if it raises one or the devices' memory does not suffice for it.
  """
  numbers: dict[str, float] = {}
  pictures: dict[str, np.ndarray] = {}
  for name, (every, evaluator) in experiment.evaluators.items():
    if step is None or step == experiment.total_steps or step % every == 0:
      try:
        report = evaluator.run(variables, jax.random.key(experiment.config.seed))
      except UserError as error:
        error.args = (f"config.evals.{name}: {error}",)
        raise
      except Exception as error:
        if found := shortage(error):
          raise UserError(
            f"config.evals.{name}: the devices' memory does not suffice ({found}): raise config.accumulation "
            "for smaller batches, or remove it"
          ) from error
        error.add_note(f"in config.evals.{name}")
        raise
      numbers |= {f"{name}/{key}": float(value) for key, value in report.numbers.items()}
      pictures |= {f"{name}/{key}": picture for key, picture in report.pictures.items()}
  return numbers, pictures


def evaluate_newest(experiment: Experiment, workdir: epath.Path) -> dict[str, float]:
  """Runs all evaluations on the newest checkpoint of a workdir; changes nothing but `samples/`."""
  parts = {
    "params": experiment.targets["state"].params,
    "frozen": experiment.targets["frozen"],
    "extra": experiment.targets["state"].model_state,
  }
  variables = storage.load_variables(workdir, parts)
  numbers, pictures = evaluate(experiment, variables, None)
  show(workdir.name, "newest", numbers)
  metrics_lib.write_pictures(workdir, "eval", pictures)
  return numbers


def final_results(workdir: epath.Path, evals: list[str]) -> dict[str, float]:
  """The newest value of every evaluation's metrics, from `metrics.jsonl`."""
  results: dict[str, float] = {}
  for line in metrics_lib.read(workdir):
    results |= {key: value for key, value in line.items() if key.split("/")[0] in evals}
  return results


def describe(experiment: Experiment) -> str:
  """One line on the size of a run."""
  groups = experiment.targets["state"].params
  sizes = ", ".join(f"{name} {tree.count(group):,}" for name, group in groups.items())
  mesh = " x ".join(f"{axis}={size}" for axis, size in experiment.mesh.shape.items())
  return (
    f"parameters {sizes}; {experiment.data.num_train:,} examples for training, "
    f"{experiment.data.num_eval:,} for evaluation; "
    f"{experiment.total_steps:,} steps of {experiment.config.batch_size}; mesh {mesh}"
  )


def show(name: str, step: int | str, numbers: Mapping[str, float]) -> None:
  """Logs an evaluation, one line per number."""
  if jax.process_index() == 0:
    lines = "".join(f"\n  {key:<36} {value:.4g}" for key, value in sorted(numbers.items()))
    log.info("%s evaluation at step %s%s", name, step, lines)


def read_results(workdir: epath.Path) -> dict[str, Any] | None:
  """What a finished run has written; None if it is not finished, or the file is damaged, to write it anew."""
  if not (workdir / RESULTS).exists():
    return None
  try:
    return files.read_json(workdir / RESULTS, "it is made anew from the newest checkpoint")
  except UserError as error:
    log.warning("%s", error)
    return None


def write_results(workdir: epath.Path, results: Mapping[str, Any]) -> None:
  """Writes `results.json`, which also marks a run as finished."""
  if jax.process_index() == 0:
    files.replace(workdir / RESULTS, json.dumps(results, indent=2, sort_keys=True))
