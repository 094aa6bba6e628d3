"""Runs of one and two processes under the launcher, killed or stopped by a signal."""

import json
import pathlib
import subprocess

import faults
import pytest
import tiny

pytestmark = pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="finds processes in /proc")


@pytest.mark.slow
def test_killed_runs_end_like_undisturbed_runs(tmp_path):
  arguments = [
    f"--config={tiny.FILE}:steps=120,save_steps=10,log_every_steps=5",
    "--config.tokenizer.total_steps=4",
    "--config.mage.evals.validation.every_steps=60",
  ]
  script = str(pathlib.Path(faults.__file__))
  process = tiny.python(script, "--kills=6", f"--workdir={tmp_path}", *arguments)
  out, err = process.communicate()
  assert process.returncode == 0, out + err
  report = json.loads(out.splitlines()[-1])
  assert report["kills"] == 6 and report["while_saving"] >= 2
  assert report["saves_lost"] == 0 and report["same_end"]
  assert report["two_processes_differ"]["losses"] < 1e-2


@pytest.fixture
def start(tmp_path):
  """Starts a run of two processes; the second time it continues."""
  runs = []

  def start_run() -> faults.Run:
    arguments = [f"--config={tiny.FILE}:only=tokenizer,steps=100000,save_steps=90000,log_every_steps=5"]
    arguments += ["--config.evals.reconstruction.every_steps=90000"]
    runs.append(faults.Run(tmp_path / "run", "", 2, arguments))
    return runs[-1]

  yield start_run
  for run in runs:
    run.end()


def wait_for(run: faults.Run, *words: str) -> None:
  assert run.until(lambda: all(run.said(word, 0) for word in words)), run.log.read_text()[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("told, status", [("the launcher", 143), ("one process", 0)])
def test_all_processes_save_at_one_step_when_one_is_signalled(start, told, status):
  run = start()
  wait_for(run, "step 5/")
  if told == "the launcher":
    run.launcher.terminate()
  else:
    subprocess.run(["kill", "-TERM", str(max(run.processes()))], check=True)
  assert run.launcher.wait() == status, run.log.read_text()[-3000:]
  log = run.log.read_text()
  for index in (0, 1):
    assert any(line.startswith(f"{index}: ") and "preempted" in line for line in log.splitlines()), log
  assert "restarting all" not in log
  step = run.newest()
  assert step is not None and step >= 5 and not run.saving()
  again = start()
  wait_for(again, "0: ", "1: ", f"starts from step {step} of")
