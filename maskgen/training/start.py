"""Where a run starts from: its own checkpoint, another run's, the parameters of a model, or fresh ones."""

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import jax
from etils import epath

from maskgen.errors import UserError
from maskgen.storage import DAMAGED, Checkpoints, open_to_read, read_frozen, write_frozen
from maskgen.training import metrics


def check_nothing_lost(workdir: epath.Path, save_steps: int) -> None:
  """Checks that a workdir without a checkpoint has not had one, before a run begins anew in it.

  Raises:
    UserError: if it has.
  """
  steps = [line["step"] for line in metrics.read(workdir)]
  # A save waits until the one before it is complete, so that a line from after two saves proves one.
  if steps and (steps[-1] - 1) // save_steps - (steps[0] - 1) // save_steps >= 2:
    raise UserError(
      f"{workdir} has no checkpoint, but its {metrics.METRICS} has come to step {steps[-1]}: restore a "
      f"checkpoint from a copy, or delete {metrics.METRICS} to train from the start"
    )
  if list((workdir / DAMAGED).glob("*")):
    raise UserError(
      f"{workdir} has no checkpoint besides damaged ones: restore one from a copy, or rename "
      f"{workdir / DAMAGED} to train from the start"
    )


def start(
  workdir: epath.Path,
  checkpoints: Checkpoints,
  *,
  resume: str | None,
  init_from: str | None,
  targets: Mapping[str, Any],
  init: Callable[[], tuple[Any, Any]],
) -> tuple[Any, Any, str]:
  """Gives a run its first state. The order of precedence:

  1. the newest checkpoint of the run's own workdir: it continues;
  2. `resume`: the newest checkpoint of another workdir, optimizer state and step included;
  3. `init_from`: the parameters of another model, with a fresh optimizer, at step 0;
  4. fresh parameters.

  Frozen parts come from the same place, and are written into the workdir once: it is self-contained.

  Args:
    workdir: of the run.
    checkpoints: of the run.
    resume: a workdir, or None.
    init_from: what `init` takes parameters from, or None.
    targets: trees of shapes with shardings: `state` and `frozen`.
    init: makes (state, frozen) for the last two cases.

  Returns:
    state, frozen, and where the state came from, for the log.
  """
  if checkpoints.latest() is not None:
    frozen = read_frozen(workdir, targets["frozen"])
    return checkpoints.restore(targets["state"]), frozen, f"step {checkpoints.latest()} of {workdir}"
  if resume:
    other = epath.Path(resume)
    with closing(open_to_read(other)) as others:
      state = others.restore(targets["state"])
    frozen, origin = read_frozen(other, targets["frozen"]), f"the newest checkpoint of {resume}"
  else:
    state, frozen = init()
    origin = f"the parameters of {init_from}" if init_from else "fresh parameters"
  if jax.tree.leaves(frozen):
    write_frozen(workdir, frozen)
  return state, frozen, origin
