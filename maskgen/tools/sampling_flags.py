"""Flags for sampling options: the fields of `sampling` of a model's objective."""

import argparse
import dataclasses
import inspect
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from maskgen.errors import UserError

if TYPE_CHECKING:
  import maskgen


def add(parser: argparse.ArgumentParser, argv: Sequence[str], *, several: bool = False) -> None:
  """Adds a flag for each sampling option of the model given by `--model`; without it, of all objectives.

  Args:
    parser: the parser to add flags to.
    argv: the command line.
    several: whether a flag takes several values, as text.

  Raises:
    UserError: if `--model` is not a model.
  """
  group = parser.add_argument_group("sampling, by default as in the config; see docs/sampling.md")
  options: dict[str, tuple[type, str]] = {}
  for defaults in _defaults(argv):
    about = _described(type(defaults))
    for field in dataclasses.fields(defaults):
      options.setdefault(field.name, (type(getattr(defaults, field.name)), about[field.name]))
  for name, (kind, text) in options.items():
    group.add_argument(f"--{name}", type=str if several else kind, help=text.rstrip(".").replace("%", "%%"))


def given(args: argparse.Namespace, sampling: Any) -> dict[str, Any]:
  """The options of an objective's `sampling` that are given on the command line."""
  names = [field.name for field in dataclasses.fields(sampling)] if sampling is not None else []
  return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def read_labels(text: str, model: "maskgen.Model") -> list[int]:
  """The classes of `--label`: "all", a name or a number, or several with commas between them.

  Raises:
    UserError: if it is none of these, or the model has no classes.
  """
  from maskgen.serving import requests

  if not model.objective.num_classes:
    raise UserError(f"--label={text}: this model was trained without classes, leave it out")
  if text == "all":
    return list(range(model.objective.num_classes))
  names = model.classes or ()
  parts = [text] if text in names else text.split(",")
  try:
    return [
      int(part) if part not in names and part.isdecimal() else requests.find_class(part, names or None)
      for part in parts
    ]
  except UserError as error:
    raise UserError(f"--label={text}: {error}") from None


def _defaults(argv: Sequence[str]) -> list[Any]:
  """The `sampling` of the model given on the command line, or of every objective."""
  from maskgen import objectives, plugins
  from maskgen.serving.loading import load_objective

  first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  first.add_argument("--model", nargs="?")
  first.add_argument("--trust_code", action="store_true")
  known = first.parse_known_args(argv)[0]
  if known.model is None:
    names = plugins.short_names(objectives.__name__, "Objective")
    found = [getattr(objectives.find({"name": name}), "sampling", None) for name in names]
  else:
    found = [getattr(load_objective(known.model, trust_code=known.trust_code)[1], "sampling", None)]
  return [sampling for sampling in found if sampling is not None]


def _described(cls: type) -> dict[str, str]:
  """The description of each field in the docstring of a dataclass."""
  attributes = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
  found = re.findall(r"^  ([\w, ]+): (.*?)(?=^  \w|\Z)", attributes, flags=re.MULTILINE | re.DOTALL)
  texts = {name: " ".join(text.split()) for names, text in found for name in names.split(", ")}
  return {field.name: texts.get(field.name, "") for field in dataclasses.fields(cls)}
