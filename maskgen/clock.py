"""When things happen in a run: its age, saves by the minute, the profiler's window."""

import time
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from maskgen import config as config_lib


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
    self._workdir, self._section, self._recording = workdir, section, False

  def before(self, step: int) -> None:
    """Starts at the window's first step."""
    if self._section.steps and step == self._section.start_step:
      jax.profiler.start_trace(str(self._workdir))
      self._recording = True

  def after(self, step: int, values: Any, *, last: bool) -> None:
    """Stops when the last step of the window, or of the run, is done."""
    if self._recording and (last or step == self._section.start_step + self._section.steps):
      jax.block_until_ready(values)
      jax.profiler.stop_trace()
      self._recording = False
