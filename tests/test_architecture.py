"""Rules of the whole package: who imports whom, no dead keys, small files."""

import ast
import dataclasses
import graphlib
import importlib
import inspect
import itertools
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import maskgen
from maskgen import config, evaluators, objectives, plugins, serving
from maskgen.data.pipeline import Data
from maskgen.models.discriminator import Discriminator
from maskgen.models.vqgan import VQGAN
from maskgen.numerics import masking, sampling
from maskgen.training import optim

PACKAGE = pathlib.Path(maskgen.__file__).parent
# A file imports from rows above its own, or from its own row without a cycle.
ROWS = (
  "errors files tree images sheet plugins hub pretrained config cli",
  "numerics sharding processes costs batch compile_cache",
  "data",
  "models",
  "storage importers",
  "objectives",
  "evaluators",
  "training",
  "serving demo report __init__",
  "__main__ main tools benchmarks preflight",
)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names.split()}


def module_name(path: pathlib.Path) -> str:
  """`data.ops` for data/ops.py, `data` for data/__init__.py, `__init__` for the package itself."""
  parts = path.relative_to(PACKAGE).with_suffix("").parts
  return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if "configs" not in path.parts}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imported(node: ast.AST) -> set[str]:
  """The modules of this package that an import statement names."""
  if isinstance(node, ast.Import):
    found = {alias.name for alias in node.names}
  elif isinstance(node, ast.ImportFrom):
    assert not node.level, "relative imports hide where a name comes from"
    inner = {f"{node.module}.{alias.name}" for alias in node.names}
    modules = {name for name in inner if name.removeprefix("maskgen.") in FILES}
    found = modules or {node.module}
  else:
    return set()
  return {
    name.removeprefix("maskgen").lstrip(".") or "__init__"
    for name in found
    if name.split(".")[0] == "maskgen"
  }


GRAPH = {
  name: {target for node in ast.walk(tree) for target in imported(node)} for name, tree in TREES.items()
}


def test_every_file_has_its_row():
  assert {name.split(".")[0] for name in FILES} == set(ROW_OF)


def test_imports_go_up():
  for name, targets in GRAPH.items():
    for target in targets:
      assert target in FILES, f"{name} imports {target}, which does not exist"
      assert ROW_OF[target.split(".")[0]] <= ROW_OF[name.split(".")[0]], f"{name} must not import {target}"


def test_imports_have_no_cycle():
  tuple(graphlib.TopologicalSorter(GRAPH).static_order())


@pytest.mark.parametrize(
  "name", ["serving.loading", "serving.model", "serving.requests", "training.experiment"]
)
def test_generic_files_know_no_objective(name):
  assert not [target for target in GRAPH[name] if target.startswith("objectives.")]


def test_tensorflow_lives_in_data():
  for name, tree in TREES.items():
    for node in ast.walk(tree):
      modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      modules += [node.module] if isinstance(node, ast.ImportFrom) else []
      for module in modules:
        if module.split(".")[0] in ("tensorflow", "tensorflow_datasets"):
          assert name.startswith("data."), f"{name} imports {module}"


@pytest.mark.parametrize("name", ["maskgen", "maskgen.pretrained", "maskgen.serving"])
def test_inference_is_without_tensorflow(name):
  code = f"import sys, {name}; print(sorted({{'tensorflow', 'jax'}} & set(sys.modules)))"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  # `import maskgen` and `maskgen.available()` are cheap.
  assert done.stdout.strip() == ("['jax']" if name == "maskgen.serving" else "[]")


def test_every_module_can_be_imported():
  for module in pkgutil.walk_packages(maskgen.__path__, "maskgen."):
    importlib.import_module(module.name)


def test_the_package_is_typed():
  assert (PACKAGE / "py.typed").is_file()


# Keys of configs


def fields(cls: type) -> set[str]:
  found = {field.name for field in dataclasses.fields(cls) if field.init}
  return found - {"parent", "name"}  # flax adds these two


def read_attributes(node: ast.AST) -> set[str]:
  """The attributes that code reads, `duration(section, "total")` included."""
  read = set()
  for child in ast.walk(node):
    if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load):
      read.add(child.attr)
    if isinstance(child, ast.Call) and ast.unparse(child.func).split(".")[-1] == "duration":
      assert isinstance(child.args[1], ast.Constant)
      read |= {f"{child.args[1].value}_steps", f"{child.args[1].value}_epochs"}
  return read


def modules_of(package, attribute: str) -> list:
  names = plugins.short_names(package.__name__, attribute)
  return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


@pytest.mark.parametrize("module", modules_of(objectives, "Objective"), ids=lambda module: module.__name__)
def test_objectives_name_the_class_that_users_call(module):
  assert issubclass(serving.loading.find_class(module.Objective), serving.Model)


OWN = [optim.Optimizer, masking.MaskRatio, VQGAN, Discriminator, Data]
OWN += [module.Objective for module in modules_of(objectives, "Objective")]
OWN += [module.Evaluator for module in modules_of(evaluators, "Evaluator")]


@pytest.mark.parametrize("cls", OWN, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_key_is_read_by_its_own_class(cls):
  (body,) = ast.parse(inspect.getsource(cls)).body
  read = set()
  for node in ast.walk(body):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
      read.add(node.attr)
    elif isinstance(node, ast.Call) and "duration" in ast.unparse(node.func):
      read |= read_attributes(node)
  assert fields(cls) & set(inspect.get_annotations(cls)) <= read  # not those of the class it extends


@pytest.mark.parametrize("cls", [config.RunConfig, config.Mesh, config.Checkpointing, config.Profile])
def test_every_key_is_read_somewhere(cls):
  read = set().union(*(read_attributes(tree) for tree in TREES.values()))
  assert fields(cls) <= read


def test_the_keys_of_sampling_are_what_decode_and_guide_take():
  taken = [
    {p.name for p in inspect.signature(fn).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for fn in (sampling.decode, sampling.guide)
  ]
  assert not taken[0] & taken[1]
  assert fields(sampling.MaskedSampling) == taken[0] | taken[1]


# Sizes


def test_files_are_small():
  limits = {"training.train": 250}
  for name, path in FILES.items():
    limit = limits.get(name, 320 if name.startswith("objectives.") else 400)
    assert len(path.read_text().splitlines()) <= limit, f"{name} has more than {limit} lines"


def test_configs_are_small(repository):
  paths = list((repository / "configs").glob("*.py"))
  assert paths
  for path in paths:
    assert len(path.read_text().splitlines()) <= 150, path.name


def said_lines(path: pathlib.Path) -> list[str]:
  """Lines of code, without docstrings, comments, imports, signatures and lone brackets."""
  text, left_out = path.read_text(), set()
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Import | ast.ImportFrom):
      left_out |= {node.lineno}
    if isinstance(node, ast.FunctionDef):
      left_out |= {node.lineno}
    if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node):
      docstring = node.body[0]
      left_out |= set(range(docstring.lineno, docstring.end_lineno + 1))
  lines = [line.strip() for i, line in enumerate(text.splitlines(), 1) if i not in left_out]
  return [line for line in lines if re.search(r"\w", line) and not line.startswith("#")]


def test_configs_do_not_repeat_each_other(repository):
  """Any two configs share less than 40% of the lines of the shorter one."""
  said = {path.name: said_lines(path) for path in (repository / "configs").glob("*.py")}
  assert said and all(said.values())
  for pair in itertools.combinations(said, 2):
    shorter, longer = sorted((said[name] for name in pair), key=len)
    share = sum(line in longer for line in shorter) / len(shorter)
    assert share < 0.4, f"{share:.0%} of the lines of one of {pair} stand in the other"
