"""Checkpoints (Orbax) and exports (safetensors); parameters are just trees here.

A workdir holds `config.json`, `checkpoints/STEP/` and, where the objective has frozen parts, `frozen/`,
written once. An export holds `config.json` and `weights.safetensors`. Arrays are stored flat, under their
path names (`params/main/encoder/...`), so that a part of a model can be read without knowing the rest.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from etils import epath
from jax.experimental import multihost_utils

from maskgen import config as config_lib
from maskgen import processes, tree
from maskgen.errors import TransientError, UserError

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"

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


def resolve(path: str, workdir: epath.Path) -> epath.Path:
  """Resolves `stage:NAME` in `config.pretrained` to the stage's folder beside a run's workdir."""
  kind, _, name = path.partition(":")
  return workdir.parent / name if kind == "stage" else epath.Path(path)


def start(
  workdir: epath.Path,
  checkpoints: Checkpoints,
  *,
  resume: str | None,
  targets: Mapping[str, Any],
  init: Callable[[], tuple[Any, Any]],
) -> tuple[Any, Any, str]:
  """Gives a run its first state. The order of precedence:

  1. the newest checkpoint of the run's own workdir: it continues;
  2. `resume`: the newest checkpoint of another workdir, optimizer state and step included;
  3. fresh parameters, into which the objective has put what it takes from `config.pretrained`.

  Frozen parts come from the same place, and are written into the workdir once: it is self-contained.

  Args:
    workdir: of the run.
    checkpoints: of the run.
    resume: a workdir, or None.
    targets: trees of shapes with shardings: `state` and `frozen`.
    init: makes (state, frozen) for the third case.

  Returns:
    state, frozen, and where the state came from, for the log.
  """
  if checkpoints.latest() is not None:
    frozen = _read_frozen(workdir, targets["frozen"])
    return checkpoints.restore(targets["state"]), frozen, f"step {checkpoints.latest()} of {workdir}"
  if resume:
    other = epath.Path(resume)
    with closing(open_to_read(other)) as others:
      state = others.restore(targets["state"])
    frozen, origin = _read_frozen(other, targets["frozen"]), f"the newest checkpoint of {resume}"
  else:
    state, frozen = init()
    origin = "fresh parameters"
  if jax.tree.leaves(frozen):
    _write_frozen(workdir, frozen)
  return state, frozen, origin


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


def _write_frozen(workdir: epath.Path, frozen: Any) -> None:
  data = safetensors.numpy.save(to_host(tree.flatten({"frozen": frozen})))
  if jax.process_index() == 0:
    folder = workdir / "frozen"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(data)
    manifest = {WEIGHTS: {"sha256": hashlib.sha256(data).hexdigest()}}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


def _read_frozen(workdir: epath.Path, target: Any) -> Any:
  """Reads frozen parts and checks that not a bit has changed since they were written."""
  if not jax.tree.leaves(target):
    return target
  flat = tree.flatten({"frozen": target})
  arrays = _read_frozen_arrays(workdir)
  tree.check_same(arrays, flat, f"{workdir}/frozen")
  placed = [_place(arrays[name], leaf) for name, leaf in flat.items()]
  return jax.tree.unflatten(jax.tree.structure(target), placed)


def _read_frozen_arrays(workdir: epath.Path) -> dict[str, np.ndarray]:
  folder = workdir / "frozen"
  if not folder.exists():
    return {}
  data = (folder / WEIGHTS).read_bytes()
  expected = json.loads((folder / "manifest.json").read_text())[WEIGHTS]["sha256"]
  if hashlib.sha256(data).hexdigest() != expected:
    raise UserError(
      f"{folder / WEIGHTS} is damaged (its checksum differs from manifest.json's): restore it from a copy"
    )
  return _parse(data)


def _parse(data: bytes) -> dict[str, np.ndarray]:
  """The arrays of a safetensors file, bfloat16 included, which the library does not read as numpy."""

  def dtype(name: str) -> Any:  # such as F32
    names = {"BF16": ml_dtypes.bfloat16, "BOOL": np.bool_}
    return names.get(name) or np.dtype(f"{name[0].lower()}{int(name[1:]) // 8}")

  return {
    name: np.frombuffer(found["data"], dtype(found["dtype"])).reshape(found["shape"])
    for name, found in safetensors.deserialize(data)
  }


def load_config(path: epath.PathLike) -> dict[str, Any]:
  """Reads the `config.json` of a trained model.

  Raises:
    UserError: if the folder is no workdir or export, or holds several stages.
  """
  folder = epath.Path(path)
  if not folder.exists():
    raise UserError(f"model {path} does not exist: give the workdir of a run, or an export")
  try:
    config = json.loads((folder / CONFIG).read_text())
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(
      f"{path} is no model (it has no {CONFIG}): give the workdir of a run, or an export"
    ) from None
  except json.JSONDecodeError as error:
    raise UserError(f"{folder / CONFIG} is damaged: {error}") from None
  if "stages" in config:
    choices = " or ".join(str(folder / stage) for stage in config["stages"])
    raise UserError(f"{path} holds several stages: give {choices}")
  return config


def load_variables(path: epath.PathLike, target: Any) -> Any:
  """Reads a model's variables, with moving averages in the place of the parameters that have one.

  Args:
    path: a workdir or an export.
    target: the part that is wanted, a tree of shapes, with shardings or without, under `params`, `frozen` and
      `extra`. An export's float32 is rounded where it is of a smaller type.

  Raises:
    UserError: if the path is no model, has no checkpoint yet, or differs in a name, shape or dtype.
  """
  folder = epath.Path(path).absolute()
  load_config(folder)
  flat = tree.flatten(target)
  if (folder / WEIGHTS).exists():
    try:
      arrays: dict[str, Any] = _parse((folder / WEIGHTS).read_bytes())
    except safetensors.SafetensorError as error:
      raise UserError(f"{folder / WEIGHTS} is damaged: {error}") from None
  else:
    arrays = _read_frozen_arrays(folder) | _checkpoint_arrays(folder, flat)
  found = {
    name: _rounded(array, flat.get(name))
    for name, array in arrays.items()
    if name in flat or _beside(name, flat)
  }
  tree.check_same(found, flat, f"model {path}")
  placed = [_place(found[name], leaf) for name, leaf in flat.items()]
  return jax.tree.unflatten(jax.tree.structure(target), placed)


def _rounded(array: Any, leaf: Any) -> Any:
  """An array of an export as frozen parameters may be kept: in 16 bits."""
  small = leaf is not None and leaf.dtype in (ml_dtypes.bfloat16, np.float16)
  return array.astype(leaf.dtype) if small and isinstance(array, np.ndarray) else array


def _beside(name: str, flat: Mapping[str, Any]) -> bool:
  """Whether `name` belongs to a module (`params/main/encoder`) of which something is wanted."""
  module = name.split("/")[:3]
  return any(other.split("/")[:3] == module for other in flat)


def _checkpoint_arrays(folder: epath.Path, flat: Mapping[str, Any]) -> dict[str, Any]:
  """The wanted arrays of a workdir's newest checkpoint, averages substituted; shapes alone of the others."""
  default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shapes: dict[str, Any] = {}
  averages: dict[str, str] = {}

  def choose(stored: dict[str, Any]) -> dict[str, Any]:
    shapes.update({name: leaf for name, leaf in stored.items() if name.startswith(("params/", "extra/"))})
    averages.update({name.replace("ema/", "params/", 1): name for name in stored if name.startswith("ema/")})
    return {
      averages.get(name, name): jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=leaf.sharding or default
      )
      for name, leaf in flat.items()
      if name in stored and stored[name].shape == leaf.shape
    }

  with closing(open_to_read(folder)) as checkpoints:
    restored = checkpoints.read(choose)
  names = {average: name for name, average in averages.items()}
  return shapes | {names.get(name, name): array for name, array in restored.items()}


def _place(array: Any, leaf: Any) -> jax.Array:
  if isinstance(array, jax.Array):
    return array
  if leaf.sharding is None:
    return jax.numpy.asarray(array)
  return jax.make_array_from_callback(array.shape, leaf.sharding, lambda index: array[index])


def to_host(arrays: Any) -> Any:
  """Copies a tree of arrays, however sharded, to every host as numpy arrays."""
  if jax.process_count() > 1:
    arrays = multihost_utils.process_allgather(arrays, tiled=True)
  return jax.tree.map(np.asarray, jax.device_get(arrays))


def write_export(path: epath.PathLike, config: Mapping[str, Any], variables: Any) -> None:
  """Writes a model as `config.json` and `weights.safetensors`.

  Raises:
    UserError: if the path exists and is not an empty folder, or cannot be written.
  """
  folder = epath.Path(path)
  data = safetensors.numpy.save(to_host(tree.flatten(variables)))
  try:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
      raise UserError(f"{path} is not an empty folder: give a new one for the export")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(data)
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
  except OSError as error:
    raise UserError(f"{path} is not writable ({error.strerror or error}): give another folder") from None
