"""SIGTERM: a run whose machine is about to be taken away saves and stops."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


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
