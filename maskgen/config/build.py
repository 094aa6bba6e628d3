"""Builds dataclasses from config sections with strict checks: keys, types, ranges, durations.

An unknown key is a `UserError` that suggests the nearest known one.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from maskgen.config import fields as fields_lib
from maskgen.errors import UserError, nearest

MAX_SEED = 2**32 - 1
DTYPES = ("float32", "bfloat16", "float16")


def check_at_least(section: Any, least: float, *names: str) -> None:
  """Checks fields that are numbers, or tuples of numbers.

  Raises:
    UserError: naming the field that is not a number or is less than `least`.
  """
  for name in names:
    value = getattr(section, name)
    for number in value if isinstance(value, tuple) else (value,):
      if isinstance(number, bool) or not isinstance(number, int | float) or not number >= least:
        raise UserError(f"{name} is {value!r}: it must be a number of at least {least}")


def check_seed(name: str, value: int) -> None:
  """Checks a random seed; JAX's keys ignore all but its lowest 32 bits.

  Raises:
    UserError: naming the seed that is out of range.
  """
  if not 0 <= value <= MAX_SEED:
    raise UserError(f"{name} is {value}: it must be a whole number from 0 to {MAX_SEED}")


def check_share(section: Any, *names: str) -> None:
  """Checks fields that are fractions.

  Raises:
    UserError: naming the field that is less than 0 or not less than 1.
  """
  for name in names:
    value = getattr(section, name)
    if not 0.0 <= value < 1.0:
      raise UserError(f"{name} is {value}: it must be at least 0 and less than 1")


def check_dtype(dtype: str) -> None:
  """Checks the name of a dtype for computations.

  Raises:
    UserError: if it is unknown.
  """
  if dtype not in DTYPES:
    raise UserError(f"dtype '{dtype}' does not exist{nearest(dtype, DTYPES)}")


def build_dataclass(cls: type, options: Mapping[str, Any], where: str, **given: Any) -> Any:
  """Builds dataclass `cls` from a config section, with strict checks.

  Nested sections become nested dataclasses if the field's type is a dataclass, and lists become tuples.

  Args:
    cls: a dataclass.
    options: the section; every key must be a field of `cls` or a field's earlier name.
    where: the section's name for error messages, such as `config.objective`.
    **given: further fields, which the section must not set.

  Raises:
    UserError: if a key is unknown, a field is missing, or the dataclass rejects a value.
  """
  fields = {f.name: f for f in dataclasses.fields(cls) if f.init and f.name not in given}
  hints = typing.get_type_hints(cls)
  values = dict(given)
  for key, value in fields_lib.current_names(cls, options, where).items():
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
    if str(error).startswith(f"{where}."):  # a section within it
      raise
    raise UserError(f"{where}: {error}") from error


def duration(section: Any, name: str, batch_size: int, num_examples: int, default: int | None = None) -> int:
  """Converts the field `{name}_steps` or `{name}_epochs` of a dataclass to a number of steps.

  Raises:
    UserError: if both are given, or neither is and there is no default.
  """
  steps, epochs = getattr(section, f"{name}_steps"), getattr(section, f"{name}_epochs")
  if steps is not None and epochs is not None:
    raise UserError(f"{name}_steps and {name}_epochs are both set: remove one")
  if epochs is not None:
    return round(epochs * num_examples / batch_size)
  steps = default if steps is None else steps
  if steps is None:
    raise UserError(f"config needs the key '{name}_steps' or '{name}_epochs'")
  return steps


def _fits(value: Any, annotation: Any) -> bool:
  """Whether a value has the type of a scalar or tuple field; other types are not checked here."""
  if typing.get_origin(annotation) is tuple:
    return isinstance(value, list | tuple)
  kinds = _kinds(annotation)
  if not set(kinds) <= {int, float, str, bool, type(None)}:
    return True
  return type(value) in kinds or (type(value) is int and float in kinds)


def _kinds(annotation: Any) -> tuple[Any, ...]:
  """The members of a union such as `int | None`, or the annotation itself."""
  return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _type_name(annotation: Any) -> str:
  if typing.get_origin(annotation) is tuple:
    return "tuple"
  return " or ".join("None" if kind is type(None) else kind.__name__ for kind in _kinds(annotation))


def _tuples(value: Any) -> Any:
  return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value
