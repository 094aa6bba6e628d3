"""Metrics of a run: `metrics.jsonl`, TensorBoard, pictures, tables and progress."""

import csv
import io
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from maskgen import files, images
from maskgen.data import cpu_tf
from maskgen.errors import UserError
from maskgen.evaluators import Report
from maskgen.training import writers

METRICS = "metrics.jsonl"
NOT_FINITE = "not_finite.json"
_SUMMARY_WIDTH = 80
log = logging.getLogger("maskgen")


def read(workdir: epath.Path) -> list[dict[str, Any]]:
  """Reads `metrics.jsonl`, without a last line that a kill truncated.

  Raises:
    UserError: if another line is damaged.
  """
  path = workdir / METRICS
  if not path.exists():
    return []
  return files.read_json_lines(path, {"step": int}, "restore it from a copy, or delete this line")


class Writer:
  """Writes numbers, pictures and tables, also to TensorBoard and trackers; only process 0 touches files.

  `metrics.jsonl` is truncated to the step from which the run continues, so that a killed and restarted run
  writes the same lines as an uninterrupted one.
  """

  def __init__(
    self,
    workdir: epath.Path,
    step: int,
    trackers: Sequence[str] = (),
    hyperparameters: Mapping[str, bool | int | float | str] | None = None,
  ):
    """Opens the files of a run.

    Args:
      workdir: of the run.
      step: from which it continues.
      trackers: names in `writers.WRITERS`.
      hyperparameters: for TensorBoard and the trackers, by name.
    """
    self._workdir = workdir
    self._active = jax.process_index() == 0
    kept = [line for line in read(workdir) if line["step"] <= step] if step else []
    self.seconds_before = max((line.get("timing/seconds", 0.0) for line in kept), default=0.0)
    # Whether the step from which the run continues was evaluated; only averages have `input_wait`.
    self.evaluated = any(line["step"] == step and "input_wait" not in line for line in kept)
    if not self._active:
      return
    self._writers = [*_open_tensorboard(workdir), *writers.open_trackers(trackers, workdir)]
    for writer in self._writers if hyperparameters else ():
      writer.write_hparams(hyperparameters)
    files.replace(workdir / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
    self._file = (workdir / METRICS).open("a")
    if step and (not kept or kept[-1]["step"] < step):  # lines precede their checkpoint
      log.warning("%s lacks lines from before step %d, which are lost", workdir / METRICS, step)

  def numbers(self, step: int, values: Mapping[str, float]) -> None:
    """Appends one line `{"step": step, name: value, ...}`."""
    if self._active:
      self._file.write(json.dumps({"step": step, **values}) + "\n")
      self._file.flush()
      for writer in self._writers:
        writer.write_scalars(step, values)

  def samples(self, step: int, report: Report) -> None:
    """Writes pictures and tables to `samples/`, see `write_samples`, and the pictures to TensorBoard."""
    if self._active:
      self.sync()
      write_samples(self._workdir, f"{step:07d}", report)
      for writer in self._writers:
        writer.write_images(step, report.pictures)

  def sync(self) -> None:
    """Flushes all lines to disk, and checks that the workdir's path still leads there.

    Raises:
      UserError: if it does not.
    """
    if not self._active or "://" in str(self._workdir):
      return
    os.fsync(self._file.fileno())
    path = self._workdir / METRICS
    if not path.exists() or not os.path.samestat(os.fstat(self._file.fileno()), os.stat(path)):
      raise UserError(
        f"{path} was moved, replaced or deleted during the run: start the same command with the "
        "--workdir where the run's checkpoints are now"
      )

  def close(self) -> None:
    """Flushes everything."""
    if self._active:
      for writer in self._writers:
        writer.close()
      self._file.close()


def write_samples(workdir: epath.Path, label: str, report: Report) -> None:
  """Writes enlarged pictures and tables as `samples/NAME_LABEL.png` and `.csv`, with `/` in names as `_`."""
  if jax.process_index() == 0:
    (workdir / "samples").mkdir(parents=True, exist_ok=True)
    contents = {f"{name}_{label}.png": images.png(images.enlarge(p)) for name, p in report.pictures.items()}
    contents |= {f"{name}_{label}.csv": _csv(rows) for name, rows in report.tables.items()}
    for name, content in contents.items():
      files.replace(workdir / "samples" / name.replace("/", "_"), content, sync=False)


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
  text = io.StringIO(newline="")
  writer = csv.DictWriter(text, rows[0], lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue().encode()


class Progress:
  """A bar on a terminal, plain lines elsewhere: step, loss, throughput, time left."""

  def __init__(self, name: str, first_step: int, total_steps: int, batch_size: int, examples: int):
    """Starts at a step.

    Args:
      name: of the run.
      first_step: the step.
      total_steps: the last step.
      batch_size: examples per step.
      examples: the number of examples of an epoch.
    """
    self._examples = examples
    self._total, self._batch_size = total_steps, batch_size
    self._name = name
    self._bar = None
    if sys.stderr.isatty() and jax.process_index() == 0:
      self._bar = tqdm(desc=name, initial=first_step, total=total_steps, unit="step", dynamic_ncols=True)
    self._first: int | None = first_step
    self._mark, self._time, self._paused = first_step, time.monotonic(), 0.0

  def step(self) -> None:
    """Counts one step."""
    if self._first is not None:  # the first step compiles and says nothing about later ones
      self._mark, self._time, self._paused = self._first + 1, time.monotonic(), 0.0
      self._first = None
    if self._bar is not None:
      self._bar.update()

  def pause(self, seconds: float) -> None:
    """Excludes time spent on evaluation and saving from the throughput."""
    self._paused += seconds

  def report(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
    """Shows losses and metrics of the objective, and returns the throughput since the last report."""
    now = time.monotonic()
    rate = (step - self._mark) / max(now - self._time - self._paused, 1e-9)
    self._mark, self._time, self._paused = step, now, 0.0
    text = summary(values)
    epoch = f"epoch {step * self._batch_size / self._examples:.4g}"
    if self._bar is not None:
      self._bar.set_postfix_str(f"{epoch}, {text}")
    elif jax.process_index() == 0:
      shown = [f"{self._name} step {step}/{self._total}, {epoch}", text]
      if rate:  # not before the second step
        minutes, seconds = divmod(round((self._total - step) / rate), 60)
        shown += [f"{rate * self._batch_size:.1f} images/s", f"{minutes}:{seconds:02d} left"]
      log.info(" | ".join(shown))
    return {"timing/steps_per_second": rate, "timing/images_per_second": rate * self._batch_size}

  def close(self) -> None:
    """Closes the progress bar."""
    if self._bar is not None:
      self._bar.close()


def summary(values: Mapping[str, float]) -> str:
  """The losses, then as many metrics of the objective as fit on a line."""
  losses = [name for name in values if name.startswith("train/loss/")]
  metrics = [name for name in values if name.startswith("train/") and name.count("/") == 1]
  text = ""
  for name in (*losses, *metrics):
    part = f"{name.removeprefix('train/')} {values[name]:.4g}"
    if text and len(text) + len(part) > _SUMMARY_WIDTH:
      break
    text = f"{text}, {part}" if text else part
  return text


class NotFiniteError(UserError):
  """A metric that is not finite.

  Attributes:
    records: the records of its step, int32 [b].
  """

  def __init__(self, step: int, name: str, value: float, records: jax.Array):
    super().__init__(
      f"step {step}: {name} is {value}; the newest checkpoint is from before it, {NOT_FINITE} names its "
      "records: lower the learning rate or clip the gradient (optimizer.*.clip_norm) in a new workdir with "
      "config.resume"
    )
    self.step = step
    self.records = records


class Window:
  """Averages metrics between two log lines, one step behind the device, so that it never waits."""

  def __init__(self):
    self.waited = 0.0
    self._pending: tuple[int, Any, Any] | None = None
    self._sums: dict[str, float] = {}
    self._count = 0
    self._began = time.monotonic()

  def __len__(self) -> int:
    return self._count + (self._pending is not None)

  def add(self, step: int, values: Mapping[str, jax.Array], records: jax.Array) -> None:
    """Adds the metrics of a step that may still be running, after checking those of the previous step."""
    self.check()
    self._pending = (step, values, records)

  def check(self) -> None:
    """Waits for the newest metrics.

    Raises:
      NotFiniteError: if one is not.
    """
    if self._pending is None:
      return
    step, values, records = self._pending
    for name, value in jax.device_get(values).items():
      if not np.isfinite(value):
        raise NotFiniteError(step, name, float(value), records)
      self._sums[f"train/{name}"] = self._sums.get(f"train/{name}", 0.0) + float(value)
    self._pending = None
    self._count += 1

  def close(self) -> dict[str, float]:
    """Returns the averages, with the fraction of time spent waiting for data, and resets the window."""
    self.check()
    averages = {name: total / self._count for name, total in sorted(self._sums.items())}
    now = time.monotonic()
    averages["input_wait"] = self.waited / max(now - self._began, 1e-9)
    self.waited, self._sums, self._count, self._began = 0.0, {}, 0, now
    return averages


def _open_tensorboard(workdir: epath.Path) -> list[Any]:
  """The writer for TensorBoard, if TensorFlow is there."""
  try:
    cpu_tf.load()  # before clu imports it, and lets it have accelerators
    from clu import metric_writers
  except (ImportError, UserError) as error:
    log.warning("there will be no files for TensorBoard (%s); %s has all numbers", error, METRICS)
    return []
  return [metric_writers.SummaryWriter(str(workdir))]
