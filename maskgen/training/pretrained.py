"""Sections of an objective that a pretrained model's own config fills in."""

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

from etils import epath

from maskgen import files
from maskgen.config import fields
from maskgen.errors import TransientError, UserError, storage_errors
from maskgen.training.sections import find_type

# The `name` of a section that is filled in from a pretrained model's config.
PRETRAINED = "pretrained"


def complete(config: Mapping[str, Any], root: epath.Path | None = None) -> dict[str, Any]:
  """Fills in sections of objectives from the configs of pretrained models.

  A section with name="pretrained" stands for the model that `config.pretrained` names under the section's
  key. It becomes that model's own section, with its other keys merged over it at any depth, so that a
  workdir's config.json describes its model whole. A run that continues takes the section from there: the
  pretrained model may be gone.

  Args:
    config: a plain config.
    root: the workdir, or None for a config that is not run.

  Raises:
    UserError: if a pretrained model is missing.
  """
  if "stages" not in config:
    return _complete_stage(config, root, {})
  done = dict(config)
  for stage in config["stages"]:
    if stage in done:
      done[stage] = _complete_stage(done[stage], root / stage if root else None, done)
  return done


@contextlib.contextmanager
def stored_first(root: epath.Path) -> Generator[None]:
  """While a config is loaded, `storage.find_section` looks into the workdir's config.json first."""
  stored = _stored(root)
  if not stored:
    yield
    return
  from maskgen import storage  # takes seconds

  def find(path: str) -> dict[str, Any]:
    runs = [stored, *(stored.get(stage, {}) for stage in stored.get("stages", ()))]
    return {given: section for run in runs for given, section in _sections(run).values()}.get(path, {})

  with storage.found_first(find):
    yield


def _complete_stage(
  config: Mapping[str, Any], workdir: epath.Path | None, stages: Mapping[str, Any]
) -> dict[str, Any]:
  objective, pretrained = dict(config.get("objective", {})), config.get("pretrained", {})
  for key, section in objective.items():
    if not (isinstance(section, Mapping) and section.get("name") == PRETRAINED):
      continue
    if key not in pretrained:
      raise UserError(f"config.pretrained.{key} is missing: give the path of a trained model")
    described = _describe(pretrained[key], key, workdir, stages)
    changes = {name: value for name, value in section.items() if name != "name"}
    objective[key] = fields.merge(described, changes, find_type(("objective",), described))
  return {**config, "objective": objective} if objective else dict(config)


def _describe(given: str, key: str, workdir: epath.Path | None, stages: Mapping[str, Any]) -> dict[str, Any]:
  """The section of the pretrained model at `given`, which fills `config.objective.KEY`."""
  from maskgen import storage  # takes seconds

  kind, _, name = given.partition(":")
  try:
    path, section = _sections(_stored(workdir)).get(key, ("", {})) if workdir else ("", {})
    if path == given:
      return section
    if kind == "stage" and name in stages:
      return storage.model_section(stages[name])
    return storage.model_section(storage.load_config(storage.resolve(given, workdir or epath.Path("."))))
  except TransientError:
    raise
  except UserError as error:
    raise UserError(f"config.pretrained.{key}={given}: {error}") from None


def _stored(workdir: epath.Path) -> dict[str, Any]:
  """The config.json of a workdir; empty for a new one."""
  path = workdir / "config.json"
  with storage_errors(workdir):
    return files.read_json(path, "restore it from a copy, or give another --workdir") if path.exists() else {}


def _sections(run: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
  """For each pretrained model that a run's config describes, under its current name: path and section."""
  objective = run.get("objective", {})
  cls = find_type(("objective",), objective)
  if cls is None:
    return {}
  objective = fields.current_names(cls, objective)
  pretrained = fields.current_pretrained(cls, run.get("pretrained", {}))
  return {
    key: (path, dict(objective[key]))
    for key, path in pretrained.items()
    if isinstance(objective.get(key), Mapping) and "name" in objective[key]
  }
