"""Checkpoints (Orbax) and exports (safetensors); parameters are just trees here.

A workdir holds `config.json`, `checkpoints/STEP/` and, where the objective has frozen parts, `frozen/`,
written once. An export holds `config.json` and `weights.safetensors`. Arrays are stored flat, under their
path names (`params/main/encoder/...`), so that a part of a model can be read without knowing the rest.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from etils import epath
from jax.experimental import multihost_utils

from maskgen import config as config_lib
from maskgen import tree
from maskgen.errors import UserError

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"


class Checkpoints:
  """The checkpoints of one workdir: written in the background, complete or absent."""

  def __init__(self, workdir: epath.Path, section: config_lib.Checkpointing | None = None):
    """Opens the checkpoints of a run, or, without a section, those of another run to read them only."""
    if section is None:
      options = ocp.CheckpointManagerOptions(create=False)  # never saves: nothing is cleaned up
    else:
      options = ocp.CheckpointManagerOptions(
        max_to_keep=section.keep, cleanup_tmp_directories=True, create=True
      )
    self._manager = ocp.CheckpointManager(
      (workdir / "checkpoints").absolute(),
      options=options,
      item_handlers={"state": ocp.PyTreeCheckpointHandler()},
    )

  def latest(self) -> int | None:
    """The step of the newest complete checkpoint."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any) -> None:
    """Starts to save a state; returns when it may be changed or donated."""
    flat = tree.flatten(state)
    self._manager.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(flat)), force=True)

  def stored(self) -> dict[str, Any]:
    """Names of the newest checkpoint's arrays, with their shapes and dtypes."""
    return dict(self._manager.item_metadata(self.latest())["state"].tree)

  def read(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the named arrays of the newest checkpoint, in the order of `wanted`."""
    if not wanted:
      return {}  # which Orbax refuses to read
    target = dict(wanted)
    arguments = ocp.args.PyTreeRestore(
      item=target,
      restore_args=ocp.checkpoint_utils.construct_restore_args(target),
      partial_restore=True,
    )
    restored = self._manager.restore(self.latest(), args=ocp.args.Composite(state=arguments))["state"]
    return {name: restored[name] for name in wanted}

  def restore(self, target: Any) -> Any:
    """Restores the newest checkpoint as a tree like `target`, a tree of shapes with shardings.

    Raises:
      UserError: with a table of differences if names, shapes or dtypes are not the target's.
    """
    flat = tree.flatten(target)
    tree.check_same(self.stored(), flat, f"checkpoint {self._manager.directory / str(self.latest())}")
    return jax.tree.unflatten(jax.tree.structure(target), self.read(flat).values())

  def close(self) -> None:
    """Waits until everything is written."""
    self._manager.wait_until_finished()
    self._manager.close()


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
  return safetensors.numpy.load(data)


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
      `extra`.

  Raises:
    UserError: if the path is no model, has no checkpoint yet, or differs in a name, shape or dtype.
  """
  folder = epath.Path(path).absolute()
  load_config(folder)
  flat = tree.flatten(target)
  if (folder / WEIGHTS).exists():
    try:
      arrays: dict[str, Any] = safetensors.numpy.load((folder / WEIGHTS).read_bytes())
    except safetensors.SafetensorError as error:
      raise UserError(f"{folder / WEIGHTS} is damaged: {error}") from None
  else:
    arrays = _read_frozen_arrays(folder) | _checkpoint_arrays(folder, flat)
  found = {name: array for name, array in arrays.items() if name in flat or _beside(name, flat)}
  tree.check_same(found, flat, f"model {path}")
  placed = [_place(found[name], leaf) for name, leaf in flat.items()]
  return jax.tree.unflatten(jax.tree.structure(target), placed)


def _beside(name: str, flat: Mapping[str, Any]) -> bool:
  """Whether `name` belongs to a group (`params/main`) of which something is wanted."""
  group = name.split("/")[:2]
  return any(other.split("/")[:2] == group for other in flat)


def _checkpoint_arrays(folder: epath.Path, flat: Mapping[str, Any]) -> dict[str, Any]:
  """The wanted arrays of a workdir's newest checkpoint, averages substituted; shapes alone of the others."""
  with closing(open_to_read(folder)) as checkpoints:
    stored = checkpoints.stored()
    arrays = {name: leaf for name, leaf in stored.items() if name.startswith(("params/", "extra/"))}
    averages = {name.replace("ema/", "params/", 1): name for name in stored if name.startswith("ema/")}
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
      averages.get(name, name): jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=leaf.sharding or default
      )
      for name, leaf in flat.items()
      if name in stored and stored[name].shape == leaf.shape
    }
    restored = checkpoints.read(wanted)
  names = {average: name for name, average in averages.items()}
  return arrays | {names.get(name, name): array for name, array in restored.items()}


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
