"""Checkpoints of a run (Orbax): complete or absent, each array with a checksum."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from maskgen import config as config_lib
from maskgen import processes, tree
from maskgen.errors import TransientError, UserError

log = logging.getLogger("maskgen")


class Checkpoints:
  """The checkpoints of one workdir: written in the background, complete or absent.

  Each holds a checksum of every array, which is compared when it is read: disks and stores do turn bits.
  A damaged checkpoint is named and put aside, and the one before it is used.
  """

  def __init__(self, workdir: epath.Path, section: config_lib.Checkpointing | None = None):
    """Opens the checkpoints of a run, or, without a section, those of another run to read them only."""
    if section is None:
      options = ocp.CheckpointManagerOptions(create=False)  # never saves: nothing is cleaned up
    else:
      options = ocp.CheckpointManagerOptions(
        max_to_keep=section.keep, cleanup_tmp_directories=True, create=True
      )
    # Devices that hold the same array write a slice each; smaller slices cost more than they save.
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    state = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    items = {"state": state, "checksums": ocp.JsonCheckpointHandler()}
    self._manager = ocp.CheckpointManager(
      (workdir / "checkpoints").absolute(), options=options, item_handlers=items
    )
    self._writes = section is not None

  def latest(self) -> int | None:
    """The step of the newest complete checkpoint."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any) -> None:
    """Starts to save a state; returns when it may be changed or donated."""
    flat = tree.flatten(state)
    checksums = ocp.args.JsonSave(tree.checksums(flat))
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(flat), checksums=checksums)
    try:
      self._manager.save(step, args=items, force=True)
    except Exception as error:  # Orbax and its stores raise many kinds.
      raise self._not_written(error) from error

  def read(self, choose: Callable[[dict[str, Any]], Mapping[str, Any]]) -> dict[str, Any]:
    """Reads arrays of the newest checkpoint that is intact.

    Args:
      choose: from the names of all arrays with their shapes and dtypes, to targets for those to read.

    Raises:
      UserError: if none is intact, or by `choose`.
    """
    reasons = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        stored = dict(self._manager.item_metadata(step)["state"].tree)
      except Exception as error:  # Orbax and its stores raise many kinds.
        stored, reason = {}, _first_line(error)
      wanted = choose(stored) if stored else {}
      found: dict[str, Any] = {}
      if stored:
        found, reason = self._read_intact(step, wanted)
      if not processes.any_of(bool(reason)):
        return found
      reasons.append(f"step {step}: {reason or 'another process found it damaged'}")
      log.warning("the checkpoint of %s is damaged, the one before it is used", reasons[-1])
      self._put_aside(step)
    raise UserError(
      f"{self._manager.directory} holds no intact checkpoint ({'; '.join(reasons)}): restore one from a copy"
    )

  def _read_intact(self, step: int, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Reads arrays, and says what is wrong with them, or nothing."""
    if not wanted:
      return {}, ""  # which Orbax refuses to read
    target = dict(wanted)
    arguments = ocp.args.PyTreeRestore(
      item=target,
      restore_args=ocp.checkpoint_utils.construct_restore_args(target),
      partial_restore=True,
    )
    items = ocp.args.Composite(state=arguments, checksums=ocp.args.JsonRestore())
    try:
      restored = self._manager.restore(step, args=items)
      arrays = {name: restored["state"][name] for name in wanted}
      expected = {name: restored["checksums"][name] for name in wanted}
    except Exception as error:  # Orbax and its stores raise many kinds.
      return {}, _first_line(error)
    found = tree.checksums(arrays)
    odd = [name for name in wanted if found[name] != expected[name]]
    return arrays, f"the checksum of {odd[0]} is wrong" if odd else ""

  def _put_aside(self, step: int) -> None:
    """Moves a damaged checkpoint out of the way of a run that will come to its step again."""
    if self._writes:
      if jax.process_index() == 0:
        aside = self._manager.directory.parent / "damaged"
        aside.mkdir(parents=True, exist_ok=True)
        (self._manager.directory / str(step)).rename(aside / f"{step}-{time.time_ns()}")
      processes.wait("a damaged checkpoint is put aside")
      self._manager.reload()

  def _not_written(self, error: Exception) -> TransientError:
    latest = self.latest()
    return TransientError(
      f"{self._manager.directory} could not be written ({_first_line(error)}): make room or reach it again, "
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


def _first_line(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0][:600]


def open_to_read(workdir: epath.Path) -> Checkpoints:
  """Opens the checkpoints of another run, to read them only.

  Raises:
    UserError: if there is none.
  """
  if not list(workdir.glob("checkpoints/*")):
    raise UserError(f"{workdir} holds no checkpoint yet: train it first, or give another path")
  checkpoints = Checkpoints(workdir)
  if checkpoints.latest() is None:
    raise UserError(f"{workdir} holds no complete checkpoint yet: train it first, or give another path")
  return checkpoints
