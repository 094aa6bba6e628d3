"""What makes a run pleasant: the best checkpoint, early stopping, early pictures, trackers."""

import dataclasses
import json
import logging
import shutil
import sys
from typing import ClassVar

import jax
import numpy as np
import pytest
import tiny
from etils import epath
from test_errors import assert_clear
from test_train import run, story

from maskgen import main, processes
from maskgen.config import Checkpointing
from maskgen.errors import UserError
from maskgen.evaluators import Context, Report
from maskgen.training import best as best_lib
from maskgen.training import forecast, longer, metrics, writers
from maskgen.training.evaluation import due_evaluators
from maskgen.training.experiment import Experiment

trained = tiny.trained

FOLLOWED = dict(checkpoint__keep_best="validation/loss", checkpoint__best_mode="min", checkpoint__keep="1")
LOSSES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 3.0, 10: 6.0, 12: 1.0}


@dataclasses.dataclass
class Told:
  """An evaluation with known numbers."""

  requires: ClassVar[tuple[str, ...]] = ()

  context: Context
  step: int = 0

  def run(self, variables, rng):
    return Report({"loss": LOSSES[self.step]})


@pytest.fixture(scope="module")
def experiment():
  """A run of 12 steps, evaluated and saved at every second, whose numbers are `LOSSES`."""
  section = tiny.stage("tokenizer", "steps=12,save_steps=2,log_every_steps=2")
  section["evals"] = {"validation": {"type": "reconstruction", "every_steps": 2}, **section["evals"]}
  section["evals"]["reconstruction"]["every_steps"] = 100
  section["checkpoint"] |= {"keep_best": "validation/loss", "best_mode": "min", "keep": 1, "patience": 3}
  built = Experiment(section)
  told = Told(built.evaluators["validation"][1].context)
  built.evaluators["validation"] = (2, told)
  update = built.update

  def counting(state, frozen, batch):
    told.step = int(state.step) + 1
    return update(state, frozen, batch)

  built.update = counting
  return built


def steps_of(workdir):
  return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir() if folder.name.isdigit())


@pytest.fixture(scope="module")
def undisturbed(experiment, tmp_path_factory):
  workdir = epath.Path(tmp_path_factory.mktemp("best")) / "run"
  workdir.mkdir()
  return workdir, run(experiment, workdir)


def test_the_best_is_kept_beside_the_newest_and_a_run_stops_early(undisturbed):
  workdir, results = undisturbed
  assert steps_of(workdir) == [4, 10]  # of equal values the first; patience ends before step 12
  assert results["validation/loss"] == 6.0
  assert "reconstruction/psnr" in results  # what was not due is evaluated at the end, too
  last = [line for line in metrics.read(workdir) if "validation/loss" in line][-1]
  assert last["step"] == 10 and "reconstruction/psnr" in last
  receipt = json.loads((workdir / "receipts.json").read_text())
  assert receipt["model"]["step"] == 10


@pytest.mark.parametrize("place", ["save 6", "evaluate 10"])
def test_a_kill_loses_neither_the_best_nor_patience(place, experiment, undisturbed, tmp_path):
  workdir = epath.Path(tmp_path) / "run"
  workdir.mkdir()
  kind, step = place.split()
  assert run(experiment, workdir, kind, int(step)) is None
  assert run(experiment, workdir) == undisturbed[1]
  assert steps_of(workdir) == [4, 10]
  assert story(workdir) == story(undisturbed[0])


def test_a_finished_run_that_stopped_early_stays_so(experiment, undisturbed):
  workdir, results = undisturbed
  before = story(workdir)
  assert run(experiment, workdir) == results
  assert story(workdir) == before


def test_a_run_that_stopped_early_goes_on_with_more_patience(experiment, undisturbed):
  section = experiment.config.checkpoint
  for patience in (2, 3):
    with pytest.raises(UserError, match=rf"patience={patience}: raise it above 3 as well") as error:
      longer.check(undisturbed[0], dataclasses.replace(section, patience=patience))
    assert_clear(error)
  for patience in (4, 0):
    longer.check(undisturbed[0], dataclasses.replace(section, patience=patience))


def test_a_step_is_timed_in_all_processes_or_in_none(experiment, monkeypatch):
  monkeypatch.setattr(processes, "any_of", lambda flag: True)
  compiled = jax.jit(lambda x: x).lower(1.0).compile()
  assert forecast.forecast(experiment, compiled, iter(())).startswith("time not measured: another process")


def test_a_best_whose_checkpoint_is_gone_does_not_count():
  section = Checkpointing(keep_best="a/b", best_mode="max", patience=2)
  lines = [{"step": step, "a/b": value} for step, value in ((1, 9.0), (2, 1.0), (3, float("nan")))]
  found = best_lib.Best(section, [{"step": 0, "input_wait": 0.1}, *lines], kept=[2, 3])
  assert (found.step, found.value, found.misses, found.over) == (2, 1.0, 1, False)
  with pytest.raises(UserError, match=r"keep_best is 'a/b', which config\.evals\.a does not give") as error:
    found.update(4, {"a/c": 1.0})
  assert_clear(error)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(checkpoint__patience="2"), "patience is 2 without keep_best: set it"),
    (dict(checkpoint__keep_best="loss"), "keep_best is 'loss': give a metric"),
    (dict(checkpoint__keep_best="validation/loss"), "best_mode is None: set it to 'max' or 'min'"),
    (FOLLOWED | dict(checkpoint__keep_best="x/loss"), "without config.evals.x; known: samples, validation"),
    (
      FOLLOWED | dict(evals__validation__every_steps="5"),
      "every_steps is 5, and .* a multiple of log_every",
    ),
    (dict(evals__validation__first_step="-1"), "config.evals.validation.first_step is -1: give a step"),
    (dict(writers="('wandbb',)"), "config.writers has 'wandbb'; did you mean 'wandb'"),
  ],
)
def test_wrong_settings(changes, message):
  with pytest.raises(UserError, match=message) as error:
    Experiment(tiny.stage("mage", **changes))
  assert_clear(error)


def test_hyperparameters_are_flat_and_plain():
  config = {"a": {"b": 1, "c": (1, 2), "d": None}, "e": "x", "f": False, "g": {}}
  assert writers.hyperparameters(config) == {"a.b": 1, "a.c": "(1, 2)", "e": "x", "f": False}


@pytest.mark.parametrize("name", writers.WRITERS)
def test_a_tracker_that_is_not_installed(name, monkeypatch):
  monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(
    UserError, match=rf"has '{name}', which is not installed .*'maskgen\[{name}\]'"
  ) as error:
    writers.check([name])
  assert_clear(error)


PICTURE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def write(workdir):
  (tracker,) = writers.open_trackers([workdir.name], workdir)
  (found,) = json.loads((workdir / writers.TRACKERS).read_text()).values()
  tracker.write_hparams({"seed": 1, "objective.name": "mage"})
  for step in (1, 2):
    tracker.write_scalars(step, {"train/loss/main": step / 2})
  tracker.write_images(2, {"samples/generated": PICTURE})
  tracker.close()
  return found


def test_a_tracker_that_fails_ends_no_run(caplog):
  class Down:
    id = "x"

    def write_scalars(self, step, scalars):
      raise ConnectionError("no server")

    def close(self):
      raise ValueError

  tracker = writers.Tracker("mlflow", Down())
  for step in (1, 2):
    tracker.write_scalars(step, {"loss": 1.0})
  tracker.close()
  (warning,) = caplog.messages
  assert warning.startswith("mlflow did not take all values (no server)")


def test_mlflow_has_what_was_written(tmp_path, monkeypatch):
  mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: its writer is not tested")
  monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
  monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
  monkeypatch.chdir(tmp_path)
  workdir = epath.Path(tmp_path) / "mlflow"
  workdir.mkdir()
  assert write(workdir) == write(workdir)  # a run that continues
  client = mlflow.MlflowClient()
  (found,) = client.search_runs([client.get_experiment_by_name("maskgen").experiment_id])
  assert found.data.params == {"seed": "1", "objective.name": "mage"}
  assert {one.step: one.value for one in client.get_metric_history(found.info.run_id, "train/loss/main")} == {
    1: 0.5,
    2: 1.0,
  }
  assert [one.path for one in client.list_artifacts(found.info.run_id)] == ["samples"]


def test_wandb_has_what_was_written(tmp_path, monkeypatch):
  pytest.importorskip("wandb", reason="wandb is not installed: its writer is not tested")
  monkeypatch.setenv("WANDB_MODE", "offline")
  workdir = epath.Path(tmp_path) / "wandb"
  workdir.mkdir()
  assert write(workdir) == write(workdir)
  assert json.loads((workdir / writers.TRACKERS).read_text()).keys() == {"wandb"}
  assert len(list(workdir.glob("wandb/offline-run-*/run-*.wandb"))) == 2
  assert list(workdir.glob("wandb/offline-run-*/files/media/images/samples/generated_*.png"))


def test_one_more_early_evaluation(experiment, monkeypatch):
  monkeypatch.setitem(experiment.config.evals["reconstruction"], "first_step", 3)
  assert "reconstruction" in due_evaluators(experiment, 3)
  assert "reconstruction" not in due_evaluators(experiment, 4)


def test_a_finished_run_goes_on_when_its_length_is_raised(trained, tmp_path, caplog):
  root = shutil.copytree(trained, tmp_path / "run")
  command = [f"--config={tiny.FILE}", f"--workdir={root}", "--config.mage.total_steps=8"]
  before = [(trained / "mage" / name).read_text() for name in ("results.json", "metrics.jsonl")]
  (root / "mage" / "results.json").rename(root / "mage" / "results_0000006.json")  # killed early
  with caplog.at_level(logging.INFO, "maskgen"):
    main.main(command)
  assert (
    "mage: goes on from its end at step 6 to step 8; its results so far are in results_0000006" in caplog.text
  )
  assert "schedules of 8 steps from here on (main 0.00025)" in caplog.text
  assert "tokenizer step" not in caplog.text
  assert (root / "mage" / "results_0000006.json").read_text() == before[0]
  assert (root / "mage" / "metrics.jsonl").read_text().startswith(before[1])
  assert [line["step"] for line in metrics.read(epath.Path(root / "mage"))][-2:] == [8, 8]
  assert json.loads((root / "mage" / "config.json").read_text())["total_steps"] == 8
  for name in ("mage.total_steps=7", "tokenizer.total_steps=8"):  # shorter, or not the last
    with pytest.raises(UserError, match="its schedules depend on its length") as error:
      main.main([*command[:2], f"--config.{name}"])
    assert_clear(error)
