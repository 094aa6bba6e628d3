"""A window of steps, recorded for TensorBoard's profile page."""

from typing import Any

import jax
from etils import epath

from maskgen import config as config_lib


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
