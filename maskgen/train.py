"""The loop: one for every objective."""

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from maskgen import checkpoint as checkpoint_lib
from maskgen import config as config_lib
from maskgen import metrics as metrics_lib
from maskgen import tree
from maskgen.errors import UserError
from maskgen.experiment import Experiment

RESULTS = "results.json"
log = logging.getLogger("maskgen")


def train(experiment: Experiment, workdir: epath.Path) -> dict[str, float]:
  """Trains from wherever the workdir stands to the end, and returns the final evaluation.

  A run that is killed at any moment continues from its newest checkpoint and ends with the same
  parameters and metrics as one that is not.

  Raises:
    UserError: if a loss or another metric is not finite, naming the step and the metric.
  """
  cfg, total = experiment.config, experiment.total_steps
  checkpoints = checkpoint_lib.Checkpoints(workdir, cfg.checkpoint)
  state, frozen, origin = checkpoint_lib.start(
    workdir,
    checkpoints,
    resume=cfg.resume,
    pretrained={name: resolve(path, workdir) for name, path in cfg.pretrained.items()},
    targets=experiment.targets,
    init=experiment.init,
  )
  step = restored = int(state.step)
  own = checkpoints.latest() is not None
  log.info("%s: %s", workdir.name, describe(experiment))
  log.info("%s: starts from %s", workdir.name, origin)
  writer = metrics_lib.Writer(workdir, step)
  progress = metrics_lib.Progress(workdir.name, step, total, cfg.batch_size)
  window = Window()
  clock = Clock(writer.seconds_before, cfg.checkpoint.save_minutes)
  batches = experiment.train_batches(step)
  profiler = Profiler(workdir, cfg.profile)

  # The order is fixed: evaluate, save, next batch, step, log. So a checkpoint and an evaluation at step i see
  # the same weights, the data has not moved, and what was logged up to step i is older than the checkpoint.
  while True:
    # A checkpoint of our own at this step was saved after its evaluation.
    if step > 0 and not (own and step == restored):
      began = time.monotonic()
      numbers, pictures = evaluate(experiment, state.variables(frozen), step)
      if numbers or pictures:
        writer.pictures(step, pictures)
        writer.numbers(step, numbers)
        show(workdir.name, step, numbers)
      if step == total or step % cfg.checkpoint.save_steps == 0 or clock.save_is_due(step, cfg):
        checkpoints.save(step, state)
        clock.saved()
      progress.pause(time.monotonic() - began)
    if step == total:
      break

    began = time.monotonic()
    batch = next(batches)
    window.waited += time.monotonic() - began

    profiler.before(step)
    state, values = experiment.update(state, frozen, batch)
    step += 1
    profiler.after(step, values)

    window.add(step, values)
    progress.step()
    if step % cfg.log_every_steps == 0 or step % cfg.checkpoint.save_steps == 0 or step == total:
      averages = window.close()
      averages |= progress.report(step, averages)
      writer.numbers(step, averages | {"timing/seconds": clock.seconds()})

  progress.close()
  checkpoints.close()
  writer.close()
  return final_results(workdir, list(cfg.evals))


def evaluate(
  experiment: Experiment, variables: Any, step: int | None
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
  """Runs the evaluations that are due at a step, or all of them at the last step and for `step=None`."""
  numbers: dict[str, float] = {}
  pictures: dict[str, np.ndarray] = {}
  for name, (every, evaluator) in experiment.evaluators.items():
    if step is None or step == experiment.total_steps or step % every == 0:
      report = evaluator.run(variables, jax.random.key(experiment.config.seed))
      numbers |= {f"{name}/{key}": float(value) for key, value in report.numbers.items()}
      pictures |= {f"{name}/{key}": picture for key, picture in report.pictures.items()}
  return numbers, pictures


def evaluate_newest(experiment: Experiment, workdir: epath.Path) -> dict[str, float]:
  """Runs all evaluations on the newest checkpoint of a workdir; changes nothing but `samples/`."""
  parts = {
    "params": experiment.targets["state"].params,
    "frozen": experiment.targets["frozen"],
    "extra": experiment.targets["state"].extra,
  }
  variables = checkpoint_lib.load_variables(workdir, parts)
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


def resolve(path: str, workdir: epath.Path) -> str:
  """Resolves `stage:NAME` in `config.pretrained` to the stage's folder beside a run's workdir."""
  kind, _, name = path.partition(":")
  return str(workdir.parent / name) if kind == "stage" and name else path


def describe(experiment: Experiment) -> str:
  """One line on the size of a run."""
  groups = experiment.targets["state"].params
  sizes = ", ".join(f"{name} {tree.count(group):,}" for name, group in groups.items())
  mesh = " x ".join(f"{axis}={size}" for axis, size in experiment.mesh.shape.items())
  return (
    f"parameters {sizes}; {experiment.data.num_train:,} training examples; "
    f"{experiment.total_steps:,} steps of {experiment.config.batch_size}; mesh {mesh}"
  )


def show(name: str, step: int | str, numbers: Mapping[str, float]) -> None:
  """Logs an evaluation, one line per number."""
  if jax.process_index() == 0:
    lines = "".join(f"\n  {key:<36} {value:.4g}" for key, value in sorted(numbers.items()))
    log.info("%s evaluation at step %s%s", name, step, lines)


def write_results(workdir: epath.Path, results: Mapping[str, Any]) -> None:
  """Writes `results.json`, which also marks a run as finished."""
  if jax.process_index() == 0:
    temporary = workdir / f"{RESULTS}.tmp"
    temporary.write_text(json.dumps(results, indent=2, sort_keys=True))
    temporary.rename(workdir / RESULTS)


class Window:
  """Averages metrics between two log lines, one step behind the device, which so never waits."""

  def __init__(self):
    self.waited = 0.0
    self._pending: tuple[int, Any] | None = None
    self._sums: dict[str, float] = {}
    self._count = 0
    self._began = time.monotonic()

  def add(self, step: int, values: Mapping[str, jax.Array]) -> None:
    """Takes the metrics of a step that may still be running, and looks at those of the step before."""
    self._collect()
    self._pending = (step, values)

  def _collect(self) -> None:
    if self._pending is None:
      return
    step, values = self._pending
    for name, value in jax.device_get(values).items():
      if not np.isfinite(value):
        raise UserError(
          f"step {step}: {name} is {float(value)}; the newest checkpoint is from before it: lower the "
          "learning rate or clip the gradient (optimizer.*.clip_norm) in a new workdir with config.resume"
        )
      self._sums[name] = self._sums.get(name, 0.0) + float(value)
    self._pending = None
    self._count += 1

  def close(self) -> dict[str, float]:
    """Returns the averages, with the share of time spent waiting for data, and starts anew."""
    self._collect()
    averages = {name: total / self._count for name, total in sorted(self._sums.items())}
    now = time.monotonic()
    averages["input_wait"] = self.waited / max(now - self._began, 1e-9)
    self.waited, self._sums, self._count, self._began = 0.0, {}, 0, now
    return averages


class Clock:
  """The run's age over all restarts, and when to save by the minute."""

  def __init__(self, seconds_before: float, save_minutes: float):
    self._began = self._saved = time.monotonic()
    self._before = seconds_before
    self._interval = 60.0 * save_minutes

  def seconds(self) -> float:
    """Seconds of wall time that the run has taken so far."""
    return self._before + time.monotonic() - self._began

  def save_is_due(self, step: int, cfg: config_lib.RunConfig) -> bool:
    """Whether to save by the minute; only where a log line closed, so that averages survive a restart."""
    if step % cfg.log_every_steps:
      return False
    due = time.monotonic() - self._saved > self._interval
    if jax.process_count() > 1:  # one clock decides for all
      due = bool(multihost_utils.broadcast_one_to_all(np.asarray(due)))
    return due

  def saved(self) -> None:
    """Starts the minutes anew."""
    self._saved = time.monotonic()


class Profiler:
  """Records a window of steps for TensorBoard's profile page."""

  def __init__(self, workdir: epath.Path, section: config_lib.Profile):
    self._workdir, self._section = workdir, section

  def before(self, step: int) -> None:
    """Starts at the window's first step."""
    if self._section.steps and step == self._section.start_step:
      jax.profiler.start_trace(str(self._workdir))

  def after(self, step: int, values: Any) -> None:
    """Stops when the window's last step is done."""
    if self._section.steps and step == self._section.start_step + self._section.steps:
      jax.block_until_ready(values)
      jax.profiler.stop_trace()
