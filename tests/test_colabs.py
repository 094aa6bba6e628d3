"""The notebooks run from top to bottom, and those that are stored with outputs have all of them."""

import ast
import base64
import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import sys
import tomllib

import nbformat
import numpy as np
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement
from PIL import Image

import maskgen
from maskgen import config as config_lib
from maskgen import main
from maskgen.models import vilex
from maskgen.numerics import sampling
from maskgen.serving import ImageWords, TokenModel

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "colabs"
# Those of models that come with maskgen.
STORED = {"edit", "features", "generate", "vilex"}
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
# What the notebooks load.
CLASSES = dict.fromkeys(NAMES, TokenModel) | {"vilex": ImageWords}
SHOWS = re.compile(r"^(show|display|Image\.fromarray)\(|^  display\(", re.MULTILINE)

every_notebook = pytest.mark.parametrize("name", NAMES)


def load(name: str):
  spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


runner = load("run")
read = runner.read


def tags(cell: nbformat.NotebookNode) -> list[str]:
  return cell.metadata.get("tags", [])


def code_cells(name: str, *, installs: bool = False) -> list[nbformat.NotebookNode]:
  cells = [cell for cell in read(name).cells if cell.cell_type == "code"]
  return [cell for cell in cells if installs or "install" not in tags(cell)]


def tagged(name: str, tag: str) -> str:
  (cell,) = (cell for cell in code_cells(name, installs=True) if tag in tags(cell))
  return cell.source


def parameters(name: str) -> dict[str, str]:
  """The values that the cell of parameters sets."""
  values: dict[str, str] = {}
  exec(tagged(name, "parameters"), {}, values)
  return values


def syntax(name: str) -> ast.Module:
  """The code of a notebook, without its installs, as IPython reads it."""
  transform = TransformerManager().transform_cell
  return ast.parse("\n".join(transform(cell.source) for cell in code_cells(name)))


def commands(name: str) -> list[str]:
  """The commands that a notebook runs or shows, with its parameters filled in."""
  text = "\n".join(cell.source for cell in read(name).cells)
  found = re.findall(r"^!?(python -m maskgen\..*)$", text, flags=re.MULTILINE)
  values = {"CONFIG": "configs/folder_256.py:tiny,path=pictures", "LOOK": "look.png"} | parameters(name)
  return [re.sub(r"\$(\w+)", lambda match: values[match[1]], command) for command in found]


# As they are stored


def test_all_notebooks_are_here():
  assert NAMES == ["edit", "features", "generate", "train_on_your_own_pictures", "vilex"]


@every_notebook
def test_is_a_valid_notebook(name):
  notebook = read(name)
  nbformat.validate(notebook)
  assert set(notebook.metadata) == {"kernelspec", "language_info"}
  assert notebook.metadata.language_info == {"name": "python"}  # the version would change with the machine
  assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)


@every_notebook
def test_outputs_are_stored_whole_or_not_at_all(name):
  cells = code_cells(name)
  if name in STORED:
    check(cells)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 400_000
    assert not re.search(r"/(tmp|home|root|work)/", "".join(text([cell], cell.id) for cell in cells))
  else:  # their training takes long
    assert not any(cell.outputs or cell.execution_count for cell in cells)


@every_notebook
def test_begins_with_a_title_its_time_and_the_install(name):
  cells = read(name).cells
  assert cells[0].source.startswith("# ")
  assert "minute" in cells[0].source
  assert tags(next(cell for cell in cells if cell.cell_type == "code")) == ["install"]
  assert "%pip install -q -r docs/colabs/requirements.txt $CUDA -e ." in tagged(name, "install")
  assert parameters(name)


def test_badges_open_the_notebooks_of_a_repository(tmp_path):
  badges = load("badges")
  for name in ("README.md", "generate.ipynb", "vilex.ipynb"):
    shutil.copy(FOLDER / name, tmp_path)
  forked = {}
  for owner, end in (("someone/my.fork", ""), ("owner/maskgen", ".git"), ("someone/my.fork", "/")):
    badges.add(tmp_path, f"https://github.com/{owner}{end}")
    listed = (tmp_path / "README.md").read_text()
    for name in ("generate", "vilex"):
      cells = nbformat.read(tmp_path / f"{name}.ipynb", as_version=nbformat.NO_CONVERT).cells
      title, install = cells[0].source, cells[2].source
      address = f"https://colab.research.google.com/github/{owner}/blob/main/docs/colabs/{name}.ipynb"
      assert title.startswith("# ")
      assert title.count(badges.BADGE) == title.count(address) == listed.count(address) == 1
      assert (
        install.count("git clone") == install.count(f"git clone -q https://github.com/{owner} maskgen") == 1
      )
      compile(TransformerManager().transform_cell(install), name, "exec")
      assert [cell.get("outputs") for cell in cells] == [cell.get("outputs") for cell in read(name).cells]
    if "fork" in owner:
      files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
      assert files == (forked or files)
      forked = files
  with pytest.raises(ValueError, match="is not https://github"):
    badges.add(tmp_path, "https://gitlab.com/a/b")


@every_notebook
def test_links_lead_somewhere(name):
  text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
  for link in re.findall(r"\]\((?!https://)(.*?)\)", text):
    assert (FOLDER / link).is_file(), link


def test_pins_are_what_the_package_allows():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  lines = (FOLDER / "requirements.txt").read_text().splitlines()
  pins = [Requirement(line) for line in lines if not line.startswith("#")]
  allowed = [Requirement(line) for line in project["dependencies"]]
  assert [(p.name, p.extras, p.marker) for p in pins] == [(a.name, a.extras, a.marker) for a in allowed]
  for pin, requirement in zip(pins, allowed, strict=True):
    (pinned,) = pin.specifier
    assert pinned.operator == "=="
    assert requirement.specifier.contains(pinned.version), pin


def test_the_plug_in_is_pinned_as_jax_is():
  pins = {
    pin.name: pin for pin in map(Requirement, (FOLDER / "requirements.txt").read_text().splitlines()[1:])
  }
  (line,) = (FOLDER / "requirements-cuda.txt").read_text().splitlines()[1:]
  cuda = Requirement(line)
  assert (cuda.name, cuda.extras, cuda.specifier) == ("jax", {"cuda12"}, pins["jax"].specifier)


# What they use


@every_notebook
def test_names_of_the_package_exist(name):
  modules = {"maskgen": maskgen}
  for node in ast.walk(syntax(name)):
    if isinstance(node, ast.ImportFrom) and node.module.startswith("maskgen"):
      for alias in node.names:
        with contextlib.suppress(ImportError):
          modules[alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
        assert hasattr(importlib.import_module(node.module), alias.name), ast.unparse(node)
  for node in ast.walk(syntax(name)):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
      assert hasattr(modules[node.value.id], node.attr), ast.unparse(node)


@every_notebook
def test_arguments_of_the_model_exist(name):
  kinds = sampling.MaskedSampling, vilex.ImageWordsSampling
  options = {option for kind in kinds for option in inspect.signature(kind).parameters}
  for node in ast.walk(syntax(name)):
    if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("model."):
      continue
    if isinstance(node.func.value, ast.Name):  # not model.objective.init()
      known = set(inspect.signature(getattr(CLASSES[name], node.func.attr)).parameters)
      known |= options if "options" in known else set()
      assert {keyword.arg for keyword in node.keywords if keyword.arg} <= known, ast.unparse(node)


@every_notebook
def test_commands_have_arguments_that_exist(name):
  assert commands(name)
  for command in commands(name):
    _, _, module_name, *given = shlex.split(command)
    module = importlib.import_module(module_name)
    parts = [argument for argument in given if not argument.startswith("-")]
    arguments = [argument for argument in given if argument.startswith("-")]
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
      module.main([*parts, "--help"])
    plain = [argument.partition("=") for argument in arguments if not argument.startswith("--config.")]
    assert {flag for flag, _, _ in plain} <= {*re.findall(r"--\w+", text.getvalue())}, command
    overrides = main.parse_overrides([a for a in arguments if a.startswith("--config.")])
    for flag, _, value in plain:
      if flag == "--config":
        config_lib.load(value, overrides)


@every_notebook
def test_cells_that_show_pictures_are_found(name):
  assert sum(bool(SHOWS.search(cell.source)) for cell in code_cells(name)) >= 3


# As they run

SHORT = " ".join(
  f"--config.{key}={value}"
  for key, value in {
    "tokenizer.total_steps": 2,
    "tokenizer.log_every_steps": 1,
    "tokenizer.optimizer.generator.warmup_steps": 0,
    "mage.total_steps": 2,
    "mage.log_every_steps": 1,
    "mage.optimizer.main.warmup_steps": 0,
    "mage.objective.sampling.steps": 2,
    "mage.evals.samples.num_generated": 4,
    "mage.evals.samples.num_examples": 4,
  }.items()
)


def execute(name: str, given: dict[str, str], home: pathlib.Path) -> list[nbformat.NotebookNode]:
  """Runs a notebook in a fresh kernel in the repository, and returns its code cells except the install."""
  assert given.keys() == parameters(name).keys()
  notebook = read(name)
  notebook.cells = [cell for cell in notebook.cells if "install" not in tags(cell)]
  place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in tags(cell))
  source = "\n".join(f"{key} = {value!r}" for key, value in given.items())
  notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source, id="given"))
  env = {
    "IPYTHONDIR": str(home / "ipython"),
    "PATH": os.pathsep.join((str(pathlib.Path(sys.executable).parent), os.environ["PATH"])),
  }
  runner.execute(notebook, os.environ | env)
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell: nbformat.NotebookNode) -> list[np.ndarray]:
  found = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
  return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")) for png in found]


def check(cells: list[nbformat.NotebookNode]) -> None:
  """Every cell ran, in order, and those that show pictures show some."""
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  for cell in cells:
    assert all(output.output_type != "error" for output in cell.outputs), cell.source
    found = pictures(cell)
    assert bool(found) == bool(SHOWS.search(cell.source)), cell.source
    assert all(np.ptp(picture) > 0 for picture in found), cell.source


def text(cells: list[nbformat.NotebookNode], id_: str) -> str:
  """What a cell printed, or its value."""
  (cell,) = (cell for cell in cells if cell.id == id_)
  return "".join(output.get("text", output.get("data", {}).get("text/plain", "")) for output in cell.outputs)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
  """The quickstart's model after two steps."""
  root = tmp_path_factory.mktemp("quickstart")
  main.main(["--config=configs/quickstart.py:debug", f"--workdir={root}"])
  return str(root / "mage")


@pytest.mark.slow
def test_generate_runs(model, tmp_path):
  cells = execute("generate", {"MODEL": model, "OUT": str(tmp_path / "out")}, tmp_path)
  check(cells)
  assert len(list((tmp_path / "out").glob("*.png"))) == 32


@pytest.mark.slow
def test_edit_runs(model, tmp_path):
  cells = execute("edit", {"MODEL": model}, tmp_path)
  check(cells)
  assert text(cells, "bits") == "np.True_"


@pytest.mark.slow
def test_features_runs(model, tmp_path):
  cells = execute("features", {"MODEL": model}, tmp_path)
  check(cells)
  assert text(cells, "probe").count("%") == 3


@pytest.mark.slow
def test_vilex_runs(tmp_path):
  main.main(["--config=configs/vilex_emoji.py:debug", f"--workdir={tmp_path}"])
  out = tmp_path / "cook.safetensors"
  cells = execute("vilex", {"MODEL": str(tmp_path / "vilex"), "OUT": str(out)}, tmp_path)
  check(cells)
  assert out.exists()
  assert "True" in text(cells, "save")


@pytest.mark.slow
def test_training_runs(tmp_path):
  workdir = tmp_path / "runs" / "try"
  given = {"PICTURES": "", "WORKDIR": str(workdir), "OPTIONS": SHORT}
  cells = execute("train_on_your_own_pictures", given, tmp_path)
  check(cells)
  assert set(json.loads((workdir / "results.json").read_text())) == {"tokenizer", "mage", "run"}
  assert "damaged: none" in text(cells, "look")
  assert len(pictures(next(cell for cell in cells if cell.id == "samples"))) >= 3
