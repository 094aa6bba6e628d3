"""Differences between two configs that matter when a run resumes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from maskgen.config import fields
from maskgen.config.loading import plain
from maskgen.config.schema import RunConfig


def difference(
  old: Mapping[str, Any], new: Mapping[str, Any], find_type: fields.FindType = lambda path, section: None
) -> list[str]:
  """Lists as `key: old -> new` the differences between two `to_dict` results that change a run's numbers.

  Operational fields are ignored, absent keys have their defaults, and a renamed key is compared under its new
  name. A dataclass with a static method `comparable` uses it to normalize sections that can be written in
  several ways.

  Args:
    old: a config of one model or of several stages.
    new: the config to compare with.
    find_type: returns the dataclass of sections such as `("objective",)` or `("optimizer", "main")`.

  Raises:
    UserError: if a config has a key under both its old and its new name.
  """
  old_flat, new_flat = _flatten(old, find_type), _flatten(new, find_type)
  return [
    f"{key}: {old_flat.get(key, '(absent)')} -> {new_flat.get(key, '(absent)')}"
    for key in sorted(old_flat.keys() | new_flat.keys())
    if old_flat.get(key) != new_flat.get(key)
  ]


def overridden(defaults: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """Every value that differs between two `to_dict` results by its dotted key: the old and the new one.

  A key that one of them lacks has None there.
  """
  found: dict[str, tuple[Any, Any]] = {}
  for key in dict.fromkeys((*defaults, *config)):
    old, new = defaults.get(key), config.get(key)
    if isinstance(new, Mapping) and isinstance(old, Mapping | None):
      found |= {f"{key}.{inner}": values for inner, values in overridden(old or {}, new).items()}
    elif old != new:
      found[key] = (old, new)
  return found


def _flatten(config: Mapping[str, Any], find_type: fields.FindType) -> dict[str, Any]:
  """Returns the values that matter by dotted path."""
  flat: dict[str, Any] = {}

  def visit(section: Mapping[str, Any], cls: type | None, prefix: str, path: tuple[str, ...] = ()) -> None:
    known = fields.of(cls) if cls else {}
    for key, value in (_current(cls, section) if cls else section).items():
      field = known.get(key)
      if field and field.metadata.get("operational"):
        continue
      inner = None
      if isinstance(value, Mapping):
        inner = fields.section_type(cls, field, value) if cls and field else None
        inner = inner or find_type((*path, key), value)
      if isinstance(value, Mapping) and (value or inner):
        visit(value, inner, f"{prefix}{key}.", (*path, key))
      else:
        flat[prefix + key] = value

  def visit_run(run: Mapping[str, Any], prefix: str) -> None:
    cls = find_type(("objective",), run.get("objective", {}))
    if cls and "pretrained" in run:
      run = {**run, "pretrained": fields.current_pretrained(cls, run["pretrained"])}
    visit(run, RunConfig, prefix)

  stages = [stage for stage in config.get("stages", ()) if isinstance(config.get(stage), Mapping)]
  for stage in stages:
    visit_run(config[stage], f"{stage}.")
  visit_run({key: value for key, value in config.items() if key not in stages}, "")
  return flat


def _current(cls: type, section: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a section with current names, normalized and with defaults."""
  found = fields.current_names(cls, section)
  found = getattr(cls, "comparable", dict)(found)
  for name, field in fields.of(cls).items():
    if name not in found and field.default is not dataclasses.MISSING:
      found[name] = _section(field.default)
  return found


def _section(value: Any) -> Any:
  """A field's value as a config section says it."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return {name: _section(getattr(value, name)) for name in fields.of(type(value))}
  return plain(value)
