"""`maskgen.load(path)`, which returns a callable model."""

import importlib
from typing import Any

import jax
from etils import epath

from maskgen import compile_cache, hub, objectives, plugins, storage
from maskgen.errors import UserError
from maskgen.serving import published
from maskgen.serving.model import Model


def load(path: epath.PathLike, *, trust_code: bool = False) -> Model:
  """Loads a trained model from the workdir of a run or from an export.

  Args:
    path: a folder, local or on any store that `etils.epath` supports, or a step in a workdir,
      `WORKDIR/checkpoints/STEP`; or the name of a model that comes with maskgen, one of
      `maskgen.available()`, unless there is a folder of this name; or `hf://owner/name@revision` on the
      Hugging Face Hub, where a revision is a commit, tag or branch.
    trust_code: whether code in the folder may run. A model whose objective is a module of your own needs it
      unless Python finds that module elsewhere.

  Returns:
    A model of the class that its objective names, such as `maskgen.serving.TokenModel`.

  Raises:
    UserError: if there is no such model, its weights are damaged or do not fit its config, or Python does
      not find the module of its objective.
  """
  path = hub.local(path)  # once: a branch may move
  config, objective = load_objective(path, trust_code=trust_code)
  compile_cache.use()
  shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())
  variables = storage.load_variables(path, objectives.without_training_only(objective, shapes))
  model = find_class(objective)(config, objective, variables)
  model.folder = storage.locate(path)[0]
  return model


def load_objective(path: epath.PathLike, *, trust_code: bool = False) -> tuple[dict[str, Any], Any]:
  """Returns the config of a model, and its objective or what a published one has in its place; see `load`."""
  path = hub.local(path)
  config = storage.load_config(path)
  if config.get("network") in published.NETWORKS:
    return config, published.NETWORKS[config["network"]](config)
  if "objective" not in config:
    raise UserError(f"{path} has a {storage.CONFIG} without an objective: give a model that maskgen trained")
  if trust_code:
    plugins.trust(path)
  try:
    return config, objectives.build(config["objective"])
  except plugins.UnknownModuleError as error:
    code = storage.locate(path)[0] / plugins.CODE
    trust = f", or, if you trust the code in {code}, set trust_code" if code.exists() else ""
    raise UserError(
      f"{path} needs the module '{error.name}', which Python does not find: install it or add its folder to "
      f"PYTHONPATH{trust}"
    ) from None


def find_class(objective: objectives.Objective | type[objectives.Objective]) -> type[Model]:
  """Returns the class that an objective names, by default `Model`."""
  module, _, name = getattr(objective, "serving", "maskgen.serving.Model").rpartition(".")
  return getattr(importlib.import_module(module), name)
