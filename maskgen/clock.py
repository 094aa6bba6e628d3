"""When things happen in a run: its age, saves by the minute, preemption, the profiler's window."""

import signal
import threading
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


class Preemption:
  """Notices that this machine, or another of the run, is about to be taken away: a SIGTERM."""

  def __init__(self):
    self._noticed = False
    self._before = None
    # With several processes JAX listens, and lets all agree on a step.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._notice)

  def _notice(self, *_: Any) -> None:
    self._noticed = True

  def at(self, step: int) -> bool:
    """Whether to save and stop at this step; all processes call this together, and agree."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._noticed

  def close(self) -> None:
    """Listens no more."""
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)


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
