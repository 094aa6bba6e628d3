"""Modules that a config names: maskgen's own by short names, all others by their import names.

Objectives, evaluators, data sources and preprocessing ops are all found here. A name such as `mage` is a
module of maskgen; any other, such as `my_package.my_objective`, is a module on Python's path or else in a
*code folder*. Code folders are the folders of the config files that this process has loaded, so that a module
can be next to its config, and `code/` in models that were loaded with `trust_code`. A run whose
config names modules from outside maskgen copies those that it has imported and that are in code folders to
`code/` in its workdir, also if Python found them on its path, such as in the folder where it was started. All
other modules belong to the environment and are not copied.
"""

import collections
import contextlib
import dataclasses
import importlib
import itertools
import os
import pathlib
import pkgutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from etils import epath

from maskgen import pretrained
from maskgen.errors import UserError, nearest

CODE = "code"


class UnknownModuleError(UserError):
  """A name that is neither a module of maskgen nor an importable one.

  Attributes:
    name: the name.
  """

  def __init__(self, message: str, name: str):
    super().__init__(message)
    self.name = name


class _CodeFolders:
  """The last finder on `sys.meta_path`: finds top-level modules in code folders, the newest first.

  Attributes:
    folders: the code folders.
  """

  def __init__(self):
    self.folders: list[str] = []

  def find_spec(
    self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
  ) -> ModuleSpec | None:
    for folder in self.folders if path is None else ():
      if (spec := PathFinder.find_spec(name, [folder])) is not None:
        return spec
    return None


_code_folders = _CodeFolders()
_recorded: list[set[str]] = []
sys.meta_path.append(_code_folders)


def add_code_folder(folder: os.PathLike | str) -> None:
  """Makes the modules in a local folder importable, after those on Python's path.

  Raises:
    UserError: if it contains another version of a module that was imported and is in a code folder.
  """
  root = pathlib.Path(folder).resolve()
  for name, file in _imported_files().items():
    other = root / name
    if other != file and other.is_file() and other.read_bytes() != file.read_bytes():
      raise UserError(
        f"{other} differs from {file}, which this process has imported under the same name: rename one of "
        "them, or start another process"
      )
  folders = _code_folders.folders
  folders[:] = [str(root), *(other for other in folders if other != str(root))]
  importlib.invalidate_caches()


def trust(model: epath.PathLike) -> None:
  """Makes the code of a model, given as for `maskgen.load`, importable, if there is any."""
  code = pretrained.locate(model)[0] / CODE
  if not code.exists():
    return
  if "://" in str(code):
    local = epath.Path(tempfile.mkdtemp(prefix="maskgen_code_"))
    _copy({name: code / name for name in _files(code)}, local)
    code = local
  add_code_folder(code)


@contextlib.contextmanager
def recording() -> Iterator[set[str]]:
  """Collects the names of modules from outside maskgen that are found while the context lasts."""
  names: set[str] = set()
  _recorded.append(names)
  try:
    yield names
  finally:
    _recorded.pop()


def write_code(model: epath.Path) -> None:
  """Copies the imported modules that are in code folders to `code/` in a model's folder."""
  _copy({name: epath.Path(file) for name, file in _imported_files().items()}, model / CODE)


def copy_code(source: epath.Path, model: epath.Path) -> None:
  """Copies `code/` from one model's folder to another's, if there is any."""
  _copy({name: source / CODE / name for name in _files(source / CODE)}, model / CODE)


def has_code(model: epath.Path, name: str, package: str) -> bool:
  """Whether a module that a config names is in `package` of maskgen or in `code/` of a model's folder."""
  path = model / CODE / name.replace(".", "/")
  return name in _names(package) or any(
    file.exists() for file in (path.parent / f"{path.name}.py", path / "__init__.py")
  )


def find_module(name: str, package: str | None, where: str, attribute: str = "") -> ModuleType:
  """Imports the module that a config names.

  Args:
    name: the short name of a module of `package`, or the full name of another module.
    package: the maskgen package in which short names are looked up, such as `maskgen.objectives`, if any.
    where: the origin of the name for error messages, such as `config.objective.name`.
    attribute: the dataclass that the module must define, such as `Objective`, if any.

  Raises:
    UnknownModuleError: if there is no such module.
    UserError: if a module from outside maskgen lacks the class.
  """
  inside = package is not None and name in _names(package)
  module = importlib.import_module(f"{package}.{name}") if inside else _import(name)
  if module is not None and (not attribute or _defines(module, attribute)):
    for names in () if inside else _recorded:
      names.add(name)
    return module
  if module is not None and not inside:
    raise UserError(f"{where} '{name}' is {module.__file__}, which has no dataclass {attribute}: add one")
  if "." in name or not package:
    raise UnknownModuleError(
      f"{where} '{name}' cannot be imported: install it, add its folder to PYTHONPATH, or put it beside the "
      "config file",
      name,
    )
  raise UnknownModuleError(
    f"{where} '{name}' does not exist{nearest(name, short_names(package, attribute))}", name
  )


def short_names(package: str, attribute: str = "") -> list[str]:
  """Lists the modules of a maskgen package, optionally only those that define a dataclass `attribute`."""
  return [
    name
    for name in _names(package)
    if not attribute or _defines(importlib.import_module(f"{package}.{name}"), attribute)
  ]


def _names(package: str) -> list[str]:
  return [found.name for found in pkgutil.iter_modules(importlib.import_module(package).__path__)]


def _defines(module: ModuleType, attribute: str) -> bool:
  return dataclasses.is_dataclass(getattr(module, attribute, None))


def _import(name: str) -> ModuleType | None:
  """Imports a module by its full name; returns None if it does not exist."""
  if not all(part.isidentifier() for part in name.split(".")):
    return None
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    # Errors of imports within the module are raised.
    if error.name is None or not f"{name}.".startswith(f"{error.name}."):
      raise
    return None


def _imported_files() -> dict[str, pathlib.Path]:
  """The files of imported modules that are in code folders, by path relative to the folder."""
  modules = collections.defaultdict(list)  # by top-level name: there are thousands, and many code folders
  for name, module in tuple(sys.modules.items()):
    modules[name.partition(".")[0]].append((name, module))
  files: dict[str, pathlib.Path] = {}
  for folder in map(pathlib.Path, _code_folders.folders):
    if not folder.is_dir() or folder.name in ("site-packages", "dist-packages"):
      continue
    inside = {entry.stem for entry in folder.iterdir()} - {"maskgen"}
    for name, module in itertools.chain.from_iterable(modules[top] for top in inside & modules.keys()):
      if not (file := getattr(module, "__file__", None)):
        continue
      path = name.replace(".", "/") + ("/__init__.py" if hasattr(module, "__path__") else ".py")
      if (folder / path).is_file() and os.path.exists(file) and os.path.samefile(folder / path, file):
        files.setdefault(path, folder / path)
  return files


def _files(folder: epath.Path) -> list[str]:
  """The paths of the Python files in a folder, relative to it."""
  if not folder.is_dir():
    return []
  found = []
  for entry in sorted(folder.iterdir()):  # stores have no recursive glob
    inner = [f"{entry.name}/{name}" for name in _files(entry)]
    found += inner or [entry.name] * (entry.suffix == ".py")
  return found


def _copy(files: dict[str, epath.Path], target: epath.Path) -> None:
  for name, file in files.items():
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    (target / name).write_bytes(file.read_bytes())
