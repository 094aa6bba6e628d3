"""The example of docs/extending.md: an objective, evaluator, op and source from outside, end to end."""

import json
import pathlib
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import maskgen
from maskgen import main, plugins
from maskgen.data import ops, sources
from maskgen.errors import UserError
from maskgen.tools import export, generate

DOCS = pathlib.Path(__file__).parents[1] / "docs"
EXAMPLE = DOCS / "examples" / "colours"
MODULES = {path.stem for path in EXAMPLE.glob("*.py")}


def forget() -> None:
  """Resets this process to one without the example's modules and without code folders."""
  for name in MODULES & set(sys.modules):
    del sys.modules[name]
  plugins._code_folders.folders.clear()
  for registry in (ops.OPS, sources.SOURCES):
    for name in [name for name, known in registry.items() if _module_of(known) in MODULES]:
      del registry[name]


def _module_of(registered) -> str:
  return (registered[1] if isinstance(registered, tuple) else registered).__module__


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> str:
  """The example's config, in a folder that is not on Python's path."""
  folder = tmp_path_factory.mktemp("theirs")
  shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [entry for entry in sys.path if entry != str(EXAMPLE)])
    forget()
    yield f"{folder / 'colour_config.py'}:debug"
    forget()


@pytest.fixture(scope="module")
def run(config, tmp_path_factory) -> pathlib.Path:
  """A finished run of it, after a check; the objective's evaluations are added on the command line."""
  workdir = tmp_path_factory.mktemp("colours") / "run"
  given = ["--config.mage.evals.few.type=colour_error", "--config.mage.evals.few.every_steps=1"]
  arguments = [f"--config={config}", f"--workdir={workdir}", *given, "--config.mage.evals.few.num_images=8"]
  main.main([*arguments, "--mode=check"])
  assert not workdir.exists()
  main.main(arguments)
  return workdir


def test_it_trains_and_is_evaluated(run):
  lines = [json.loads(line) for line in (run / "mage" / "metrics.jsonl").read_text().splitlines()]
  results = json.loads((run / "mage" / "results.json").read_text())
  assert any("train/histogram_loss" in line for line in lines)
  assert {"validation/histogram_loss", "colours/error", "few/error", "few/error_mean"} <= results.keys()
  assert 0 < results["few/error"] < 1
  with Image.open(next((run / "mage" / "samples").glob("colours_histograms_*.png"))) as picture:
    assert picture.mode == "RGB" and picture.width == picture.height  # 16 images, twice 8 bins


def test_a_workdir_and_an_export_keep_the_code_and_run_it_when_trusted(run, tmp_path):
  for stage in ("tokenizer", "mage"):
    copied = {path.name for path in (run / stage / "code").glob("*")}
    assert copied == {"colour_mage.py", "colour_error.py", "tint.py", "discs.py"}
  forget()
  exported = tmp_path / "export"
  with pytest.raises(UserError, match=r"needs the module .colour_mage., .* trust the code in .*mage/code"):
    export.main([f"--model={run / 'mage'}", f"--out={exported}"])
  step = max((run / "mage" / "checkpoints").iterdir())
  export.main([f"--model={step}", f"--out={exported}", "--trust_code"])
  forget()
  with pytest.raises(UserError, match=r"if you trust the code in .*export/code, set trust_code$"):
    maskgen.load(exported)
  assert "colour_mage" not in sys.modules

  arguments = [f"--model={exported}", f"--out={tmp_path / 'sheet.png'}", "--count=1", "--steps=2"]
  with pytest.raises(UserError, match=r"if you trust the code in .*export/code, set trust_code$"):
    generate.main(arguments)
  generate.main([*arguments, "--trust_code"])
  forget()

  model = maskgen.load(exported, trust_code=True)
  images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
  assert model.call("histogram", {"image": images}).shape == (2, 3, 8)
  assert model.generate(batch=1, steps=2).shape == (1, 16, 16, 3)

  forget()
  shutil.rmtree(exported / "code")
  with pytest.raises(UserError, match=r"add its folder to PYTHONPATH$"):
    maskgen.load(exported, trust_code=True)


def test_what_python_finds_needs_no_trust(run, monkeypatch):
  forget()
  monkeypatch.syspath_prepend(EXAMPLE)
  assert maskgen.load(run / "mage").objective.bins == 8


def test_an_export_warns_of_missing_code(run, tmp_path, monkeypatch, caplog):
  forget()
  monkeypatch.syspath_prepend(EXAMPLE)
  export.main([f"--model={run / 'mage'}", f"--out={tmp_path / 'whole'}"])
  assert not caplog.records
  shutil.copytree(run / "mage", tmp_path / "mage", ignore=shutil.ignore_patterns("code"))
  export.main([f"--model={tmp_path / 'mage'}", f"--out={tmp_path / 'part'}"])
  assert "export does not contain the module 'colour_mage'" in caplog.text


def test_the_page_shows_the_files_as_they_are():
  text = (DOCS / "extending.md").read_text()
  shown = dict(re.findall(r"^`examples/colours/(\w+\.py)`.*?\n\n```python\n(.*?)^```$", text, re.M | re.S))
  assert shown.keys() == {f"{name}.py" for name in MODULES}
  for name, code in shown.items():
    assert code == (EXAMPLE / name).read_text(), name
    assert len(code.splitlines()) < 150
