"""The first state of a run: its own checkpoint, another run's, a model's parameters, or fresh parameters."""

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import jax
from etils import epath

from maskgen.errors import UserError
from maskgen.storage import DAMAGED, Checkpoints, open_to_read, read_frozen, write_frozen
from maskgen.training import metrics


def check_nothing_lost(workdir: epath.Path, save_steps: int) -> None:
  """Checks that a workdir without a checkpoint has never had one, before a run starts from scratch in it.

  Raises:
    UserError: if it has.
  """
  steps = [line["step"] for line in metrics.read(workdir)]
  # A save waits for the previous one to complete, so a line logged after two saves proves that one completed.
  if steps and (steps[-1] - 1) // save_steps - (steps[0] - 1) // save_steps >= 2:
    raise UserError(
      f"{workdir} has no checkpoint, but its {metrics.METRICS} reaches step {steps[-1]}: restore a "
      f"checkpoint from a copy, or delete {metrics.METRICS} to train from scratch"
    )
  if list((workdir / DAMAGED).glob("*")):
    raise UserError(
      f"{workdir} has only damaged checkpoints: restore one from a copy, or rename "
      f"{workdir / DAMAGED} to train from scratch"
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
  """Returns the first state of a run. In order of precedence:

  1. the newest checkpoint of the run's own workdir: it continues;
  2. `resume`: the newest checkpoint of another workdir, optimizer state and step included;
  3. `init_from`: the parameters of another model, with a fresh optimizer, at step 0;
  4. fresh parameters.

  Frozen parts come from the same source and are written into the workdir once, so that it is self-contained.

  Args:
    workdir: of the run.
    checkpoints: of the run.
    resume: a workdir, or None.
    init_from: the model from which `init` takes parameters, or None.
    targets: trees of shapes with shardings: `state` and `frozen`.
    init: makes (state, frozen) for the last two cases.

  Returns:
    state, frozen, and where the state came from, for the log.
  """
  if checkpoints.latest() is not None:
    frozen = read_frozen(workdir, targets["frozen"])
    return checkpoints.restore(targets["state"]), frozen, f"step {checkpoints.latest()} of {workdir}"
  if resume:
    other = epath.Path(resume).expanduser()
    with closing(open_to_read(other)) as others:
      state = others.restore(targets["state"])
    frozen, origin = read_frozen(other, targets["frozen"]), f"the newest checkpoint of {resume}"
  else:
    state, frozen = init()
    origin = f"the parameters of {init_from}" if init_from else "fresh parameters"
  if jax.tree.leaves(frozen):
    write_frozen(workdir, frozen)
  return state, frozen, origin
