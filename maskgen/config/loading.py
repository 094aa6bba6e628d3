"""Loads config files `FILE[:key=value,...]`, with overrides from the command line.

A config is a Python file whose function `get_config(arg)` returns an `ml_collections.ConfigDict`. It may
import and name modules next to it, see `maskgen.plugins`.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import os
import pathlib
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from maskgen import plugins
from maskgen.config import fields
from maskgen.config.schema import RunConfig
from maskgen.errors import UserError, nearest

try:
  import ml_collections
except ModuleNotFoundError:  # benchmarks of recipes do without config files
  ml_collections = None

# Sections whose keys are defined by the classes that they name, not by `RunConfig`.
OPEN = ("objective", "data", "optimizer", "evals")
# The type of an evaluation of a run or of one of its stages.
_EVALUATION_TYPE = re.compile(r"(?:(\w+)\.)?evals\.(\w+)\.type")

_QUOTED = r"'[^']*'|\"[^\"]*\""
# A key and, with the equals sign, its text.
_ITEM = re.compile(rf"([^=,]+)(=(?:{_QUOTED}|[^,]*))?(?:,+|$)")

_CONFIG_FOLDERS = (
  pathlib.Path(__file__).parents[1] / "configs",  # in an installed package
  pathlib.Path(__file__).parents[2] / "configs",  # in a checkout
)


def parse_arg(arg: str | None, **defaults: Any) -> SimpleNamespace:
  """Parses a config's arguments: the part of `--config=FILE:tiny,batch_size=64` after the colon.

  Args:
    arg: comma-separated `key=value` items; a bare `key` means `key=True`. Quote a text that contains a comma.
    **defaults: the keys that the config accepts with their defaults, whose types values must have.

  Raises:
    UserError: for a key that is not among the defaults, or a value of another type.
  """
  values = dict(defaults)
  before = ""  # the text before a comma that may belong to it
  for key, text in _ITEM.findall(arg or ""):
    if key not in defaults:
      quote = f", or quote the comma: {before},{key}'" if before and not text else ""
      raise UserError(f"config argument ':{key}' does not exist{nearest(key, defaults)}{quote}")
    values[key] = _parse(f"config argument ':{key}'", text[1:] if text else "True", defaults[key])
    before = text and f"{key}='{text[1:]}"
  return SimpleNamespace(**values)


def choose(name: str, value: str, choices: Mapping[str, Any]) -> Any:
  """Looks up the value of a config's argument `name` among named choices.

  Raises:
    UserError: if `value` is not among the choices.
  """
  if value not in choices:
    raise UserError(f"config argument ':{name}={value}' does not exist{nearest(value, choices)}")
  return choices[value]


def _parse(name: str, text: str, like: Any) -> Any:
  """Parses `text` as a value with the type of `like`."""
  if isinstance(like, str):
    return text[1:-1] if re.fullmatch(_QUOTED, text) else text
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if isinstance(like, tuple) and isinstance(value, list):
    value = tuple(value)
  if like is not None and value is not None and type(value) is not type(like):
    raise UserError(f"{name} is {text!r}: it takes values of type {type(like).__name__}, such as {like!r}")
  return value


def split_path(path_and_args: str) -> tuple[str, str]:
  r"""Splits `FILE[:arguments]` at its first colon, or at the second after a drive as in `C:\x.py:tiny`."""
  start = 2 if re.match(r"[A-Za-z]:[\\/]", path_and_args) else 0
  path, _, arg = path_and_args[start:].partition(":")
  return path_and_args[:start] + path, arg


def find_file(path: str) -> pathlib.Path:
  """Finds a config file by path, or by name among the configs that maskgen ships."""
  given = pathlib.Path(os.path.expanduser(path))
  candidates = [given, *(folder / given.name for folder in _CONFIG_FOLDERS)]
  if given.parent not in (pathlib.Path("."), pathlib.Path("configs")):
    candidates = [given]
  for candidate in candidates:
    if candidate.is_file():
      return candidate
  close = difflib.get_close_matches(given.name, {file.name for file in shipped()}, n=1, cutoff=0.5)
  hint = (
    f"; did you mean '{close[0]}'?" if close else ": `maskgen configs` lists those that come with maskgen"
  )
  raise UserError(f"config file {path} does not exist{hint}")


def shipped() -> list[pathlib.Path]:
  """The config files that come with maskgen, by name."""
  return sorted(file for folder in _CONFIG_FOLDERS for file in folder.glob("*.py"))


def load(
  path_and_args: str, overrides: Mapping[str, str] | None = None, find_type: fields.FindType | None = None
) -> ml_collections.ConfigDict:
  """Loads `FILE[:arguments]`, applies overrides `{"a.b": "value"}` and locks the result.

  Args:
    path_and_args: the file, and its arguments after a colon.
    overrides: values by key; with `find_type`, renamed keys may have either name.
    find_type: returns the dataclass of sections that `RunConfig` leaves open.

  Raises:
    UserError: if the file does not exist, fails or has no `get_config`, or a key or value is wrong.
  """
  if ml_collections is None:
    raise UserError("config files need ml-collections: install it with pip install ml-collections")
  path, arg = split_path(path_and_args)
  file = find_file(path)
  module_spec = importlib.util.spec_from_file_location(f"maskgen_config_{file.stem}", file)
  if module_spec is None or module_spec.loader is None:
    raise UserError(f"config file {path} is not a Python file (.py)")
  module = importlib.util.module_from_spec(module_spec)
  plugins.add_code_folder(file.parent)
  with _failures(path, file):
    module_spec.loader.exec_module(module)
  get_config: Any = getattr(module, "get_config", None)
  if not _takes_argument(get_config):
    raise UserError(f"config file {path} has no function get_config(arg): define it")
  with _failures(path, file):
    made = get_config(arg or None)
  if not isinstance(made, ml_collections.ConfigDict):
    raise UserError(
      f"get_config of {path} returns {type(made).__name__}: let it return an ml_collections.ConfigDict"
    )
  config = _copy(made)
  plugins.add_code_folder(file.parent)  # before those of configs that it builds on
  for run in _runs(config):
    _fill_in(run, RunConfig)
  config.lock()
  overrides = overrides or {}
  _add_evaluations(config, overrides)
  for key, text in overrides.items():
    _override(config, key, text, find_type)
  return config


@contextlib.contextmanager
def _failures(path: str, file: pathlib.Path) -> Iterator[None]:
  """Converts any exception of a config file to one sentence."""
  try:
    yield
  except UserError:
    raise
  except SyntaxError as error:
    raise UserError(f"config file {path} is not valid Python: {error}") from error
  except (Exception, SystemExit) as error:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [at.lineno for at in frames if pathlib.Path(at.filename).resolve() == file.resolve()]
    where = f" in line {lines[-1]}" if lines else ""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    raise UserError(f"config file {path} fails{where} ({said}): correct it") from error


def _takes_argument(function: Any) -> bool:
  """Whether it can be called with one argument."""
  try:
    inspect.signature(function).bind(None)
  except TypeError:
    return False
  return True


def _runs(config: ml_collections.ConfigDict) -> list[ml_collections.ConfigDict]:
  """The sections that `RunConfig` describes: those of the stages, or the config itself."""
  if "stages" not in config:
    return [config]
  if not isinstance(config.stages, tuple | list):
    raise UserError(f"config.stages is {config.stages!r}: give a tuple of names of sections")
  runs = {stage: config[stage] for stage in config.stages if stage in config}
  for stage, run in runs.items():
    if not isinstance(run, ml_collections.ConfigDict):
      raise UserError(f"config.{stage} is {run!r}: give the config of this stage")
  return list(runs.values())


def load_beside(file: str, name: str, arg: str | None = None, **arguments: Any) -> ml_collections.ConfigDict:
  """Loads a config for another one to build on; returns it unlocked.

  Args:
    file: `__file__` of the config that builds on it.
    name: the file to load, from the same folder or else as shipped with maskgen.
    arg: the user's arguments, as passed to `get_config`; they take precedence.
    **arguments: arguments for the config.
  """
  beside = pathlib.Path(file).with_name(name)
  quoted = {key: f"'{value}'" if "," in str(value) else value for key, value in arguments.items()}
  given = [*(f"{key}={value}" for key, value in quoted.items()), *([arg] if arg else [])]
  return load(f"{beside if beside.is_file() else name}:{','.join(given)}").unlock()


def _copy(section: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Copies a config, so that each stage has its own copy of a shared section."""
  return ml_collections.ConfigDict(
    {
      key: _copy(value) if isinstance(value, ml_collections.ConfigDict) else value
      for key, value in section.items()
    }
  )


def _fill_in(section: ml_collections.ConfigDict, cls: type) -> None:
  """Adds the defaults of a dataclass, so that every key is visible and can be overridden."""
  for field in dataclasses.fields(cls):
    if field.metadata.get("was", "") in section:
      continue
    if dataclasses.is_dataclass(field.default) and not isinstance(field.default, type):
      if field.name not in section:
        section[field.name] = ml_collections.ConfigDict()
      _fill_in(section[field.name], type(field.default))
    elif field.default is not dataclasses.MISSING and field.name not in section:
      section[field.name] = field.default


def _add_evaluations(config: ml_collections.ConfigDict, overrides: Mapping[str, str]) -> None:
  """Adds a section for each evaluation whose type is overridden although the config lacks it."""
  for key in overrides:
    if match := _EVALUATION_TYPE.fullmatch(key):
      stage, name = match.groups()
      run = config.get(stage) if stage else config
      if isinstance(run, ml_collections.ConfigDict) and "objective" in run:
        with config.unlocked():
          run.evals = {name: {}, **run.get("evals", {})}


def _override(
  config: ml_collections.ConfigDict, key: str, text: str, find_type: fields.FindType | None
) -> None:
  node = config
  *parents, leaf = _current_path(config, key.split("."), find_type) if find_type else key.split(".")
  for i, part in enumerate((*parents, leaf)):
    is_section = isinstance(node, ml_collections.ConfigDict)
    # Keys that a config omits are checked when the section is used; some sections nest.
    addable = OPEN if i == len(parents) else ("objective", "evals")
    if is_section and part not in node and set(parents[: min(i, 2)]) & set(addable):
      with config.unlocked():
        node[part] = None if i == len(parents) else ml_collections.ConfigDict()
    if not is_section or part not in node:
      choices = node.keys() if is_section else ()
      where = ".".join(("config", *parents[:i]))
      raise UserError(f"{where} has no key '{part}'{nearest(part, choices)}")
    if i < len(parents):
      node = node[part]
  if isinstance(node[leaf], ml_collections.ConfigDict):
    choices = ", ".join(f"{key}.{k}" for k in node[leaf])
    raise UserError(f"config.{key} is a group of keys: set one of {choices}")
  node[leaf] = _parse(f"config.{key}", text, node[leaf])


def _has(section: Any, path: Sequence[str]) -> bool:
  if not path:
    return True
  return (
    isinstance(section, ml_collections.ConfigDict) and path[0] in section and _has(section[path[0]], path[1:])
  )


def _current_path(run: ml_collections.ConfigDict, path: list[str], find_type: fields.FindType) -> list[str]:
  """Returns the path of a key, with renamed or moved parts as in the config."""
  if _has(run, path):  # finding classes takes seconds of imports
    return path
  if path[0] in run.get("stages", ()) and path[0] in run and path[1:]:
    return [path[0], *_current_path(run[path[0]], path[1:], find_type)]
  found: list[str] = []
  node: Any = run
  cls: type | None = RunConfig
  rest = list(path)
  while rest:
    rest = fields.other_place(cls, node, rest) if cls else rest
    part = rest.pop(0)
    if cls and part not in node:
      other = fields.other_name(cls, part, ".".join(("config", *found)))
      part = other if other and other in node else part
    found.append(part)
    field, node = fields.of(cls).get(part) if cls else None, node.get(part)
    if not isinstance(node, ml_collections.ConfigDict):
      break
    cls = (fields.section_type(cls, field, node) if cls and field else None) or find_type(tuple(found), node)
  return [*found, *rest]


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Converts a config to plain, JSON-serializable dictionaries and lists."""
  return {key: plain(value) for key, value in config.items()}


def without_origin(stored: Mapping[str, Any]) -> dict[str, Any]:
  """The config in a `config.json`, without what a run writes beside it."""
  beside = ("version", "command", "overridden", "classes")
  return {key: value for key, value in stored.items() if key not in beside}


def plain(value: Any) -> Any:
  """Converts a value of a config to plain dictionaries and lists."""
  if hasattr(value, "items"):  # a mapping or a ConfigDict
    return {key: plain(item) for key, item in value.items()}
  if isinstance(value, tuple | list):
    return [plain(item) for item in value]
  return value
