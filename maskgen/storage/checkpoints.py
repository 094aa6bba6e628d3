"""Checkpoints of a run (Orbax): complete or absent, each array with a checksum."""

import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from maskgen import config as config_lib
from maskgen import processes, tree
from maskgen.errors import TransientError, UserError, lost_process
from maskgen.pretrained import CHECKPOINTS

DAMAGED = "damaged"
# TensorStore's status codes for files with wrong content, or missing from a checkpoint.
_DAMAGE = ("DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE")
_ELSEWHERE = "another process found it damaged"

log = logging.getLogger("maskgen")


class _Kept:
  """Orbax's preservation policy: the newest checkpoints, and one of another step.

  Its own `best_fn` ranks all checkpoints by their metrics, and may so delete the newest.
  """

  def __init__(self, newest: int):
    self.newest = newest
    self.step: int | None = None

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    first = len(checkpoints) - self.newest
    return [place >= first or found.step == self.step for place, found in enumerate(checkpoints)]


class Checkpoints:
  """The checkpoints of one workdir: written in the background, complete or absent.

  Each holds a checksum of every array, compared on reading, since disks and stores do flip bits. A checkpoint
  that is proven to be damaged is named, and moved aside once an older one turns out to be intact. One that
  cannot be read stays in place, and the run ends.
  """

  def __init__(self, workdir: epath.Path, section: config_lib.Checkpointing | None = None):
    """Opens the checkpoints of a run, or without a section, those of another run for reading only."""
    self._kept = _Kept(section.keep if section else 0)
    if section is None:
      options = ocp.CheckpointManagerOptions(create=False)  # never saves: nothing is cleaned up
    else:
      options = ocp.CheckpointManagerOptions(
        preservation_policy=self._kept, cleanup_tmp_directories=True, create=True
      )
    # Devices that hold the same array write a slice each; smaller slices cost more than they save.
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    self._state = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    self._checksums = ocp.JsonCheckpointHandler()
    items = {"state": self._state, "checksums": self._checksums}
    self._manager = ocp.CheckpointManager(
      (workdir / CHECKPOINTS).absolute(), options=options, item_handlers=items
    )
    self._writes = section is not None

  def latest(self) -> int | None:
    """The step of the newest complete checkpoint."""
    return self._manager.latest_step()

  def steps(self) -> Sequence[int]:
    """The steps of all complete checkpoints."""
    return list(self._manager.all_steps())

  def keep(self, step: int | None) -> None:
    """Keeps the checkpoint of a step beside the newest ones, and no longer that of the last call."""
    self._kept.step = step

  def save(self, step: int, state: Any) -> None:
    """Starts saving a state; returns when it may be modified or donated."""
    flat = tree.flatten(state)
    checksums = ocp.args.JsonSave(tree.checksums(flat))
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(flat), checksums=checksums)
    try:
      self._manager.save(step, args=items, force=True)
    except Exception as error:  # Orbax and its stores raise many kinds.
      raise self._not_written(error) from error

  def read(
    self, choose: Callable[[dict[str, Any]], Mapping[str, Any]], only: int | None = None
  ) -> dict[str, Any]:
    """Reads arrays of the newest intact checkpoint; newer damaged ones are moved aside.

    Args:
      choose: maps the names of all arrays, with shapes and dtypes, to targets for those to read.
      only: the step to read instead of the newest.

    Raises:
      UserError: if none is intact or there is no such step, or by `choose`.
      TransientError: if one cannot be read, which says nothing about its content.
    """
    damaged: dict[int, str] = {}
    steps = sorted(self._manager.all_steps(), reverse=True)
    if only is not None and only not in steps:
      known = ", ".join(map(str, reversed(steps)))
      raise UserError(f"{self._manager.directory} holds no step {only}: give one of {known}")
    for step in steps if only is None else [only]:
      found, reason = self._read_intact(step, choose)
      if found is not None:
        self._move_aside(damaged)
        return found
      damaged[step] = reason
      log.warning("the checkpoint of step %d is damaged (%s): trying the one before it", step, reason)
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
    raise UserError(
      f"{self._manager.directory} holds no intact checkpoint ({reasons}): restore one from a copy"
    )

  def _read_intact(
    self, step: int, choose: Callable[[dict[str, Any]], Mapping[str, Any]]
  ) -> tuple[dict[str, Any] | None, str]:
    """Reads arrays, or says how the checkpoint is damaged; the result is the same in all processes.

    Processes agree after each part, since each reads its own files and the next part may need all of them.
    Orbax's handlers are called directly for the same reason: its manager ends in a barrier that a failing
    process never reaches.
    """
    folder = self._manager.directory / str(step)

    def read_description() -> tuple[dict[str, Any], dict[str, int]]:
      stored = dict(self._state.metadata(folder / "state").tree)
      checksums = self._checksums.restore(folder / "checksums")
      if stored.keys() != checksums.keys():
        raise ValueError("the names of arrays and of checksums differ")
      if checksums.get("step", number := _checksum_of(step)) != number:
        raise ValueError("it holds the state of another step")
      return stored, checksums

    description, reason = self._agree(step, read_description)
    if description is None:
      return None, reason
    stored, expected = description
    wanted = dict(choose(stored))
    if not wanted:
      return {}, ""  # which Orbax refuses to read
    arguments = ocp.args.PyTreeRestore(
      item=wanted,
      restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
      partial_restore=True,
    )
    arrays, reason = self._agree(step, lambda: self._state.restore(folder / "state", args=arguments))
    if arrays is None:
      return None, reason
    arrays = {name: arrays[name] for name in wanted}
    found = tree.checksums(arrays)
    odd = [name for name in wanted if found[name] != expected[name]]
    if processes.any_of(bool(odd)):
      return None, f"the checksum of {odd[0]} is wrong" if odd else _ELSEWHERE
    return arrays, ""

  def _agree(self, step: int, read: Callable[[], Any]) -> tuple[Any, str]:
    """Reads something in each process; returns None and the reason in all if it is damaged in one.

    Raises:
      TransientError: in all processes, if it cannot be read in one.
    """
    found, damage, trouble = None, "", ""
    try:
      found = read()
    except Exception as error:  # Orbax and its stores raise many kinds.
      if _shows_damage(error):
        damage = _first_line(error)
      else:
        trouble = _first_line(error)
    if processes.any_of(bool(trouble)):
      raise TransientError(
        f"step {step} of {self._manager.directory} cannot be read ({trouble or 'see the other processes'}): "
        "nothing was changed, make it readable and start the same command"
      )
    if processes.any_of(bool(damage)):
      return None, damage or _ELSEWHERE
    return found, ""

  def _move_aside(self, steps: Iterable[int]) -> None:
    """Moves damaged checkpoints out of the way of a run that will reach their steps again."""
    if not self._writes or not steps:
      return
    if jax.process_index() == 0:
      aside = self._manager.directory.parent / DAMAGED
      aside.mkdir(parents=True, exist_ok=True)
      for step in steps:
        (self._manager.directory / str(step)).rename(aside / f"{step}-{time.time_ns()}")
    processes.wait("damaged checkpoints are moved aside")
    self._manager.reload()

  def _not_written(self, error: Exception) -> UserError:
    if lost := lost_process(error):
      return lost
    if not self._manager.directory.exists():
      return UserError(
        f"{self._manager.directory} was moved or deleted during the run: start the same command "
        "with the --workdir where it is now"
      )
    latest = self.latest()
    return TransientError(
      f"{self._manager.directory} could not be written ({_first_line(error)}): free space or restore access, "
      f"and start the same command; {'no step' if latest is None else f'step {latest}'} is saved"
    )

  def restore(self, target: Any) -> Any:
    """Restores the newest intact checkpoint as a tree like `target`, a tree of shapes with shardings.

    Raises:
      UserError: with a table of differences if names, shapes or dtypes are not the target's.
    """
    flat = tree.flatten(target)

    def choose(stored: dict[str, Any]) -> dict[str, Any]:
      tree.check_same(stored, flat, f"a checkpoint in {self._manager.directory}")
      return flat

    arrays = self.read(choose)
    return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in flat])

  def close(self) -> None:
    """Waits until everything is written.

    Raises:
      UserError: if it could not be.
    """
    try:
      self._manager.wait_until_finished()
      self._manager.close()
    except Exception as error:  # Orbax and its stores raise many kinds.
      raise self._not_written(error) from error


def _shows_damage(error: Exception) -> bool:
  """Whether an error shows that a checkpoint's content is wrong, not only that it cannot be read now."""
  if code := re.match(r"([A-Z_]+): ", str(error)):
    return code[1] in _DAMAGE
  kinds = (ValueError, LookupError, AttributeError, TypeError, FileNotFoundError)  # from parsers
  return isinstance(error, kinds)


def _checksum_of(step: int) -> int:
  return tree.checksums({"step": jnp.int32(step)})["step"]


def _first_line(error: Exception) -> str:
  line = (str(error).strip() or type(error).__name__).splitlines()[0]
  return re.sub(r" \[(tensorstore_spec|source locations)=.*", "", line)[:600]


def open_to_read(workdir: epath.Path) -> Checkpoints:
  """Opens the checkpoints of another run for reading only.

  Raises:
    UserError: if there is none.
  """
  if not list(workdir.glob(f"{CHECKPOINTS}/*")):
    raise UserError(f"{workdir} holds no checkpoint yet: train it first, or give another path")
  checkpoints = Checkpoints(workdir)
  if checkpoints.latest() is None:
    raise UserError(f"{workdir} holds no complete checkpoint yet: train it first, or give another path")
  return checkpoints
