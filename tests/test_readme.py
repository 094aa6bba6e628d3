"""The README's commands work, and those of the documentation exist."""

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import itertools
import json
import pathlib
import re
import shlex

import pytest
import tiny
from PIL import Image

from maskgen import config as config_lib
from maskgen import main
from maskgen.errors import UserError

trained = tiny.trained

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))
CARDS = sorted(ROOT.glob("maskgen/pretrained/*/README.md"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
CONCEPTS = (ROOT / "docs/concepts.md").read_text()
MAIN = "python -m maskgen.main --config=configs/quickstart.py --workdir=runs/quickstart"


def blocks(language: str, text: str = README) -> list[str]:
  return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str = README) -> list[str]:
  """Every shell command, one by one."""
  lines = "\n".join(blocks("bash", text)).replace("\\\n", " ").splitlines()
  return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


# Only published text-to-image models have these options, and `--help` without a model does not list them.
PUBLISHED = {"--width"}
MODULES = [command for command in commands() if command.startswith("python -m maskgen.")]


@functools.cache
def flags(module_name: str, *subcommand: str) -> set[str]:
  """The flags of a tool, from its help."""
  text = io.StringIO()
  with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
    importlib.import_module(module_name).main([*subcommand, "--help"])
  return {*re.findall(r"--\w+", text.getvalue())}


def arguments_of(command: str) -> tuple[str, list[str]]:
  _, _, module, *arguments = shlex.split(command, comments=True)
  return module, arguments


def test_the_main_commands_are_there():
  assert MAIN in commands()
  assert any(command.split()[0] == "pytest" for command in commands())
  assert blocks("python")


def test_continuous_integration_runs_the_two_commands():
  workflow = (ROOT / ".github/workflows/tests.yml").read_text()
  chains = [line for line in "\n".join(blocks("bash")).splitlines() if "pytest" in line or MAIN in line]
  assert len(chains) == 2
  for chain in chains:
    assert f"- run: {chain}\n" in workflow


def test_all_blocks_have_a_language():
  assert README.count("```") == 2 * len(re.findall(r"^```\w+$", README, flags=re.MULTILINE))


@pytest.mark.parametrize("command", MODULES)
def test_commands_have_arguments_that_exist(command, tmp_path):
  module_name, arguments = arguments_of(command)
  plain = [a for a in arguments if a.startswith("--") and not a.startswith("--config.")]
  assert {argument.partition("=")[0] for argument in plain} <= flags(module_name)
  if module_name == "maskgen.main":
    config = next(a.partition("=")[2] for a in arguments if a.startswith("--config="))
    overrides = [a for a in arguments if a.startswith("--config.")]
    config_lib.load(config, main.parse_overrides(overrides))


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_commands_of_the_documentation_exist(page):
  text = page.read_text()
  for command in commands(text):
    if not command.startswith("python -m maskgen."):
      continue
    module_name, arguments = arguments_of(command.rstrip("& "))
    subcommand = itertools.takewhile(lambda a: re.fullmatch("[a-z_]+", a), arguments)
    plain = [a for a in arguments if a.startswith("--") and not a.startswith("--config.")]
    known = flags(module_name, *subcommand) | PUBLISHED
    assert {argument.partition("=")[0] for argument in plain} <= known, command
  for config in re.findall(r"configs/\w+\.py", text):
    assert (ROOT / config).is_file(), config


def uses_of_configs(text: str) -> list[tuple[str, list[str]]]:
  """Each `--config=` of a text, in blocks and within lines, with the `--config.` flags after it."""
  found = []
  for code in re.findall(r"--config=configs/[^`\n]*", text.replace("\\\n", " ")):
    config, *rest = shlex.split(code, comments=True)
    found.append((config.partition("=")[2], [a for a in rest if a.startswith("--config.")]))
  return found


@pytest.mark.parametrize(
  "page", [*CARDS, *CONFIGS, *DOCS], ids=lambda page: f"{page.parent.name}/{page.stem}"
)
def test_configs_of_the_documentation_load(page):
  """With their arguments and overrides; test_train runs each config with `:debug`."""
  for config, flags in uses_of_configs(page.read_text()):
    config = re.sub(r"(?<==)N\b", "8", config)
    try:
      config_lib.load(config, main.parse_overrides(flags))
    except UserError as error:  # of a model whose config is read: everything else was right
      assert re.match(r"model (runs|weights)/\S+ does not exist", str(error)), (config, str(error))


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_python_of_the_documentation_imports_what_exists(page):
  for code in blocks("python", page.read_text()):
    for node in ast.walk(ast.parse(code)):
      if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "maskgen":
        for alias in node.names:
          name = f"{node.module}.{alias.name}"
          module = importlib.import_module(node.module)
          assert hasattr(module, alias.name) or importlib.util.find_spec(name), name


def test_the_site_lists_every_page():
  site = (ROOT / "docs/site/mkdocs.yml").read_text()
  pages = [page.relative_to(ROOT / "docs") for page in [*DOCS, *(ROOT / "docs/api").glob("*.md")]]
  assert not [page for page in pages if f": {page}\n" not in site]


def test_every_config_it_names_exists():
  configs = set(re.findall(r"configs/\w+\.py", README))
  assert configs
  for config in configs:
    config_lib.load(config)


def test_every_file_it_points_to_exists():
  paths = set(re.findall(r"(?:docs|maskgen|tests|configs|launch)/[\w/]+\.\w+", README))
  assert paths
  missing = [p for p in paths if not (ROOT / p).is_file()]
  assert not missing


@pytest.mark.parametrize("code", blocks("python") + blocks("python", CONCEPTS))
def test_python_runs(code, trained, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  exec(compile(code.replace("runs/quickstart", str(trained)), "README.md", "exec"), {})


def test_the_main_command_trains_and_its_tools_work(tmp_path):
  """As typed, except for `:debug` and the folder, in a separate process."""
  command = MAIN.replace("quickstart.py", "quickstart.py:debug").replace("runs", str(tmp_path / "runs"))
  process = tiny.python(*shlex.split(command)[1:])
  _, errors = process.communicate(timeout=600)
  assert process.returncode == 0, errors
  # Nothing but our own log: times, and indented numbers.
  assert all(re.match(r"\d\d:\d\d:\d\d |  ", line) for line in errors.splitlines()), errors
  results = json.loads((tmp_path / "runs" / "quickstart" / "results.json").read_text())
  assert set(results) == {"tokenizer", "mage", "run"}
  tools = [command for command in MODULES if ".tools." in command]
  assert tools
  pictures = tmp_path / "pictures"
  pictures.mkdir()
  for i in range(20):
    Image.new("RGB", (300, 280), (10 * i, 0, 0)).save(pictures / f"{i}.jpg")
  for tool in tools:
    module, arguments = arguments_of(tool)
    given = [re.sub(r"=(?=runs|[\w/]+\.png|exports)", f"={tmp_path}/", a) for a in arguments]
    given = [argument.replace("/my/pictures", str(pictures)) for argument in given]
    if module == "maskgen.tools.preflight":  # the large model compiles for minutes, and needs libtpu
      given = ["--config=configs/mage_large.py:debug", "--stage=mage", "--topology=local"]
    importlib.import_module(module).main(given)
