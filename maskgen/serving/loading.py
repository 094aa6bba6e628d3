"""`maskgen.load(path)` returns a model that a user can call."""

import importlib

import jax
from etils import epath

from maskgen import objectives, storage
from maskgen.errors import UserError
from maskgen.serving.model import Model


def load(path: epath.PathLike) -> Model:
  """Loads a trained model, from the workdir of a run or an export.

  Args:
    path: a folder, local or on any store that `etils.epath` reaches.

  Returns:
    A model of the class that its objective names, such as `maskgen.serving.TokenModel`.

  Raises:
    UserError: if the folder is no model, or its weights are damaged or do not fit its config.
  """
  config = storage.load_config(path)
  if "objective" not in config:
    raise UserError(f"{path} holds a network without an objective: give a model that maskgen trained")
  objective = objectives.build(config["objective"])
  shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())
  return find_class(objective)(config, objective, storage.load_variables(path, shapes))


def find_class(objective: objectives.Objective | type[objectives.Objective]) -> type[Model]:
  """The class that an objective names, by default `Model`."""
  module, _, name = getattr(objective, "serving", "maskgen.serving.Model").rpartition(".")
  return getattr(importlib.import_module(module), name)
