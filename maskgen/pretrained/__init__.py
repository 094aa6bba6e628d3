"""Trained models that come with maskgen: a folder for each, an export with a model card in README.md."""

import os
import pathlib

from etils import epath

from maskgen import hub

FOLDER = pathlib.Path(__file__).parent
CHECKPOINTS = "checkpoints"  # of a workdir, one folder per step


def available() -> tuple[str, ...]:
  """The names of the models that come with maskgen, which `maskgen.load` and `--model` take."""
  return tuple(sorted(config.parent.name for config in FOLDER.glob("*/config.json")))


def is_name(model: epath.PathLike) -> bool:
  """Whether `model` is a plain name, without a folder, and no file or folder of this name exists."""
  text = os.fspath(model)
  return bool(text) and not {"/", os.sep} & {*text} and not epath.Path(text).exists()


def find(model: epath.PathLike) -> epath.Path:
  """The folder of a model that is given as a path, also below `~`, or, if nothing is there, by name.

  Raises:
    UserError: as `hub.fetch` does, for an address on the Hub.
  """
  if hub.is_address(model):
    return hub.fetch(model)
  known = is_name(model) and os.fspath(model) in available()
  return epath.Path(FOLDER / model if known else os.path.expanduser(model))


def locate(model: epath.PathLike) -> tuple[epath.Path, int | None]:
  """As `find`, and the step that `WORKDIR/checkpoints/STEP` names; None for the newest."""
  folder = find(model)
  is_step = folder.parent.name == CHECKPOINTS and folder.name.isdecimal()
  return (folder.parent.parent, int(folder.name)) if is_step else (folder, None)
