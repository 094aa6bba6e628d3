"""Configs whose model is a trained one: the data and evaluations of a config, the objective of a model."""

from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from maskgen import objectives, storage
from maskgen.errors import UserError

# For groups of parameters that the config does not train.
_OPTIMIZER = {"learning_rate": 1e-4}


def of_model(config: Mapping[str, Any], path: epath.PathLike) -> dict[str, Any]:
  """A config with the objective of a trained model in the place of its own.

  The model holds its frozen parts, so that its pretrained models are not read.

  Args:
    config: a plain config of one stage.
    path: a workdir, a step in it, an export or converted weights, or the name of a model that comes with
      maskgen.

  Raises:
    UserError: if the path is not a model, or none of an objective.
  """
  section = storage.load_config(path).get("objective")
  if section is None:
    raise UserError(
      f"{path} is a network without an objective: give a workdir, or an export of a whole model"
    )
  objective = objectives.build(section, f"the objective of {path}")
  pretrained = objective.pretrained_shapes()
  groups = jax.eval_shape(objective.init, jax.random.key(0), pretrained)["params"]
  trained = config["optimizer"]
  same = section["name"] == config["objective"].get("name") and groups.keys() == trained.keys()
  return {
    **config,
    "objective": section,
    "optimizer": {group: trained[group] if same else _OPTIMIZER for group in groups},
    "ema": config.get("ema", {}) if same else dict.fromkeys(getattr(objective, "averages", ()), 0.0),
    "sharding": config.get("sharding", ()) if same else (),
    "pretrained": dict.fromkeys(pretrained, str(path)),
    "resume": None,
    "init_from": None,
    "init_fresh": "",
  }
