"""The training loop, shared by all objectives."""

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import jax
from etils import epath

from maskgen import files, storage, tree
from maskgen.errors import UserError, out_of_memory, storage_errors
from maskgen.evaluators import receipts
from maskgen.evaluators.batches import gather
from maskgen.training import cpu, receipt, writers
from maskgen.training import metrics as metrics_lib
from maskgen.training.best import Best
from maskgen.training.clock import Clock
from maskgen.training.evaluation import due_evaluators, evaluate, show
from maskgen.training.experiment import Experiment
from maskgen.training.preemption import Preemption
from maskgen.training.profiler import Profiler
from maskgen.training.start import check_nothing_lost, start

RESULTS = "results.json"
log = logging.getLogger("maskgen")


class PreemptedError(Exception):
  """The run has saved and stopped because it was preempted; the same command continues it."""


def train(experiment: Experiment, workdir: epath.Path) -> dict[str, float]:
  """Trains from the newest checkpoint of the workdir to the end, and returns the final evaluation.

  The end is the last step, or the evaluation at which `config.checkpoint.patience` is exhausted.

  A run that is killed at any moment continues from its newest checkpoint, and ends with the same parameters
  and metrics as an uninterrupted run.

  Raises:
    PreemptedError: after a SIGTERM.
    KeyboardInterrupt: after a SIGINT; the state is saved if there is one process and no second SIGINT.
    UserError: if a metric is not finite, naming the step and the metric, if memory or disk space is
      exhausted, or if the run starts beyond its last step.
  """
  try:
    # Also closed when the run fails, which completes pending saves.
    with (
      storage_errors(workdir),
      closing(storage.Checkpoints(workdir, experiment.config.checkpoint)) as checkpoints,
    ):
      variables, step = loop(experiment, workdir, checkpoints)
      results = final_results(workdir, list(experiment.evaluators))
      model = {"path": ".", "step": step, "averages": sorted(experiment.config.ema)}
      receipts.write(workdir, receipt.of_run(experiment, variables, model, results))
      return results
  except KeyboardInterrupt:
    if jax.process_count() == 1:  # pending saves are complete
      with closing(storage.Checkpoints(workdir, experiment.config.checkpoint)) as checkpoints:
        saved = checkpoints.latest()
      goes_on = "starts over, as nothing was saved yet" if saved is None else f"continues from step {saved}"
      log.info("%s: interrupted; the same command %s", workdir.name, goes_on)
    raise
  except metrics_lib.NotFiniteError as error:
    records = {"step": error.step, "records": experiment.data.describe(gather(error.records))}
    if jax.process_index() == 0:
      files.replace(workdir / metrics_lib.NOT_FINITE, json.dumps(records, indent=2))
    raise
  except jax.errors.JaxRuntimeError as error:
    if not (found := out_of_memory(error)):
      raise
    raise UserError(
      f"the memory of the devices is exhausted ({found}): raise config.accumulation or "
      "config.mesh.fsdp, lower config.batch_size, or compute in bfloat16 (config.objective.dtype)"
    ) from error


def loop(experiment: Experiment, workdir: epath.Path, checkpoints: storage.Checkpoints) -> tuple[Any, int]:
  """Trains from the newest checkpoint to the end; returns what predictions use, and the last step.

  For errors see `train`.
  """
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
  lines = [line for line in metrics_lib.read(workdir) if line["step"] <= step] if own else []
  best = Best(cfg.checkpoint, lines, checkpoints.steps())
  checkpoints.keep(best.step)
  described = writers.hyperparameters(dataclasses.asdict(cfg))
  writer = metrics_lib.Writer(workdir, step if own else 0, cfg.writers, described)
  progress = metrics_lib.Progress(workdir.name, step, total, cfg.batch_size, experiment.data.num_train)
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

  # The order is fixed: save, evaluate, next batch, step, log. A checkpoint and an evaluation at step i see
  # the same weights, and everything logged up to step i precedes the checkpoint. An evaluation that fails or
  # is killed loses no steps: a run that continues from step i evaluates unless the results are written.
  with closing(writer), closing(progress), closing(preemption), closing(batches):
    while True:
      stop = preemption.at(step)
      restored = own and step == first
      due = False
      if step > 0:
        window.check()
        began = time.monotonic()
        if stop and len(window):
          write_averages()
        due = step == total or step % cfg.checkpoint.save_steps == 0 or clock.save_is_due(step, cfg)
        # An evaluation may take long or fail. A save while averages are open would change the log.
        due |= step % cfg.log_every_steps == 0 and bool(due_evaluators(experiment, step))
        if (due or stop) and not restored:
          writer.sync()
          checkpoints.save(step, state)
          clock.saved()
        # A preempted run has no time to evaluate; it does so when it continues.
        if not stop and not (restored and writer.evaluated):
          report = evaluate(experiment, state.variables(frozen), step, best)
          if report.numbers or report.pictures or report.tables:
            skipped.flush(step)
            writer.samples(step, report)
            numbers = {**report.numbers, "timing/seconds": clock.seconds()}
            writer.numbers(step, numbers)  # marks it as written
            show(workdir.name, f"at step {step}", report.numbers)
          if best.step == step:
            checkpoints.keep(step)
            log.info("%s: the best %s so far, its checkpoint is kept", workdir.name, best)
        if due:
          cpu.release_memory()
        progress.pause(time.monotonic() - began)
      # A signal that came during the evaluation of a saved state needs no further step.
      if stop or (preemption.noticed and (due or restored)):
        raise KeyboardInterrupt if preemption.interrupted else PreemptedError
      if step == total or best.over:
        if step < total:
          log.info("%s: stops early at step %d: the best %s", workdir.name, step, best)
        return state.variables(frozen), step

      began = time.monotonic()
      batch = next(batches)
      window.waited += time.monotonic() - began

      if step == first:
        every = cfg.log_every_steps
        log.info("%s: compiling the training step, then progress every %d steps", workdir.name, every)
      profiler.before(step)
      state, values = experiment.update(state, frozen, batch)
      step += 1
      profiler.after(step, values, last=step == total)

      window.add(step, values, batch["record"])
      progress.step()
      if step % cfg.log_every_steps == 0 or step % cfg.checkpoint.save_steps == 0 or step == total:
        write_averages()


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
  device = experiment.mesh.devices.flat[0].device_kind
  records, batch_size = experiment.data.num_train, experiment.config.batch_size
  steps, epochs = experiment.total_steps, experiment.total_steps * batch_size / records
  return (
    f"parameters {sizes}; {records:,} examples for training, {experiment.data.num_eval:,} for evaluation; "
    f"{steps:,} steps of {batch_size}, {epochs:,.{0 if epochs >= 10 else 2}f} epochs; mesh {mesh} of {device}"
  )


def read_results(workdir: epath.Path) -> dict[str, Any] | None:
  """The results of a finished run; None if it is not finished, or if the file is damaged."""
  if not (workdir / RESULTS).exists():
    return None
  try:
    return files.read_json(workdir / RESULTS, "it is rebuilt from the newest checkpoint")
  except UserError as error:
    log.warning("%s", error)
    return None


def write_results(workdir: epath.Path, results: Mapping[str, Any]) -> None:
  """Writes `results.json`, which also marks a run as finished."""
  if jax.process_index() == 0:
    files.replace(workdir / RESULTS, json.dumps(results, indent=2, sort_keys=True))
