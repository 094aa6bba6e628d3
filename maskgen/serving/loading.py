"""The front door: `maskgen.load(path)` gives a model that a user can call."""

import jax
from etils import epath

from maskgen import objectives, storage
from maskgen.errors import UserError
from maskgen.serving.model import Model


def load(path: epath.PathLike) -> Model:
  """Loads a trained model, from the workdir of a run or an export.

  Args:
    path: a folder, local or on any store that `etils.epath` reaches.

  Raises:
    UserError: if the folder is no model, or its weights are damaged or do not fit its config.
  """
  config = storage.load_config(path)
  if "objective" not in config:
    raise UserError(f"{path} holds a network without an objective: give a model that maskgen trained")
  objective = objectives.build(config["objective"])
  shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())
  return Model(config, objective, storage.load_variables(path, shapes))
