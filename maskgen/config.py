"""Configs: loading `FILE[:key=value,...]`, overrides, durations, strict construction of dataclasses.

A config is a Python file with `get_config(arg)` that returns an `ml_collections.ConfigDict`. Wrong names
never pass silently: each one is a `UserError` that offers the nearest right name.
"""

import ast
import dataclasses
import importlib.util
import pathlib
import re
import types
import typing
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import ml_collections

from maskgen.errors import UserError, nearest


def check_at_least(section: Any, least: float, *names: str) -> None:
  """Checks fields that are numbers, or tuples of numbers.

  Raises:
    UserError: naming the field that is no number or less than `least`.
  """
  for name in names:
    value = getattr(section, name)
    for number in value if isinstance(value, tuple) else (value,):
      if isinstance(number, bool) or not isinstance(number, int | float) or not number >= least:
        raise UserError(f"{name} is {value!r}: it takes numbers of at least {least}")


def check_dtype(dtype: str) -> None:
  """Checks the type of a computation.

  Raises:
    UserError: for another name.
  """
  if dtype not in DTYPES:
    raise UserError(f"dtype '{dtype}' does not exist{nearest(dtype, DTYPES)}")


@dataclasses.dataclass(frozen=True)
class Mesh:
  """The shape of the device mesh; one axis may be -1, for all devices that are left.

  Attributes:
    data: data parallelism; parameters are replicated along it.
    fsdp: data parallelism with parameters and optimizer state sharded along it.
    tensor: tensor parallelism, by rules in `sharding`.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Checkpointing:
  """When to save, and what to keep.

  Attributes:
    save_steps: save every so many steps.
    save_minutes: save also when so many minutes have passed since the last save.
    keep: how many of the newest checkpoints to keep.
  """

  save_steps: int = 1000
  save_minutes: float = 10.0
  keep: int = 2

  def __post_init__(self):
    check_at_least(self, 1, "save_steps", "keep")
    check_at_least(self, 0, "save_minutes")


@dataclasses.dataclass(frozen=True)
class Profile:
  """A window of steps to record with the JAX profiler, into the workdir for TensorBoard.

  Attributes:
    start_step: the first step of the window.
    steps: how many steps; 0 records nothing.
  """

  start_step: int = 10
  steps: int = 0

  def __post_init__(self):
    check_at_least(self, 0, "start_step", "steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """Every key of a config that trains one model; sections without a type of their own are strict, too.

  Attributes:
    objective: what is trained: `name` is a module of `maskgen.objectives`, the rest are its fields.
    data: the fields of `maskgen.data.pipeline.Data`.
    optimizer: for each parameter group the fields of `maskgen.optim.Optimizer`.
    batch_size: examples per step, over all devices and accumulated micro-batches.
    total_steps, total_epochs: the length of the run; give one.
    seed: of initialisation, data order, masks and dropout.
    accumulation: number of micro-batches whose gradients are averaged for one update.
    ema: for a parameter group the decay of its exponential moving average, used for all predictions.
    pretrained: paths of trained models that the objective asks for by name.
    resume: a workdir whose checkpoint this run starts from, optimizer state included.
    evals: for each evaluation its `type`, a module of `maskgen.evaluators`, `every_steps` and the type's
      fields.
    mesh: the device mesh.
    sharding: ordered (regex, axes) rules over parameter paths, see `maskgen.sharding`.
    log_every_steps: how often averaged training metrics are written.
    checkpoint: when to save.
    profile: a window of steps to profile.
  """

  objective: Mapping[str, Any]
  data: Mapping[str, Any]
  optimizer: Mapping[str, Any]
  batch_size: int
  total_steps: int | None = None
  total_epochs: float | None = None
  seed: int = 0
  accumulation: int = 1
  ema: Mapping[str, float] = dataclasses.field(default_factory=dict)
  pretrained: Mapping[str, str] = dataclasses.field(default_factory=dict)
  resume: str | None = None
  evals: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  mesh: Mesh = Mesh()
  sharding: tuple[tuple[str, tuple[Any, ...]], ...] = ()
  log_every_steps: int = 50
  checkpoint: Checkpointing = Checkpointing()
  profile: Profile = Profile()

  def __post_init__(self):
    check_at_least(self, 1, "batch_size", "accumulation", "log_every_steps")
    check_at_least(self, 0, "seed")
    for length in ("total_steps", "total_epochs"):
      if getattr(self, length) is not None:
        check_at_least(self, 1, length)
    for group, decay in self.ema.items():
      if not 0.0 <= decay < 1.0:
        raise UserError(f"ema.{group} is {decay}: a decay is at least 0 and less than 1")


# Keys, of a run or of one of its stages, that say how it is carried out, not what it computes: they may
# change when it is resumed.
OPERATIONAL = re.compile(
  r"(\w+\.)?(version|evals|mesh|sharding|accumulation|log_every_steps|checkpoint|profile"
  r"|objective\.(attention|remat|scan))(\.|$)"
)

# Sections of a config whose keys belong to what the config names, not to `RunConfig`.
OPEN = ("objective", "data", "optimizer", "evals")

DTYPES = ("float32", "bfloat16", "float16")

_CONFIG_FOLDERS = (
  pathlib.Path(__file__).parent / "configs",  # in an installed package
  pathlib.Path(__file__).parent.parent / "configs",  # in a checkout
)


def parse_arg(arg: str | None, **defaults: Any) -> SimpleNamespace:
  """Parses the part of `--config=FILE:tiny,batch_size=64` after the colon.

  Args:
    arg: comma-separated `key=value` items; a bare `key` means `key=True`.
    **defaults: every key the config takes, with its default, whose type the value must have.

  Raises:
    UserError: for a key that is not among the defaults, or a value of another type.
  """
  values = dict(defaults)
  for item in filter(None, (arg or "").split(",")):
    key, _, text = item.partition("=")
    if key not in defaults:
      raise UserError(f"config argument ':{key}' does not exist{nearest(key, defaults)}")
    values[key] = _parse(f"config argument ':{key}'", text if "=" in item else "True", defaults[key])
  return SimpleNamespace(**values)


def _parse(name: str, text: str, like: Any) -> Any:
  """Reads `text` as a value of the type of `like`."""
  if isinstance(like, str):
    return text
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


def find_file(path: str) -> pathlib.Path:
  """Finds a config file: as given, or among the configs that maskgen ships."""
  given = pathlib.Path(path)
  candidates = [given, *(folder / given.name for folder in _CONFIG_FOLDERS)]
  if given.parent not in (pathlib.Path("."), pathlib.Path("configs")):
    candidates = [given]
  for candidate in candidates:
    if candidate.is_file():
      return candidate
  shipped = {p.name for folder in _CONFIG_FOLDERS for p in folder.glob("*.py")}
  raise UserError(f"config file {path} does not exist{nearest(given.name, shipped)}")


def load(spec: str, overrides: Mapping[str, str] | None = None) -> ml_collections.ConfigDict:
  """Loads `FILE[:arguments]`, applies overrides `{"a.b": "value"}` and locks the result.

  Raises:
    UserError: if the file does not exist or has no `get_config`, or a key or value is wrong.
  """
  path, _, arg = spec.partition(":")
  file = find_file(path)
  module_spec = importlib.util.spec_from_file_location(f"maskgen_config_{file.stem}", file)
  if module_spec is None or module_spec.loader is None:
    raise UserError(f"config file {path} is not a Python file (.py)")
  module = importlib.util.module_from_spec(module_spec)
  try:
    module_spec.loader.exec_module(module)
  except SyntaxError as error:
    raise UserError(f"config file {path} is not valid Python: {error}") from error
  if not hasattr(module, "get_config"):
    raise UserError(f"config file {path} has no function get_config(arg)")
  config = module.get_config(arg or None)
  with config.unlocked():
    for run in (
      [config[stage] for stage in config.stages if stage in config] if "stages" in config else [config]
    ):
      _fill_in(run, RunConfig)
  config.lock()
  for key, text in (overrides or {}).items():
    _override(config, key, text)
  return config


def _fill_in(section: ml_collections.ConfigDict, cls: type) -> None:
  """Adds the defaults of a dataclass, so that every key can be seen and overridden."""
  for field in dataclasses.fields(cls):
    if dataclasses.is_dataclass(field.default) and not isinstance(field.default, type):
      if field.name not in section:
        section[field.name] = ml_collections.ConfigDict()
      _fill_in(section[field.name], type(field.default))
    elif field.default is not dataclasses.MISSING and field.name not in section:
      section[field.name] = field.default


def _override(config: ml_collections.ConfigDict, key: str, text: str) -> None:
  node = config
  *parents, leaf = key.split(".")
  for i, part in enumerate((*parents, leaf)):
    is_section = isinstance(node, ml_collections.ConfigDict)
    if is_section and part not in node and i == len(parents) and set(parents[:2]) & set(OPEN):
      with config.unlocked():
        node[leaf] = None  # whether it exists is known when the section is used
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


def build_dataclass(cls: type, options: Mapping[str, Any], where: str, **given: Any) -> Any:
  """Constructs dataclass `cls` from a config section, strictly.

  Nested sections become nested dataclasses where the field's type is one, and lists become tuples.

  Args:
    cls: a dataclass.
    options: the section; every key must be a field of `cls`.
    where: the section's name for error messages, such as `config.objective`.
    **given: further fields, which the section must not set.

  Raises:
    UserError: on a key that is no field, a missing field, or a value the dataclass refuses.
  """
  fields = {f.name: f for f in dataclasses.fields(cls) if f.init and f.name not in given}
  hints = typing.get_type_hints(cls)
  values = dict(given)
  for key, value in options.items():
    if key not in fields:
      raise UserError(f"{where} has no key '{key}'{nearest(key, fields)}")
    if isinstance(value, Mapping) and dataclasses.is_dataclass(hints[key]):
      value = build_dataclass(hints[key], value, f"{where}.{key}")
    elif not _fits(value, hints[key]):
      raise UserError(f"{where}.{key} is {value!r}: it takes values of type {_type_name(hints[key])}")
    values[key] = _tuples(value)
  required = [
    name
    for name, field in fields.items()
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
  ]
  missing = [name for name in required if name not in values]
  if missing:
    raise UserError(f"{where} needs the key '{missing[0]}'")
  try:
    return cls(**values)
  except UserError as error:
    raise UserError(f"{where}: {error}") from error


def duration(section: Any, name: str, batch_size: int, num_examples: int, default: int | None = None) -> int:
  """Converts the field `{name}_steps` or `{name}_epochs` of a dataclass to whole steps.

  Raises:
    UserError: if both are given, or neither and there is no default.
  """
  steps, epochs = getattr(section, f"{name}_steps"), getattr(section, f"{name}_epochs")
  if steps is not None and epochs is not None:
    raise UserError(f"give {name}_steps or {name}_epochs, not both")
  if epochs is not None:
    return round(epochs * num_examples / batch_size)
  steps = default if steps is None else steps
  if steps is None:
    raise UserError(f"config needs the key '{name}_steps' or '{name}_epochs'")
  return steps


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Converts a config to plain JSON-able dictionaries and lists."""
  return {key: _plain(value) for key, value in config.items()}


def _fits(value: Any, annotation: Any) -> bool:
  """Whether a value has the type of a scalar or tuple field; other fields check themselves."""
  if typing.get_origin(annotation) is tuple:
    return isinstance(value, list | tuple)
  kinds = _kinds(annotation)
  if not set(kinds) <= {int, float, str, bool, type(None)}:
    return True
  return type(value) in kinds or (type(value) is int and float in kinds)


def _kinds(annotation: Any) -> tuple[Any, ...]:
  """The members of a union such as `int | None`, or the annotation alone."""
  return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _type_name(annotation: Any) -> str:
  if typing.get_origin(annotation) is tuple:
    return "tuple"
  return " or ".join("None" if kind is type(None) else kind.__name__ for kind in _kinds(annotation))


def _tuples(value: Any) -> Any:
  return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping | ml_collections.ConfigDict):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, tuple | list):
    return [_plain(item) for item in value]
  return value


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Lists `key: old -> new` for what differs between two `to_dict` results and changes a run's numbers."""
  old_flat, new_flat = _flatten(old), _flatten(new)
  return [
    f"{key}: {old_flat.get(key, '(absent)')} -> {new_flat.get(key, '(absent)')}"
    for key in sorted(old_flat.keys() | new_flat.keys())
    if old_flat.get(key) != new_flat.get(key) and not OPERATIONAL.match(key)
  ]


def _flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in node.items():
    if isinstance(value, Mapping) and value:
      flat.update(_flatten(value, f"{prefix}{key}."))
    else:
      flat[f"{prefix}{key}"] = value
  return flat
