"""The age of a run, and saves by the minute."""

import time

import jax
import numpy as np
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
    """Restarts the minutes."""
    self._saved = time.monotonic()
