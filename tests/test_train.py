"""The loop: a run that is killed anywhere ends like an uninterrupted one; the content of workdirs."""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from etils import epath
from PIL import Image

import maskgen
from maskgen import config as config_lib
from maskgen import main, storage
from maskgen.config import Checkpointing, Profile
from maskgen.data import pipeline
from maskgen.errors import UserError
from maskgen.training import metrics, train
from maskgen.training.experiment import Experiment

trained = tiny.trained
real_train = train.train

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
# Saves at 4 and 8, logs at 3, 4, 6, 8 and 9, evaluates at 4, 8 and 9.
STEPS = 9


class Killed(BaseException):
  """An exception that nothing catches."""


@pytest.fixture(scope="module")
def experiments(trained):
  """One experiment of each objective; compiled once for all tests."""
  made = {}

  def get(name):
    if name not in made:
      frozen = {} if name == "tokenizer" else {"pretrained__tokenizer": str(trained / "tokenizer")}
      made[name] = experiment = Experiment(tiny.stage(name, f"steps={STEPS}", **frozen))
      # Evaluations read the same batches each time: keep them.
      batches = functools.cache(lambda *args: list(pipeline.Data.eval_batches(experiment.data, *args)))
      object.__setattr__(experiment.data, "eval_batches", lambda *args: iter(batches(*args)))
    return made[name]

  return get


@pytest.fixture(scope="module")
def uninterrupted(experiments, tmp_path_factory):
  """(workdir, results) of an undisturbed run of each objective."""
  made = {}

  def get(name):
    if name not in made:
      workdir = new_workdir(tmp_path_factory.mktemp(name), experiments(name))
      made[name] = workdir, train.train(experiments(name), workdir)
    return made[name]

  return get


def new_workdir(folder, experiment):
  workdir = epath.Path(folder) / experiment.config.objective["name"]
  workdir.mkdir()
  (workdir / "config.json").write_text(json.dumps({"objective": dict(experiment.config.objective)}))
  return workdir


def run(experiment, workdir, place=None, at=0):
  """Trains, or is killed at a place: before a step, in an evaluation, or before or after a save."""

  class Checkpoints(storage.Checkpoints):
    def save(self, step, state):
      if (place, at) == ("save", step):
        raise Killed
      super().save(step, state)
      if (place, at) == ("saved", step):
        raise Killed

  def update(state, frozen, batch):
    if (place, at) == ("update", int(state.step)):
      raise Killed
    return compiled(state, frozen, batch)

  def evaluate(experiment, variables, step, best):
    if (place, at) == ("evaluate", step):
      raise Killed
    return real_evaluate(experiment, variables, step, best)

  compiled, real_evaluate = experiment.update, train.evaluate
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(storage, "Checkpoints", Checkpoints)
    patch.setattr(experiment, "update", update)
    patch.setattr(train, "evaluate", evaluate)
    try:
      return real_train(experiment, workdir)
    except Killed:
      return None


def story(workdir):
  """`metrics.jsonl` without timings."""
  return [
    {key: value for key, value in line.items() if not key.startswith("timing/") and key != "input_wait"}
    for line in metrics.read(epath.Path(workdir))
  ]


def newest(experiment, workdir):
  checkpoints = storage.Checkpoints(workdir, Checkpointing())
  return checkpoints.restore(experiment.targets["state"])


def assert_same_run(experiment, workdir, results, expected):
  other, other_results = expected
  tiny.assert_same_bits(newest(experiment, workdir), newest(experiment, other))
  assert story(workdir) == story(other)
  assert results == other_results
  assert sorted(p.name for p in (workdir / "samples").iterdir()) == sorted(
    p.name for p in (other / "samples").iterdir()
  )


# Killed and continued


@pytest.mark.parametrize(
  ("name", "kills"),
  [
    ("tokenizer", "saved 4|update 6|evaluate 9"),
    (
      "mage",
      "update 2|save 4|saved 4|evaluate 4|update 4|update 7|save 8|evaluate 8|save 9|saved 9|evaluate 9",
    ),
  ],
)
def test_a_killed_run_ends_like_one_that_is_not(name, kills, experiments, uninterrupted, tmp_path):
  experiment = experiments(name)
  workdir = new_workdir(tmp_path, experiment)
  for kill in kills.split("|"):
    place, at = kill.split()
    assert run(experiment, workdir, place, int(at)) is None
  assert_same_run(experiment, workdir, run(experiment, workdir), uninterrupted(name))


@pytest.mark.parametrize("name", tiny.STAGES)
def test_the_first_state_has_the_types_of_later_ones(name, experiments):
  experiment = experiments(name)  # of other types, the second step would be compiled again
  first = jax.eval_shape(experiment._init, experiment.objective.pretrained_shapes())[0]
  targets = (experiment.targets["state"], experiment.targets["frozen"], experiment.data.spec)
  later = jax.eval_shape(experiment.update, *targets)[0]

  def types(state):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), state)

  assert types(first) == types(later)


def test_a_save_that_was_not_completed_does_not_count(experiments, uninterrupted, tmp_path):
  experiment = experiments("mage")
  workdir = new_workdir(tmp_path, experiment)
  run(experiment, workdir, "saved", 8)
  # What a kill leaves in the middle of writing.
  half = workdir / "checkpoints" / "8.orbax-checkpoint-tmp-123"
  (workdir / "checkpoints" / "8").rename(half)
  shutil.rmtree(next(p for p in half.iterdir() if p.is_dir()))
  assert_same_run(experiment, workdir, run(experiment, workdir), uninterrupted("mage"))


def test_saving_by_the_minute_changes_nothing(experiments, uninterrupted, tmp_path, monkeypatch):
  experiment = experiments("mage")
  workdir = new_workdir(tmp_path, experiment)
  always = dataclasses.replace(
    experiment.config, checkpoint=Checkpointing(save_steps=100, save_minutes=0.0, keep=3)
  )
  monkeypatch.setattr(experiment, "config", always)
  run(experiment, workdir, "update", 5)
  assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["3"]
  monkeypatch.undo()
  state = newest(experiment, workdir)
  assert int(state.step) == 3
  assert_same_run(experiment, workdir, run(experiment, workdir), uninterrupted("mage"))


def test_a_run_of_several_stages_continues_in_its_second(trained, tmp_path, monkeypatch):
  root = tmp_path / "run"
  shutil.copytree(trained, root)
  shutil.rmtree(root / "mage")
  (root / "results.json").unlink()
  command = [f"--config={tiny.FILE}", f"--workdir={root}"]
  names = []

  def killed_train(experiment, workdir):
    names.append(workdir.name)
    run(experiment, workdir, "update", 5)
    raise Killed

  with monkeypatch.context() as patch:
    patch.setattr(train, "train", killed_train)
    with pytest.raises(Killed):
      main.main(command)
  assert names == ["mage"] and not (root / "mage" / "results.json").exists()
  main.main(command)
  for stage in tiny.STAGES:
    assert story(root / stage) == story(trained / stage)
    assert (root / stage / "results.json").read_text() == (trained / stage / "results.json").read_text()
  ours, theirs = (json.loads((p / "results.json").read_text()) for p in (root, trained))
  assert {k: v for k, v in ours.items() if k != "run"} == {k: v for k, v in theirs.items() if k != "run"}
  assert ours["run"]["resumed"] and "resumed" not in theirs["run"]
  main.main(command)  # trains nothing, and does not count
  assert json.loads((root / "results.json").read_text()) == ours


def train_alone(workdir, waits):
  """Trains both stages in this process, which then waits to be killed if it `waits`."""
  os.environ["XLA_FLAGS"] = tiny.XLA_FLAGS
  evaluations = ("tokenizer.evals.reconstruction", "mage.evals.validation")
  main.main(
    [
      f"--config={tiny.FILE}:steps=40,save_steps=15,log_every_steps=5",
      f"--workdir={workdir}",
      *(f"--config.{name}.every_steps=10" for name in evaluations),
    ]
  )
  while waits:
    signal.pause()


@pytest.mark.slow
def test_kill_9_at_any_moment(tmp_path):
  """Whole processes, killed at random moments in both stages."""
  whole = tiny.fork(train_alone, tmp_path / "whole", False)
  whole.join(900)
  assert whole.exitcode == 0
  killed = tmp_path / "killed"
  rng = random.Random(0)
  for name, first_step in (("tokenizer", 5), ("mage", 20)):
    process = tiny.fork(train_alone, killed, True)
    deadline = time.monotonic() + 900
    while max((line["step"] for line in metrics.read(epath.Path(killed / name))), default=0) < first_step:
      assert process.is_alive() and time.monotonic() < deadline
      time.sleep(0.02)
    time.sleep(0.3 * rng.random())
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
  last = tiny.fork(train_alone, killed, False)
  last.join(900)
  assert last.exitcode == 0
  for name in tiny.STAGES:
    ours, theirs = killed / name, tmp_path / "whole" / name
    assert story(ours) == story(theirs)
    assert (ours / "results.json").read_text() == (theirs / "results.json").read_text()
    tiny.assert_same_bits(everything(ours), everything(theirs))


def everything(workdir):
  """All arrays of the newest checkpoint."""
  manager = ocp.CheckpointManager(
    workdir / "checkpoints", item_handlers={"state": ocp.PyTreeCheckpointHandler()}
  )
  args = ocp.args.Composite(state=ocp.args.PyTreeRestore())
  return manager.restore(manager.latest_step(), args=args)["state"]


# Resuming another run


def test_resume_takes_over_another_runs_state(experiments, uninterrupted, tmp_path, monkeypatch):
  """A run continued from another workdir ends like a single run."""
  experiment = experiments("mage")
  first, second = new_workdir(tmp_path, experiment), epath.Path(tmp_path / "second")
  second.mkdir()
  run(experiment, first, "saved", 4)
  monkeypatch.setattr(experiment, "config", dataclasses.replace(experiment.config, resume=str(first)))
  # Also when it is killed before its own first save.
  assert run(experiment, second, "save", 4) is None
  assert run(experiment, second, "update", 6) is None
  results = run(experiment, second)
  whole, whole_results = uninterrupted("mage")
  tiny.assert_same_bits(newest(experiment, second), newest(experiment, whole))
  assert results == whole_results
  evaluated = [line for line in story(whole) if line["step"] == 4 and "validation/loss" in line]
  assert story(second) == evaluated + [line for line in story(whole) if line["step"] > 4]


def test_a_run_shorter_than_what_it_resumes_says_so(experiments, uninterrupted, tmp_path, monkeypatch):
  experiment = experiments("mage")
  monkeypatch.setattr(
    experiment, "config", dataclasses.replace(experiment.config, resume=str(uninterrupted("mage")[0]))
  )
  monkeypatch.setattr(experiment, "total_steps", 5)
  monkeypatch.setattr(experiment, "update", None)
  with pytest.raises(UserError, match="step 9"):
    train.train(experiment, new_workdir(tmp_path, experiment))


# Numbers that are not finite


@pytest.mark.parametrize(
  ("bad", "step", "newest_before"),
  [(np.nan, 1, None), (np.inf, 4, None), (-np.inf, 5, 4), (np.nan, 9, 8)],
)
def test_a_number_that_is_not_finite_stops_the_run(
  bad, step, newest_before, experiments, tmp_path, monkeypatch
):
  experiment = experiments("mage")
  workdir, compiled = new_workdir(tmp_path, experiment), experiment.update

  def update(state, frozen, batch):
    at = int(state.step) + 1
    state, values = compiled(state, frozen, batch)
    return state, values | ({"loss/main": np.float32(bad)} if at == step else {})

  monkeypatch.setattr(experiment, "update", update)
  with pytest.raises(UserError, match=rf"^step {step}: loss/main is {bad}; .*lower the learning rate"):
    train.train(experiment, workdir)
  # The state after such a step is never saved.
  assert storage.Checkpoints(workdir, Checkpointing()).latest() == newest_before
  assert all(np.isfinite(list(line.values())).all() for line in metrics.read(workdir))


def test_a_learning_rate_that_explodes_names_step_and_metric(trained, tmp_path):
  config = tiny.stage(
    "mage",
    pretrained__tokenizer=str(trained / "tokenizer"),
    optimizer__main__learning_rate="1e38",
  )
  experiment = Experiment(config)
  with pytest.raises(UserError, match=r"^step [2-4]: [a-z_/]+ is (nan|inf|-inf); the newest checkpoint"):
    train.train(experiment, new_workdir(tmp_path, experiment))


# What a workdir holds


def test_metrics_have_one_line_per_window_and_evaluation(uninterrupted):
  workdir, _ = uninterrupted("mage")
  lines = metrics.read(workdir)
  assert [line["step"] for line in lines] == [3, 4, 4, 6, 8, 8, 9, 9]
  for line in lines:
    if "input_wait" in line:
      assert {f"train/{key}" for key in ("loss/main", "learning_rate/main", "accuracy")} <= line.keys()
    else:
      assert "validation/loss" in line
  seconds = [line["timing/seconds"] for line in lines]
  assert seconds == sorted(seconds) and seconds[0] > 0


def test_metrics_are_means_over_the_window():
  window = metrics.Window()
  for steps, mean in (((1, 2, 3), 2.0), ((4,), 4.0), ((5, 8), 6.5)):
    for step in steps:
      window.add(step, {"loss/main": np.float32(step)}, np.arange(8))
    assert window.close()["train/loss/main"] == mean


def test_metrics_are_cut_back_to_where_a_run_continues(tmp_path):
  workdir = epath.Path(tmp_path)
  lines = [{"step": s, "a": s / 3, "timing/seconds": 10.0 * s} for s in (2, 4, 4, 6)]
  (workdir / "metrics.jsonl").write_text(
    "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "a'
  )
  assert metrics.read(workdir) == lines  # without the line that a kill cut off
  writer = metrics.Writer(workdir, 4)
  assert writer.seconds_before == 40.0
  writer.numbers(5, {"a": 0.1})
  writer.close()
  assert metrics.read(workdir) == [*lines[:3], {"step": 5, "a": 0.1}]


def test_a_run_from_the_start_forgets_what_was_there(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 3, "a": 1}\n')
  writer = metrics.Writer(epath.Path(tmp_path), 0)
  writer.close()
  assert metrics.read(epath.Path(tmp_path)) == [] and writer.seconds_before == 0.0


def test_results_are_numbers_by_evaluation_and_metric(trained):
  results = json.loads((trained / "results.json").read_text())
  assert set(results) == {*tiny.STAGES, "run"}
  assert set(results["run"]) == {"wall_seconds", "device", "version"}
  assert results["run"]["wall_seconds"] > 0 and results["run"]["device"].startswith("8 x ")
  for stage, evaluation in (("tokenizer", "reconstruction"), ("mage", "validation")):
    assert results[stage] == json.loads((trained / stage / "results.json").read_text())
    assert all(key.startswith(f"{evaluation}/") for key in results[stage])
    assert all(isinstance(value, float) for value in results[stage].values())
    last = metrics.read(epath.Path(trained / stage))[-1]
    assert results[stage] == {key: value for key, value in last.items() if evaluation in key}


def test_results_are_the_newest_of_evaluations_alone(tmp_path):
  lines = [
    {"step": 1, "train/loss": 1.0, "input_wait": 0.1},
    {"step": 1, "loss/loss": 2.0, "loss/accuracy": 3.0, "timing/seconds": 1.0},
    {"step": 2, "loss/loss": 4.0},
  ]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  results = train.final_results(epath.Path(tmp_path), ["loss"])
  assert results == {"loss/loss": 4.0, "loss/accuracy": 3.0}


def test_a_workdir_is_laid_out_as_documented(trained):
  names = {stage: {p.name.split(".")[0] for p in (trained / stage).iterdir()} for stage in tiny.STAGES}
  common = {"config", "data", "metrics", "events", "checkpoints", "samples", "receipts", "results"}
  assert names == {"tokenizer": common, "mage": common | {"frozen"}}
  assert {p.name for p in trained.iterdir()} == {
    *tiny.STAGES, "config.json", "results.json", "report.html", ".lock",
  }  # fmt: skip
  config = json.loads((trained / "mage" / "config.json").read_text())
  assert config_lib.without_origin(config) == tiny.stage("mage")
  assert config["version"] == maskgen.__version__
  assert config["command"].startswith("python -m maskgen.main --config=") and config["overridden"] == {}


def test_pictures_open_and_are_large_enough_to_see(trained):
  files = [p for stage in tiny.STAGES for p in (trained / stage / "samples").iterdir()]
  names = {p.name for p in files}
  assert {"reconstruction_reconstructions_0000004.png", "reconstruction_reconstructions_0000006.png"} <= names
  assert {f"samples_{kind}_0000006.png" for kind in ("generated", "reconstructions", "inpainted")} <= names
  for file in files:
    with Image.open(file) as picture:
      assert picture.mode == "RGB" and max(picture.size) >= 512
      assert len(np.unique(np.asarray(picture))) > 2


def test_tensorboard_gets_scalars_and_pictures(trained):
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  events = EventAccumulator(str(trained / "mage")).Reload()
  tags = events.Tags()
  assert {"train/loss/main", "validation/loss"} <= set(tags["tensors"] + tags["scalars"])
  assert any("samples/generated" in tag for tag in tags["tensors"] + tags["images"])


# Profiler


@pytest.mark.parametrize(
  ("window", "kill"),
  [
    (Profile(start_step=7, steps=100), None),  # longer than the run
    (Profile(start_step=2, steps=4), ("saved", 4)),  # killed inside
  ],
)
def test_the_profiler_records_its_window(window, kill, experiments, tmp_path, monkeypatch):
  experiment = experiments("mage")
  monkeypatch.setattr(experiment, "config", dataclasses.replace(experiment.config, profile=window))
  workdir = new_workdir(tmp_path, experiment)
  if kill:
    run(experiment, workdir, *kill)
    jax.profiler.stop_trace()  # which the end of a process does
    shutil.rmtree(workdir / "plugins")
  assert run(experiment, workdir) is not None
  traces = list(pathlib.Path(workdir).glob("plugins/profile/*/*.xplane.pb"))
  assert len(traces) == (0 if kill else 1)
  with pytest.raises(RuntimeError):
    jax.profiler.stop_trace()  # none is left running


# Modes


def test_finished_stages_are_not_trained_again(trained, tmp_path, monkeypatch):
  shutil.copytree(trained, tmp_path / "run")
  monkeypatch.setattr(train, "train", None)
  main.main([f"--config={tiny.FILE}", f"--workdir={tmp_path / 'run'}"])
  ours, theirs = (json.loads((p / "results.json").read_text()) for p in (tmp_path / "run", trained))
  assert {stage: ours[stage] for stage in tiny.STAGES} == {stage: theirs[stage] for stage in tiny.STAGES}


def test_check_trains_nothing_and_writes_nothing(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(train, "train", None)
  with caplog.at_level(logging.INFO, "maskgen"):
    main.main([f"--config={tiny.FILE}", f"--workdir={tmp_path / 'run'}", "--mode=check"])
  assert not list(tmp_path.iterdir())
  assert "check passed: nothing was trained" in caplog.text
  for stage in tiny.STAGES:
    assert f"{stage}: the step compiles" in caplog.text
    assert re.search(rf"{stage}: .* 6 steps of 8, 0\.\d\d epochs", caplog.text)
    assert re.search(rf"{stage}: about \S+ minutes for 6 steps here, by 2 steps of \S+ s, ", caplog.text)


def files_of(folder):
  return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_eval_evaluates_the_newest_checkpoint(trained, tmp_path, caplog):
  shutil.copytree(trained, tmp_path / "run")
  before = files_of(tmp_path / "run")
  with caplog.at_level(logging.INFO, "maskgen"):
    main.main([f"--config={tiny.FILE}", f"--workdir={tmp_path / 'run'}", "--mode=eval"])
  results = json.loads((trained / "results.json").read_text())
  for stage in tiny.STAGES:
    assert f"{stage} evaluation at step 6\n" in caplog.text
    for key, value in results[stage].items():
      assert [key, f"{value:.4g}"] in [line.split() for line in caplog.text.splitlines()]
  after = files_of(tmp_path / "run")
  assert {name: time for name, time in after.items() if name in before} == before
  new = set(after) - set(before)
  receipts = {f"{stage}/eval/receipts.json" for stage in tiny.STAGES}
  assert receipts < new and all("/samples/" in name and name.endswith("_eval.png") for name in new - receipts)


def test_operational_keys_may_change_on_the_way(trained, tmp_path):
  shutil.copytree(trained, tmp_path / "run")
  main.main(
    [
      f"--config={tiny.FILE}",
      f"--workdir={tmp_path / 'run'}",
      "--config.mage.log_every_steps=1",
      "--config.tokenizer.checkpoint.save_steps=7",
      "--config.mage.mesh.fsdp=2",
    ]
  )
  found = json.loads((tmp_path / "run" / "config.json").read_text())["overridden"]
  assert found.keys() == {"mage.log_every_steps", "tokenizer.checkpoint.save_steps", "mage.mesh.fsdp"}
  assert found["tokenizer.checkpoint.save_steps"][1] == 7 and found["mage.mesh.fsdp"] == [1, 2]


# What differs from another config in numbers or the optimizer alone; test_config.py builds all.
ALIKE = ("mage_base", "mage_large", "mage_c_large", "probe_mage", "fewshot_mage")
ALIKE += ("vilex_sd15", "vilex_sd21", "vilex_sdxl", "vilex_emoji")  # as vilex_digits
ALIKE += ("emoji",)  # as mage_text_cond
ALIKE += ("dmjd_base",)  # as mae_base, with targets that test_dmjd.py covers
ALIKE += ("mr_mae_base",)  # as mask_align_base
ALIKE += ("lmd_base", "selfie_base")  # as mae_base, with losses that test_lmd.py and test_selfie.py cover
ALIKE += ("umd_base",)  # as mae_base, with networks that test_step.py and test_umd.py cover
ALIKE += ("arena",)  # test_compare.py trains it
ALIKE += ("cropmae_small",)  # as mae_base, with a decoder that test_two_view.py covers


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
  """A folder of finished stages, by a hash of their config: most configs begin with those of another one."""
  return tiny.shared_folder(tmp_path_factory, "stages")


@pytest.mark.parametrize(
  "file",
  [pytest.param(file, marks=[pytest.mark.slow] * (file.stem in ALIKE)) for file in CONFIGS],
  ids=lambda file: file.stem,
)
def test_every_config_runs_with_debug(file, tmp_path, stages):
  root = tmp_path / "run"
  config = config_lib.to_dict(config_lib.load(f"{file}:debug"))
  sections = main.split_stages(config, root)
  kept = {}
  for workdir, section in sections.items():
    name = hashlib.sha256(json.dumps(section, sort_keys=True).encode()).hexdigest()
    if (stages / name).exists():
      shutil.copytree(stages / name, workdir)
    else:
      kept[stages / name] = workdir
  main.main([f"--config={file}:debug", f"--workdir={root}"])
  for place, workdir in kept.items():
    shutil.copytree(workdir, copy := place.with_suffix(f".{os.getpid()}"))
    try:
      copy.rename(place)
    except OSError:  # another worker has been faster
      assert place.exists()
      shutil.rmtree(copy)
  results = json.loads((root / "results.json").read_text())
  flat = results if "run" not in results else {k: v for s in results.values() for k, v in s.items()}
  assert flat and all(np.isfinite(v) for v in flat.values() if isinstance(v, float))


def test_progress_shows_losses_first_and_no_more_than_a_line():
  logged = {"input_wait": 0.1, "train/norm/main_update": 0.2, "train/accuracy": 0.25, "train/loss/main": 0.5}
  assert metrics.summary(logged) == "loss/main 0.5, accuracy 0.25"
  many = {f"train/metric_{i:02d}": float(i) for i in range(30)}
  assert 60 < len(metrics.summary(logged | many)) < 90


def test_progress_shows_no_speed_before_it_has_one(caplog):
  progress = metrics.Progress("mine", first_step=0, total_steps=3, batch_size=8, examples=64)
  with caplog.at_level(logging.INFO, "maskgen"):
    for step in (1, 2):
      progress.step()
      progress.report(step, {"train/loss/main": 0.5})
  first, second = caplog.messages
  assert first == "mine step 1/3, epoch 0.125 | loss/main 0.5"
  assert second.startswith("mine step 2/3, epoch 0.25 | loss/main 0.5 | ") and second.endswith(" left")
