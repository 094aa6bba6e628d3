"""A run that is interrupted, or whose machine is about to be taken away, saves and stops."""

import contextlib
import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

_SAID = b"interrupted: saves and stops after this step or evaluation; interrupt again to stop at once\n"


class Preemption:
  """Notices that this machine, or another of the run, is about to be taken away: a SIGTERM.

  With one process it also notices a first Ctrl-C; a second one raises KeyboardInterrupt.

  Attributes:
    noticed: whether there was a signal; with several processes, JAX receives it instead.
    interrupted: whether it was Ctrl-C.
  """

  def __init__(self):
    self.noticed = self.interrupted = False
    self._before: dict[int, Any] = {}
    # With several processes JAX listens, and lets all agree on a step.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._listen(signal.SIGTERM, self._notice)
      if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # neither ignored nor another's
        self._listen(signal.SIGINT, self._interrupt)

  def _listen(self, number: int, handler: Any) -> None:
    self._before[number] = signal.getsignal(number)
    signal.signal(number, handler)

  def _notice(self, *_: Any) -> None:
    self.noticed = True

  def _interrupt(self, *_: Any) -> None:
    self.noticed = self.interrupted = True
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(OSError):  # the reader of a pipe is interrupted, too
      os.write(2, _SAID)  # a logger may be in the middle of a line

  def at(self, step: int) -> bool:
    """Whether to save and stop at this step; all processes call this together, and agree."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self.noticed

  def close(self) -> None:
    """Listens no more."""
    for number, before in self._before.items():
      if before is not None:  # not installed by Python
        signal.signal(number, before)
