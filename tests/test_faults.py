"""Runs of one and two processes, killed or stopped by a signal."""

import json
import pathlib
import signal
import subprocess
import time

import faults
import pytest
import tiny
import victims

ARGUMENTS = (
  f"--config={tiny.FILE}:only=tokenizer,steps=100000,save_steps=90000,log_every_steps=5",
  "--config.evals.reconstruction.every_steps=90000",
)


@pytest.mark.slow
def test_killed_runs_end_like_undisturbed_runs_and_a_killed_campaign_goes_on(tmp_path):
  command = [faults.__file__, "--processes", "1", "2", "--kills=3", f"--workdir={tmp_path}"]
  command += [
    f"--config={tiny.FILE}:steps=120,save_steps=10,log_every_steps=5",
    "--config.tokenizer.total_steps=4",
    "--config.mage.evals.validation.every_steps=60",
  ]
  process = tiny.python(*command)
  assert json.loads(process.stdout.readline())["met"]
  process.kill()
  process.communicate()
  process = tiny.python(*command)
  out, err = process.communicate()
  assert process.returncode == 0, out + err
  rows = faults.table([json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()])
  assert [row["kills"] for row in rows] == [3, 3] and not any(row["saves lost"] for row in rows)
  assert all(row["bit-equal"] == row["ends"] > 0 for row in rows)
  # Two processes write one receipt, which a single one with as many devices verifies.
  verify = ("-m", "maskgen.tools.verify", str(tmp_path / "whole2" / "mage"))
  process = tiny.python(*verify, env=victims.SETTINGS | {"JAX_NUM_CPU_DEVICES": "2"})
  out, err = process.communicate()
  assert process.returncode == 0, out + err
  assert out.endswith("are equal to 1e-06, with processes 2 instead of 1\n")


@pytest.fixture
def start(tmp_path):
  """Starts a run of two processes; the second time it continues."""
  runs = []

  def start_run() -> victims.Run:
    runs.append(victims.Run(tmp_path / "run", 2, ARGUMENTS))
    return runs[-1]

  yield start_run
  for run in runs:
    run.end()


def wait_for(run: victims.Run, *words: str) -> None:
  assert run.until(lambda: all(run.said(word) for word in words)), run.log.read_text()[-3000:]


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
  step = run.saved()[1]
  assert step >= 5 and not run.saves()
  if told == "one process":
    again = start()
    wait_for(again, "0: ", "1: ", f"starts from step {step} of")


# Two processes that share the state, without a launcher

PROCESS = """
from maskgen import cli, main, processes
processes.HEARTBEAT_SECONDS = 10
cli.run(main.main)
"""
SPLIT = (("(conv_0|conv_1)/kernel$", (None, None, None, "fsdp")), ("codebook$", (None, "fsdp")))


class Pair:
  """Two processes of a run that saves every five steps."""

  def __init__(self, folder: pathlib.Path):
    self.workdir = folder / "run"
    self.logs = [folder / f"{index}.log" for index in range(2)]
    command = ["-c", PROCESS, *ARGUMENTS, "--config.checkpoint.save_steps=5", f"--workdir={self.workdir}"]
    command += ["--config.mesh.fsdp=2", f"--config.sharding={SPLIT}"]
    command += [f"--coordinator=127.0.0.1:{tiny.free_port()}", "--process_count=2"]
    self.processes = []
    for index, log in enumerate(self.logs):
      with open(log, "w") as file:
        arguments = [*command, f"--process_index={index}"]
        self.processes.append(tiny.python(*arguments, env=victims.SETTINGS, stdout=file, stderr=file))

  def said(self, words: str) -> bool:
    return all(words in log.read_text() for log in self.logs)

  def saved(self) -> list[int]:
    return [int(path.name) for path in self.workdir.glob("checkpoints/*") if path.name.isdigit()]

  def saves(self) -> bool:
    return self.saved() != [] and any(self.workdir.glob("checkpoints/*orbax-checkpoint-tmp*"))

  def steps(self) -> bool:
    return " step " in self.logs[0].read_text().partition("compiling the training step")[2]


@pytest.mark.slow
def test_when_one_of_two_processes_is_killed_the_other_ends_and_both_continue(tmp_path):
  saved = 0
  # While saving, while training, and in a start, after the processes have met.
  for victim, moment in ((1, Pair.saves), (0, Pair.steps), (1, lambda pair: pair.said("checking"))):
    pair = Pair(tmp_path)
    while not moment(pair):
      assert all(process.poll() is None for process in pair.processes), pair.logs[0].read_text()[-3000:]
      time.sleep(0.005)
    pair.processes[victim].send_signal(signal.SIGKILL)
    status = pair.processes[1 - victim].wait(timeout=100)
    end = pair.logs[1 - victim].read_text()
    if status == 75:
      assert "Traceback" not in end and "error: another process of this run has ended (" in end, end[-3000:]
    else:  # JAX has noticed first
      assert status == -signal.SIGABRT and "another task died; see the other task logs" in end, end[-3000:]
    assert not saved or moment is not Pair.steps or f"starts from step {saved} of" in end
    saved = max(pair.saved())
