"""Marks for fields of config sections, set where a field is declared.

```
@dataclasses.dataclass(frozen=True)
class Network:
  width: int = fields.renamed(64, was="channels")  # configs with `channels` still load
  dtype: str = fields.precision("float32")
  remat: str = fields.operational("none", less_memory=("dots", "full"))
```

The helpers work in dataclasses and in Linen modules. Code that needs to know which keys may change when a run
resumes, which save memory, or which options are static under `jax.jit` walks the fields and reads their marks
instead of keeping lists of names.
"""

import dataclasses
import logging
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from maskgen.errors import UserError

log = logging.getLogger("maskgen")

# (path, section) -> the dataclass of a section of a run that `RunConfig` leaves open, or None.
FindType = Callable[[tuple[str, ...], Mapping[str, Any]], type | None]

_LINEN = {"parent", "name"}  # fields that Flax adds to every module
_warned: set[tuple[type, str]] = set()


class Files(NamedTuple):
  """The local files that a value of a config names.

  Attributes:
    path: the last part of the value: a file or a folder.
    names: of the files, relative to the folder; `("",)` for a file.
  """

  path: str
  names: tuple[str, ...]


def operational(
  default: Any = dataclasses.MISSING,
  *,
  plain: Any = dataclasses.MISSING,
  less_memory: tuple[Any, ...] = (),
  was: str = "",
  **options: Any,
) -> Any:
  """A field that sets how something runs, not what it computes: it may change when a run resumes.

  Args:
    default: the default.
    plain: the value without extra computation such as rematerialization; by default the default.
    less_memory: values that use less memory than the default, in decreasing order of use.
    was: see `renamed`.
    **options: of `dataclasses.field`.
  """
  marks = {"operational": True, "plain": default if plain is dataclasses.MISSING else plain}
  return _field(default, options, **marks, less_memory=less_memory, was=was)


def precision(default: Any = dataclasses.MISSING, *, was: str = "", **options: Any) -> Any:
  """A field that sets a dtype of computation, which may differ from that of a pretrained model."""
  return _field(default, options, precision=True, was=was)


def static(
  default: Any = dataclasses.MISSING, *, at: tuple[float, ...] = (), was: str = "", **options: Any
) -> Any:
  """An option of prediction functions that sets array sizes or chooses what is computed.

  Args:
    default: the default.
    at: the only values that choose what is computed, if not all do: numbers at which a part drops out. All
      other values share one program, except for the one in the model's config.
    was: see `renamed`.
    **options: of `dataclasses.field`.
  """
  return _field(default, options, static=True, at=at, was=was)


def section(
  find: Callable[[Mapping[str, Any]], type] | None = None,
  *,
  was: str = "",
  took: tuple[str, ...] = (),
  kind: str = "",
  **options: Any,
) -> Any:
  """A field that holds an unparsed config section.

  Args:
    find: returns the section's dataclass, or raises `UserError`; None if the section has no dataclass.
    was: see `renamed`.
    took: keys that were once next to the section; they are still accepted there, with one warning.
    kind: the `name` of a section that consists only of these, if it has names.
    **options: of `dataclasses.field`.
  """
  return _field(dataclasses.MISSING, options, find=find, was=was, took=took, kind=kind)


def local_files(
  default: Any = dataclasses.MISSING, *, find: Callable[[str], Files | None], was: str = "", **options: Any
) -> Any:
  """A field that names local files from which the model is built; its folder gets copies of them.

  Args:
    default: the default.
    find: returns the files that a value names, if any.
    was: see `renamed`.
    **options: of `dataclasses.field`.
  """
  return _field(default, options, local_files=find, was=was)


def renamed(default: Any = dataclasses.MISSING, *, was: str, **options: Any) -> Any:
  """A field that was renamed: sections may still use the old name, which logs one warning."""
  return _field(default, options, was=was)


def _field(default: Any, options: Mapping[str, Any], **marks: Any) -> Any:
  return dataclasses.field(default=default, metadata=marks, **options)


def of(cls: type) -> dict[str, dataclasses.Field[Any]]:
  """Returns by name the fields of a dataclass that a config section may set."""
  found = {field.name: field for field in dataclasses.fields(cls) if field.init}
  return {name: field for name, field in found.items() if not (name in _LINEN and found.keys() >= _LINEN)}


def current_names(cls: type, options: Mapping[str, Any], where: str = "") -> dict[str, Any]:
  """Returns a copy of a section in which renamed keys have their new names.

  Args:
    cls: the section's dataclass.
    options: the section; unknown keys are kept.
    where: the section's name; if given, each old name logs a warning, once per process.

  Raises:
    UserError: if a field is set under both names.
  """
  old = {field.metadata["was"]: name for name, field in of(cls).items() if field.metadata.get("was")}
  for key in options.keys() & old.keys():
    if old[key] in options:
      raise UserError(f"{where or 'config'} has both '{key}' and its new name '{old[key]}': remove '{key}'")
    if where:
      _warn(cls, key, old[key], where)
  found = {old.get(key, key): value for key, value in options.items()}
  for name, field in of(cls).items():
    moved = {key: found.pop(key) for key in field.metadata.get("took", ()) if key in found}
    if moved:
      kind = {"name": field.metadata["kind"]} if field.metadata["kind"] else {}
      given = {key: value for key, value in moved.items() if value is not None}
      found[name] = kind | given | found.get(name, {})
    if moved and where and (cls, name) not in _warned:
      _warned.add((cls, name))
      log.warning("%s: %s now belong in %s.%s: move them there", where, ", ".join(moved), where, name)
  return found


def _warn(cls: type, old: str, new: str, where: str) -> None:
  if (cls, old) not in _warned:
    _warned.add((cls, old))
    log.warning("%s.%s is now called '%s': rename the key", where, old, new)


def other_name(cls: type, name: str, where: str) -> str | None:
  """Returns the new name of a key given by its old one, or the reverse; None if it was not renamed."""
  for field in of(cls).values():
    was = field.metadata.get("was")
    if was and name == field.name:
      found: str = was
      return found
    if was and name == was:
      _warn(cls, was, field.name, where)
      return field.name
  return None


def other_place(cls: type, section: Mapping[str, Any], path: Sequence[str]) -> list[str]:
  """Returns the path of a key as a section has it: next to or inside the one that took it; see `section`."""
  first, second = (*path, "")[:2]
  for name, field in of(cls).items():
    took = field.metadata.get("took", ())
    if first in took and first not in section and name in section:
      return [name, *path]
    if first == name and second in took and second in section:
      return list(path[1:])
  return list(path)


def section_type(cls: type, field: dataclasses.Field[Any], value: Any) -> type | None:
  """Returns the dataclass of a field that holds a section; None for values and unknown classes."""
  if field.metadata.get("find"):
    try:
      found: type = field.metadata["find"](value)
    except UserError:  # raised again when the section is built
      return None
    return found
  hint = typing.get_type_hints(cls)[field.name]
  return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def walk(
  cls: type, options: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dataclasses.Field[Any], Any]]:
  """Yields path, field and value of each field at any depth, including fields that the section omits.

  Args:
    cls: the section's dataclass.
    options: the section, or the object built from it.
    path: the path of the section.

  Raises:
    UserError: if a key is set under both its old and its new name.
  """
  given = current_names(cls, options) if isinstance(options, Mapping) else vars(options)
  for name, field in of(cls).items():
    value = given.get(name, field.default)
    factory: Any = field.default_factory
    if value is dataclasses.MISSING and factory is not dataclasses.MISSING:
      value = factory()
    nested = section_type(cls, field, value)
    was = field.metadata.get("was", "")
    key = (*path, was if was in (options if isinstance(options, Mapping) else ()) else name)
    if nested is None:
      yield key, field, value
    else:
      yield from walk(nested, {} if value is dataclasses.MISSING else value, key)


def replace(options: Mapping[str, Any], changes: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
  """Returns a copy of a section with changed values, given by path as `walk` yields them."""
  changed = dict(options)
  for (name, *rest), value in changes.items():
    changed[name] = replace(changed.get(name, {}), {tuple(rest): value}) if rest else value
  return changed


def merge(section: Mapping[str, Any], changes: Mapping[str, Any], cls: type | None = None) -> dict[str, Any]:
  """Returns a section with changes over it, those of nested sections key by key.

  Args:
    section: the section.
    changes: as much of such a section as is to be different.
    cls: the section's dataclass, if known: renamed keys then have their new names in the result.

  Raises:
    UserError: if a key is given under its old and its new name.
  """
  known = of(cls) if cls else {}
  if cls:
    section, changes = current_names(cls, section), current_names(cls, changes)
  merged = dict(section)
  for name, value in changes.items():
    below = merged.get(name)
    if isinstance(value, Mapping) and isinstance(below, Mapping):
      inner = section_type(cls, known[name], below) if cls and name in known else None
      value = merge(below, value, inner)
    merged[name] = value
  return merged


def current_pretrained(cls: type, pretrained: Mapping[str, str], where: str = "") -> dict[str, str]:
  """Returns `config.pretrained` of an objective's class with its current names.

  Args:
    cls: the class; its `pretrained_was`, if any, maps earlier names to these.
    pretrained: paths by name.
    where: the section's name; if given, each earlier name logs a warning.
  """
  was: Mapping[str, str] = getattr(cls, "pretrained_was", {})
  for name in pretrained.keys() & was.keys() if where else ():
    log.warning("%s.%s is now called '%s': rename the key", where, name, was[name])
  return {was.get(name, name): path for name, path in pretrained.items()}
