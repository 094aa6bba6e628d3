"""Modules from outside the package: how they are found, and errors if they are not."""

import importlib
import pathlib
import sys

import pytest
import tiny
from etils import epath

from maskgen import config as config_lib
from maskgen import evaluators, objectives, plugins
from maskgen.data import ops
from maskgen.data.cpu_tf import tf
from maskgen.data.preprocess import parse_preprocess
from maskgen.data.sources import SOURCES, open_source
from maskgen.errors import UserError

CONFIG = """
import ml_collections
def get_config(arg):
  return ml_collections.ConfigDict(dict(objective=dict(name="mage")))
"""
MODULES = {
  "objective": "from maskgen.objectives import mage\nObjective = mage.Objective\n",
  "evaluator": "from maskgen.evaluators import loss\nEvaluator = loss.Evaluator\n",
  "source": """
from maskgen.data.cpu_tf import tf
from maskgen.data.sources import Source, source

@source("grey:size")
def open_grey(argument, split):
  return Source("grey", int(argument), None, lambda index: {"image": tf.zeros((8, 8, 3), tf.uint8)}, split)
""",
  "ops": """
from maskgen.data.ops import op

@op
def invert(image, most: int = 255):
  return most - image
""",
  "taken": """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Evaluator:
  context: object
  networks: tuple[str, ...] = ()
""",
  "empty": "",
  "broken": "import a_package_that_does_not_exist\n",
}


@pytest.fixture(autouse=True)
def unchanged(monkeypatch):
  """Forgets the modules, code folders, ops and sources of a test."""
  finder = plugins._CodeFolders()
  before = set(sys.modules)
  monkeypatch.setattr(plugins, "_code_folders", finder)
  monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, finder])
  monkeypatch.setattr(ops, "OPS", ops.OPS.copy())
  monkeypatch.setattr("maskgen.data.preprocess.OPS", ops.OPS)
  monkeypatch.setattr("maskgen.data.sources.SOURCES", SOURCES.copy())
  yield
  for name in set(sys.modules) - before:
    if name.partition(".")[0] in ("theirs", *MODULES):
      del sys.modules[name]


@pytest.fixture(params=["beside the config", "on Python's path"])
def prefix(request, tmp_path, monkeypatch) -> str:
  """The prefix of a module's name: none beside a config, or a package on Python's path."""
  beside = request.param == "beside the config"
  folder = tmp_path if beside else tmp_path / "theirs"
  folder.mkdir(exist_ok=True)
  for name, text in MODULES.items():
    (folder / f"{name}.py").write_text(text)
  if beside:
    (tmp_path / "config.py").write_text(CONFIG)
    config_lib.load(str(tmp_path / "config.py"))
    return ""
  monkeypatch.syspath_prepend(tmp_path)
  return "theirs."


CONTEXT = evaluators.Context(
  objective=None,
  predict={"loss": lambda *_: {}},
  batches=lambda split: (),
  fresh_variables=lambda *_: {},
  class_names=None,
)


def test_all_four_are_found(prefix, tmp_path):
  objective = objectives.build({"name": f"{prefix}objective", "image_size": (32, 32)})
  assert objective == objectives.build({"name": "mage", "image_size": (32, 32)})
  section = {"type": f"{prefix}evaluator", "every_steps": 1}
  assert evaluators.build("mine", section, CONTEXT).requires == ("loss",)
  assert open_source(f"{prefix}source:5", "train").size == 5
  calls = parse_preprocess(f"decode|{prefix}ops.invert(254)").ops
  image = ops.OPS[calls[1].name](tf.zeros((1, 1, 3), tf.uint8), *calls[1].args)
  assert int(image[0, 0, 0]) == 254

  # What came from beside the config goes where the model is; the environment's modules do not.
  plugins.write_code(epath.Path(tmp_path / "run"))
  copied = {str(path.relative_to(tmp_path / "run" / "code")) for path in (tmp_path / "run").rglob("*.py")}
  assert copied == (set() if prefix else {"objective.py", "evaluator.py", "source.py", "ops.py"})


def test_what_is_beside_the_config_is_copied_even_if_python_finds_it(tmp_path, monkeypatch):
  # `python -m` puts the folder where it starts on Python's path.
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / "config.py").write_text("import theirs.part\nimport empty\n" + CONFIG)
  (tmp_path / "empty.py").write_text("")
  (tmp_path / "broken.py").write_text("")
  (tmp_path / "theirs").mkdir()
  for name in ("__init__", "part"):
    (tmp_path / "theirs" / f"{name}.py").write_text("")
  (tmp_path / "maskgen").symlink_to(pathlib.Path(plugins.__file__).parent)
  config_lib.load(str(tmp_path / "config.py"))
  run = epath.Path(tmp_path / "run")
  plugins.write_code(run)
  copied = {str(path.relative_to(tmp_path / "run" / "code")) for path in (tmp_path / "run").rglob("*.py")}
  assert copied == {"empty.py", "theirs/__init__.py", "theirs/part.py"}
  found = {
    name: plugins.has_code(run, name, objectives.__name__) for name in ("theirs", "theirs.part", "mage")
  }
  assert all(found.values()) and not plugins.has_code(run, "broken", objectives.__name__)


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (
      lambda at: objectives.build({"name": f"{at}empty"}),
      r"'\S*empty' is .*empty\.py, which has no data",
    ),
    (
      lambda at: evaluators.build("mine", {"type": f"{at}taken"}, CONTEXT),
      r"config\.evals\.mine: evaluator '\S*taken' has an option 'networks', a name that is taken: rename it",
    ),
    (lambda at: open_source(f"{at}empty:5", "train"), r"empty\.py, which has no @source function: add one"),
    (lambda at: open_source(f"{at}source", "train"), r"write it as '\S*source:size'"),
    (lambda at: parse_preprocess(f"decode|{at}ops.invrt"), r"ops\.invrt' .* did you mean invert\(most=255\)"),
  ],
)
def test_modules_that_lack_something(prefix, build, message):
  with pytest.raises(UserError, match=message):
    build(prefix)


def test_a_fault_within_a_module_is_its_own(prefix):
  with pytest.raises(ModuleNotFoundError, match="a_package_that_does_not_exist"):
    objectives.build({"name": f"{prefix}broken"})


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (lambda: objectives.build({"name": "mgae"}), r"name 'mgae' does not exist; did you mean 'mage'\?"),
    (lambda: objectives.build({"name": "no.where"}), r"name 'no\.where' cannot be imported: install it"),
    (lambda: objectives.build({"name": "../mage"}), r"name '\.\./mage' cannot be imported"),
    (
      lambda: evaluators.build("mine", {"type": "zzz"}, CONTEXT),
      r"mine\.type 'zzz' does not exist; known: accuracy, .*, loss, probe, .*, vilex, zero_shot$",
    ),
    (
      lambda: evaluators.build("mine", {"type": "pictures"}, CONTEXT),
      r"'pictures' does not exist",
    ),
    (
      lambda: evaluators.build("mine", {}, CONTEXT),
      r"needs the key 'type', one of accuracy, capt",
    ),
    (lambda: open_source("no.where:5", "train"), r"data source 'no\.where' cannot be imported: install it"),
    (lambda: parse_preprocess("decode|nowhere.invert"), r"module 'nowhere' cannot be imported: install"),
  ],
)
def test_names_that_do_not_exist(build, message):
  with pytest.raises(UserError, match=message):
    build()


def test_one_process_does_not_mix_versions_of_a_module(tmp_path):
  for name, text in (("first", "VERSION = 1\n"), ("copy", "VERSION = 1\n"), ("second", "VERSION = 2\n")):
    (tmp_path / name).mkdir()
    (tmp_path / name / "empty.py").write_text(text)
  plugins.add_code_folder(tmp_path / "first")
  assert importlib.import_module("empty").VERSION == 1
  plugins.add_code_folder(tmp_path / "copy")
  with pytest.raises(UserError, match=r"second/empty\.py differs from .*first/empty\.py"):
    plugins.add_code_folder(tmp_path / "second")


def test_the_environment_comes_before_code_folders(tmp_path):
  (tmp_path / "json.py").write_text("raise AssertionError")
  plugins.add_code_folder(tmp_path)
  assert importlib.reload(sys.modules["json"]).dumps({}) == "{}"


def test_evaluations_are_added_on_the_command_line(tmp_path):
  path = tmp_path / "config.py"
  path.write_text(CONFIG)
  given = {"evals.mine.every_steps": "10", "evals.mine.type": "my_package.mine", "evals.mine.bins": "4"}
  mine = {"every_steps": 10, "type": "my_package.mine", "bins": 4}
  assert config_lib.to_dict(config_lib.load(str(path), given))["evals"] == {"mine": mine}
  staged = config_lib.load(tiny.FILE, {f"mage.{key}": value for key, value in given.items()})
  assert set(staged.mage.evals) == {"validation", "samples", "mine"}
  with pytest.raises(UserError, match=r"config has no key 'evals'|config\.evals has no key 'mine'"):
    config_lib.load(str(path), {"evals.mine.every_steps": "10"})
