"""Experiment trackers beside TensorBoard: Weights & Biases and MLflow, with the methods of clu's writers.

Each has its usual environment variables for addresses, keys and projects (`WANDB_PROJECT`, `WANDB_MODE`,
`MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`). A run that continues goes on in the same run of the tracker,
whose name is in `trackers.json` of the workdir.
"""

import importlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from maskgen import files
from maskgen.errors import UserError, nearest

TRACKERS = "trackers.json"
log = logging.getLogger("maskgen")


class Wandb:
  """Weights & Biases. Steps are a metric like others, so that a run may repeat those after its checkpoint."""

  def __init__(self, module: Any, workdir: epath.Path, known: str | None):
    self._module = module
    self._run = module.init(
      id=known, name=_name(workdir), dir=os.fspath(workdir), resume="allow" if known else None
    )
    self._run.define_metric("step")
    self._run.define_metric("*", step_metric="step")
    self.id = str(self._run.id)

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    self._run.config.update(dict(hparams), allow_val_change=True)

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    self._run.log({**scalars, "step": step})

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    self._run.log({**{name: self._module.Image(image) for name, image in images.items()}, "step": step})

  def close(self) -> None:
    self._run.finish()


class Mlflow:
  """MLflow."""

  # A request takes no more parameters, and a value no more characters.
  _AT_ONCE, _LONGEST = 100, 500

  def __init__(self, module: Any, workdir: epath.Path, known: str | None):
    self._client = module.MlflowClient()
    if known is None:
      experiment = module.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "maskgen"))
      known = self._client.create_run(experiment.experiment_id, run_name=_name(workdir)).info.run_id
    self.id = str(known)
    self._entities = module.entities

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    known = self._client.get_run(self.id).data.params  # those cannot change
    new = [(name, str(value)[: self._LONGEST]) for name, value in hparams.items() if name not in known]
    for start in range(0, len(new), self._AT_ONCE):
      params = [self._entities.Param(*one) for one in new[start : start + self._AT_ONCE]]
      self._client.log_batch(self.id, params=params)

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    metrics = [self._entities.Metric(name, value, 0, step) for name, value in scalars.items()]
    self._client.log_batch(self.id, metrics=metrics)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    for name, image in images.items():
      self._client.log_image(self.id, image, f"{name}_{step:07d}.png")

  def close(self) -> None:
    self._client.set_terminated(self.id)


WRITERS: dict[str, type[Wandb] | type[Mlflow]] = {"wandb": Wandb, "mlflow": Mlflow}


class Tracker:
  """A tracker of one run, without which the run goes on: what it does not take is missing there alone."""

  def __init__(self, name: str, writer: Wandb | Mlflow):
    self._name, self._writer, self._has_failed = name, writer, False

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    self._try(lambda: self._writer.write_hparams(hparams))

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    self._try(lambda: self._writer.write_scalars(step, scalars))

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    self._try(lambda: self._writer.write_images(step, images))

  def close(self) -> None:
    self._try(self._writer.close)

  def _try(self, write: Callable[[], None]) -> None:
    try:
      write()
    except Exception as error:  # Trackers raise many kinds.
      if not self._has_failed:
        log.warning(
          "%s did not take all values (%s): the run goes on, see metrics.jsonl", self._name, _reason(error)
        )
      self._has_failed = True


def check(names: Sequence[str]) -> None:
  """Checks that the trackers of `config.writers` exist and are installed.

  Raises:
    UserError: if not.
  """
  for name in names:
    if name not in WRITERS:
      raise UserError(f"config.writers has '{name}'{nearest(name, WRITERS)}")
    _import(name)


def open_trackers(names: Sequence[str], workdir: epath.Path) -> list[Tracker]:
  """Begins or continues a run in each tracker.

  Raises:
    UserError: if one refuses.
  """
  file, remedy = workdir / TRACKERS, "delete it to begin new runs there"
  known = files.read_json(file, remedy) if file.exists() else {}
  opened: list[Tracker] = []
  for name in names:
    try:
      writer = WRITERS[name](_import(name), workdir, known.get(name))
    except Exception as error:
      raise UserError(
        f"config.writers has '{name}', which cannot start ({_reason(error)}): set it up, or leave it out"
      ) from error
    opened.append(Tracker(name, writer))
    known[name] = writer.id
  if opened:
    files.replace(file, json.dumps(known, indent=2))
  return opened


def hyperparameters(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
  """A config by dotted keys, with values that every tracker takes; keys that are None are left out."""
  flat: dict[str, bool | int | float | str] = {}
  for key, value in config.items():
    if isinstance(value, Mapping):
      flat |= {f"{key}.{inner}": found for inner, found in hyperparameters(value).items()}
    elif value is not None:
      flat[key] = value if isinstance(value, bool | int | float | str) else str(value)
  return flat


def _import(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise UserError(
      f"config.writers has '{name}', which is not installed ({error}): pip install 'maskgen[{name}]'"
    ) from None


def _reason(error: Exception) -> str:
  return " ".join(str(error).split()) or type(error).__name__


def _name(workdir: epath.Path) -> str:
  """The name of a run: of its folder, and the one above for a stage."""
  return "/".join(workdir.parts[-2:])
