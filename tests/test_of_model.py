"""Trained, exported and converted models with the data and evaluations of a config."""

import json

import numpy as np
import pytest
import tiny

from maskgen import main, storage
from maskgen.errors import UserError
from maskgen.report import runs as tables
from maskgen.tools import bench, export, sweep
from maskgen.training import evaluation

trained = tiny.trained

CONFIG = f"--config={tiny.FILE}"
# Data of another size than the models'.
SMALL = [f"--config.tokenizer.data.{key}=decode(3)|resize(8)" for key in ("preprocess", "eval_preprocess")]


@pytest.fixture
def numbers(monkeypatch):
  """The numbers of each evaluation, as they are shown."""
  shown = {}
  monkeypatch.setattr(evaluation, "show", lambda name, where, found: shown.update({where: found}))
  return shown


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
  out = tmp_path_factory.mktemp("export") / "mage"
  export.main([f"--model={trained / 'mage'}", f"--out={out}"])
  return out


def evaluate(model, workdir, *flags):
  main.main([CONFIG, "--mode=eval", f"--checkpoint={model}", f"--workdir={workdir}", *flags])


def test_a_checkpoint_and_an_export_have_the_numbers_of_training(trained, exported, tmp_path, numbers):
  run, results = trained / "mage", json.loads((trained / "mage" / "results.json").read_text())
  evaluate(exported, tmp_path / "exported")
  evaluate(run / "checkpoints" / "4", tmp_path / "fourth")
  assert numbers[f"of {exported}"] == results
  lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
  (fourth,) = (line for line in lines if line["step"] == 4 and "validation/loss" in line)
  assert numbers["at step 4"] == {key: fourth[key] for key in results} != results
  written = {file.name for file in tmp_path.rglob("*") if file.is_file() and file.parent.name != "samples"}
  assert written == {"receipts.json"}


def test_a_probe_of_any_model_with_its_tables(exported, tmp_path, numbers):
  evals = {"type": "probe", "every_steps": 1, "baselines": False, "shots": (), "num_images": 64}
  evals |= {"sweeps": ("clip",), "neighbours": (10,), "per_class": ("top1_clip",)}
  evaluate(exported, tmp_path, *(f"--config.mage.evals.probe.{key}={value}" for key, value in evals.items()))
  found = numbers[f"of {exported}"]
  assert {"probe/top1_clip", "probe/log10_C_clip", "probe/top1_knn10"} < found.keys()
  names = ["classes_top1_clip", "confusion_top1_clip"]
  rows = {name: tables.read_table(tmp_path / f"samples/probe_{name}_eval.csv") for name in names}
  assert rows[names[0]][0] == ["class", "images", "top1", "low", "high", "taken_for", "as_often"]
  counts = np.array([row[1:] for row in rows[names[1]][1:]], int)
  assert np.trace(counts) / counts.sum() == pytest.approx(found["probe/top1_clip"])
  assert (tmp_path / "samples/probe_confusion_top1_clip_eval.png").exists()


def test_a_model_of_another_stage(trained, tmp_path, numbers):
  evaluate(trained / "tokenizer", tmp_path / "out", "--stage=tokenizer", "--config.tokenizer.seed=1")
  results = json.loads((trained / "tokenizer" / "results.json").read_text())
  assert numbers["at step 6"] == results


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--checkpoint=nowhere"], "model nowhere does not exist"),
    (["--checkpoint=RUN/checkpoints/5"], r"checkpoints holds no step 5: give one of 4, 6"),
    (
      ["--checkpoint=RUN", "--mode=train"],
      "needs --mode=eval: to train from it, set config.init_from instead",
    ),
    (["--checkpoint=RUN", "--stage=mag"], "has no such stage; did you mean 'mage'"),
    (
      ["--checkpoint=RUN", "--config.mage.objective.width=8"],
      "the objective is that of .*mage, leave it out",
    ),
    (["--checkpoint=RUN", "--stage=tokenizer", *SMALL], r"config\.tokenizer\.data provides images of shape"),
    (["--stage=mage"], "--stage=mage needs --checkpoint"),
  ],
)
def test_what_does_not_fit_is_refused(flags, message, trained, tmp_path):
  flags = [flag.replace("RUN", str(trained / "mage")) for flag in flags]
  with pytest.raises(UserError, match=message):
    main.main([CONFIG, "--mode=eval", f"--workdir={tmp_path / 'out'}", *flags])
  assert not (tmp_path / "out").exists()


def test_an_export_is_swept_in_a_feature_space_with_a_path(exported, tmp_path):
  with pytest.raises(UserError, match=r"has no data of its own: add --config=FILE"):
    sweep.main([f"--model={exported}", f"--out={tmp_path}"])
  space = f"--features=model:{exported}"
  arguments = [f"--model={exported}", CONFIG, f"--out={tmp_path}", "--num_images=8", "--steps=1,2"]
  sweep.main([*arguments, space])
  table = (tmp_path / sweep.TABLE).read_text()
  assert table.count(f"model:{exported}") == 2 and "frechet_mage" in table.splitlines()[0]
  with pytest.raises(UserError, match=r"features model:.*mage, this sweep has pixels"):
    sweep.main(arguments)
  other = "--config.mage.data.eval_preprocess=decode(3)|resize(20)|center_crop(16)"
  with pytest.raises(UserError, match=r"with data \w+, this sweep has \w+: give another --out"):
    sweep.main([*arguments, space, other])


def test_a_benchmark_measures_the_model(exported, tmp_path, capsys):
  config = storage.load_config(exported)
  config["objective"]["sampling"]["steps"] = 1
  (exported / "config.json").write_text(json.dumps(config))
  bench.main(["sample", CONFIG, f"--checkpoint={exported}", "--batch_size=8", "--repeats=1"])
  assert json.loads(capsys.readouterr().out)["sampling_steps"] == 1
