"""Kills runs at random moments, half of them during a save, and compares the results with undisturbed runs.

python tests/faults.py --kills=50 --workdir=/tmp/faults --config=configs/quickstart.py --stage=mage \
  --config.mage.checkpoint.save_steps=100

Half of the kills hit runs of one process, half one of the two processes of a run. Only `launch/local.sh`
restarts them. A run that finishes before all kills are used starts over. Earlier stages are trained once and
copied. The last line is a report in JSON; the exit status is 0 on success.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from maskgen import config as config_lib
from maskgen import storage
from maskgen.main import parse_overrides
from maskgen.training import metrics

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = "results.json"
WALL_CLOCK = re.compile("timing/|input_wait")
SECONDS_OF_WORK = 15.0  # at most, from a start to the next kill
CACHE = pathlib.Path(tempfile.gettempdir()) / "maskgen_faults_compile_cache"
SETTINGS = {
  # Kills that follow each other quickly are no reason to give up or to wait.
  "RESET_SECONDS": "0",
  "GRACE_SECONDS": "1",
  "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
  "PYTHONPATH": str(ROOT),
  # The tests give a process many devices.
  "XLA_FLAGS": re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")),
  "JAX_COMPILATION_CACHE_DIR": str(CACHE),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


class Run:
  """A run under `launch/local.sh`, which restarts its processes without help."""

  def __init__(self, workdir: pathlib.Path, stage: str, count: int, arguments: list[str]):
    self.stage, self.count = workdir / stage, count
    self.log = workdir.with_suffix(".log")
    command = ["bash", str(ROOT / "launch/local.sh"), str(count), "--", f"--workdir={workdir}", *arguments]
    with open(self.log, "w") as log:
      self.launcher = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | SETTINGS, stdout=log, stderr=log, start_new_session=True
      )

  def ended(self) -> bool:
    """Whether the launcher has exited. It must not fail, since a manual step would then be needed."""
    status = self.launcher.poll()
    assert not status, f"the launcher ended with status {status}, see {self.log}"
    return status is not None

  def until(self, condition: Callable[[], bool]) -> bool:
    """Waits for a condition; returns False if the stage finishes before."""
    while not condition():
      if self.ended() or (self.stage / RESULTS).exists():
        return False
      time.sleep(0.005)
    return True

  def said(self, words: str, since: int) -> bool:
    """Whether the log contains these words after a position."""
    with open(self.log, "rb") as log:
      log.seek(since)
      return words.encode() in log.read()

  def processes(self) -> list[int]:
    """The ids of the training processes."""
    found = []
    for process in pathlib.Path("/proc").glob("[0-9]*"):
      with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        if parent == self.launcher.pid and b"maskgen.main" in (process / "cmdline").read_bytes():
          found.append(int(process.name))
    return found

  def checkpoints(self) -> list[str]:
    folder = self.stage / "checkpoints"
    return os.listdir(folder) if folder.exists() else []

  def saving(self) -> bool:
    """Whether an incomplete checkpoint exists."""
    return any("orbax-checkpoint-tmp" in name for name in self.checkpoints())

  def newest(self) -> int | None:
    """The step of the newest complete checkpoint."""
    return max((int(name) for name in self.checkpoints() if name.isdigit()), default=None)

  def end(self) -> None:
    """Stops processes that a failed check left running."""
    if self.launcher.poll() is None:
      self.launcher.send_signal(signal.SIGTERM)
      self.launcher.send_signal(signal.SIGTERM)  # does not wait
      self.launcher.wait()


def kill_once(run: Run, since: int, chance: random.Random, *, while_saving: bool) -> bool:
  """Waits for a random moment and kills one process; returns False if the stage finished before."""
  if not run.until(lambda: len(run.processes()) == run.count):
    return False
  if while_saving:
    first, later = run.newest(), chance.random() < 0.7  # mostly not the first save, or nothing moves
    if not run.until(lambda: run.newest() != first or not later) or not run.until(run.saving):
      return False
    time.sleep(0.1 * chance.random())
  else:
    if chance.random() < 0.7 and not run.until(lambda: run.said("starts from", since)):
      return False
    moment = time.monotonic() + SECONDS_OF_WORK * chance.random()
    if not run.until(lambda: time.monotonic() > moment):
      return False
  victims = run.processes()
  if len(victims) < run.count:  # it comes to its end
    return False
  os.kill(chance.choice(victims), signal.SIGKILL)
  return run.until(lambda: run.said("restarting all processes", since))


def disturb(run: Run, kills: int, chance: random.Random) -> dict[str, int]:
  """Kills a run up to `kills` times and lets it finish; returns statistics."""
  met, saved = 0, [(0, run.newest())]
  try:
    while len(saved) <= kills and kill_once(run, saved[-1][0], chance, while_saving=2 * met < len(saved)):
      met += run.saving()  # all have ended: what was not completed remains
      saved.append((run.log.stat().st_size, run.newest()))
    while not run.ended():
      time.sleep(0.1)
  finally:
    run.end()
  log = run.log.read_bytes()
  assert b"is damaged" not in log, run.log
  lost = 0
  for (begin, step), (end, _) in zip(saved, [*saved[1:], (len(log), None)], strict=True):
    pattern = rb"0: .* starts from (?:step (\d+) of %s|fresh)" % re.escape(bytes(run.stage))
    if found := re.search(pattern, log[begin:end]):
      origin = int(found[1]) if found[1] else None
      lost += origin != step
      print(f"  {step} was saved: continued from {origin}", flush=True)
  return {"kills": len(saved) - 1, "while_saving": met, "saves_lost": lost}


def arrays(stage: pathlib.Path) -> dict[str, np.ndarray]:
  """All arrays of the newest checkpoint."""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with contextlib.closing(storage.open_to_read(epath.Path(stage))) as checkpoints:
    found = checkpoints.read(
      lambda stored: {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here) for name, leaf in stored.items()
      }
    )
  return {name: np.asarray(value) for name, value in found.items()}


def lines(stage: pathlib.Path) -> list[dict[str, float]]:
  """The lines of `metrics.jsonl` without timings."""
  return [
    {name: value for name, value in line.items() if not WALL_CLOCK.match(name)}
    for line in metrics.read(epath.Path(stage))
  ]


def same_end(a: pathlib.Path, b: pathlib.Path) -> bool:
  """Whether two stages ended with the same bits."""
  left, right = arrays(a), arrays(b)
  same = left.keys() == right.keys() and lines(a) == lines(b)
  same &= (a / RESULTS).read_text() == (b / RESULTS).read_text()
  return same and all(left[name].tobytes() == right[name].tobytes() for name in left)


def differences(a: pathlib.Path, b: pathlib.Path) -> dict[str, float]:
  """The largest differences between the results of two stages, relative for losses and metrics."""
  left, right = arrays(a), arrays(b)
  params = [np.abs(left[name] - right[name]).max() for name in left if name.startswith("params/")]
  losses = [
    abs(line[name] / other[name] - 1)
    for line, other in zip(lines(a), lines(b), strict=True)
    for name in line
    if name.startswith("train/loss/")
  ]
  before, after = (json.loads((stage / RESULTS).read_text()) for stage in (a, b))
  results = [abs(after[name] - before[name]) / max(abs(before[name]), 1e-6) for name in before]
  numbers = {"parameters": max(params), "losses": max(losses), "results": max(results, default=0.0)}
  return {name: float(value) for name, value in numbers.items()}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--workdir", required=True, type=pathlib.Path, help="an empty folder")
  parser.add_argument("--config", default="configs/quickstart.py")
  parser.add_argument("--stage", help="whose run is killed; the last one, if not given")
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--seed", type=int, default=0)
  args, rest = parser.parse_known_args()
  began, chance = time.monotonic(), random.Random(args.seed)
  config = config_lib.to_dict(config_lib.load(args.config, parse_overrides(rest)))
  stages = list(config.get("stages", []))
  stage = args.stage or (stages[-1] if stages else "")
  before = stages[: stages.index(stage)] if stages else []
  args.workdir.mkdir(parents=True, exist_ok=True)

  def start(name: str, count: int) -> Run:
    workdir = args.workdir.absolute() / name
    for other in before if name != "whole1" else []:
      shutil.copytree(args.workdir / "whole1" / other, workdir / other)
    return Run(workdir, stage, count, [f"--config={args.config}", *rest])

  report: dict = {"kills": 0, "while_saving": 0, "saves_lost": 0, "same_end": True}
  for count, kills in ((1, args.kills - args.kills // 2), (2, args.kills // 2)):
    print(f"{count} in peace", flush=True)
    whole = start(f"whole{count}", count)
    disturb(whole, 0, chance)
    left, rounds = kills, 0
    while left:
      rounds += 1
      print(f"{count}, round {rounds}", flush=True)
      run = start(f"killed{count}_{rounds}", count)
      happened = disturb(run, left, chance)
      left -= happened["kills"]
      for name, value in happened.items():
        report[name] += value
      report["same_end"] &= same_end(whole.stage, run.stage)
      print(json.dumps(report), flush=True)
  first, second = args.workdir / "whole1" / stage, args.workdir / "whole2" / stage
  report |= {"two_processes_differ": differences(first, second), "seconds": round(time.monotonic() - began)}
  print(json.dumps(report))
  well = report["same_end"] and not report["saves_lost"] and report["kills"] == args.kills
  sys.exit(0 if well else 1)


if __name__ == "__main__":
  main()
