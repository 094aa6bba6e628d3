"""What tests/faults.py kills, and when: processes of runs, and writers of token caches."""

import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from etils import epath

from maskgen.training import metrics

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = "results.json"
SECONDS = 20.0  # at most, from a start to a kill at any moment
CACHE = pathlib.Path(tempfile.gettempdir()) / "maskgen_faults_compile_cache"
SETTINGS = {
  # Kills that follow each other quickly are no reason to give up or to wait.
  "RESET_SECONDS": "0",
  "GRACE_SECONDS": "1",
  "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
  "PYTHONPATH": str(ROOT),
  # Without the devices that the tests give a process. Much is compiled that runs shortly.
  "XLA_FLAGS": re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
  + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
  "JAX_NUM_CPU_DEVICES": "1",
  "JAX_COMPILATION_CACHE_DIR": str(CACHE),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def find_processes(*arguments: str) -> list[int]:
  """The ids of the processes whose command lines have all of these arguments."""
  found = []
  for process in pathlib.Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
      if set(arguments) <= set((process / "cmdline").read_text().split("\0")):
        found.append(int(process.name))
  return found


def start(command: Sequence[str], log: pathlib.Path, told: str) -> subprocess.Popen:
  """Starts a command that gets a signal when this process dies."""
  command = ["setpriv", f"--pdeathsig={told}", *command]
  with open(log, "ab") as file:
    return subprocess.Popen(
      command, cwd=ROOT, env=os.environ | SETTINGS, stdout=file, stderr=file, start_new_session=True
    )


class Life:
  """The time from one kill to the next: what it adds to a log, and which files are incomplete."""

  def __init__(self, log: pathlib.Path):
    self.log = log
    self.began, self.since = time.time(), log.stat().st_size if log.exists() else 0

  def words(self) -> bytes:
    """What the log has gained."""
    with open(self.log, "rb") as log:
      log.seek(self.since)
      return log.read()

  def writes(self, folder: pathlib.Path, pattern: str) -> bool:
    """Whether incomplete files of this life exist; those that an earlier kill left are older."""
    for path in folder.glob(pattern):
      with contextlib.suppress(FileNotFoundError):
        if path.stat().st_mtime >= self.began:
          return True
    return False


class Run:
  """A run under `launch/local.sh`, which restarts its processes without help."""

  def __init__(self, workdir: pathlib.Path, count: int, arguments: Sequence[str]):
    self.workdir, self.count = workdir, count
    self.log = workdir.with_suffix(".log")
    while find_processes(f"--workdir={workdir}"):  # an interrupted campaign's, which are saving
      time.sleep(0.1)
    self.begin_life()
    script = ["bash", str(ROOT / "launch/local.sh"), str(count), "--", f"--workdir={workdir}"]
    self.launcher = start([*script, *arguments], self.log, "TERM")

  def begin_life(self) -> None:
    """After a kill, forgets what was before."""
    self.life = Life(self.log)

  def ended(self) -> bool:
    """Whether the launcher has exited. It must not fail, since a manual step would then be needed."""
    status = self.launcher.poll()
    assert not status, f"the launcher ended with status {status}, see {self.log}"
    return status is not None

  def until(self, condition: Callable[[], bool], pause: float = 0.005) -> bool:
    """Waits for a condition; returns False if the run finishes before."""
    while not condition():
      if self.ended() or (self.workdir / RESULTS).exists():
        return False
      time.sleep(pause)
    return True

  def finish(self) -> None:
    """Waits until the launcher has exited."""
    while not self.ended():
      time.sleep(0.1)

  def said(self, words: str) -> bool:
    """Whether the log contains these words since the last kill."""
    return words.encode() in self.life.words()

  def processes(self) -> list[int]:
    """The ids of the training processes."""
    return find_processes("maskgen.main", f"--workdir={self.workdir}")

  def stages(self) -> list[pathlib.Path]:
    """The folders of all stages."""
    file = self.workdir / "config.json"
    config = json.loads(file.read_text()) if file.exists() else {}
    return [self.workdir / name for name in config.get("stages", ["."])]

  def saved(self) -> list[int]:
    """The index of the stage that is not finished, and the step of its newest complete checkpoint, or -1."""
    done = [(stage / RESULTS).exists() for stage in self.stages()]
    index = done.index(False) if False in done else len(done) - 1
    folder = self.stages()[index] / "checkpoints"
    steps = os.listdir(folder) if folder.exists() else []
    return [index, max((int(name) for name in steps if name.isdigit()), default=-1)]

  def stage(self) -> pathlib.Path:
    """The folder of the stage that is not finished."""
    return self.stages()[self.saved()[0]]

  def handed_over(self) -> bool:
    """Whether the last stage has saved."""
    return self.saved() > [len(self.stages()) - 1, -1]

  def origin(self) -> list[int] | None:
    """The position from which process 0 has continued, if it came to that."""
    found = re.search(rb"0: .* (\S+): starts from (?:step (\d+) of|fresh)", self.life.words())
    if not found:
      return None
    names = [stage.name for stage in self.stages()]
    return [names.index(found[1].decode()), int(found[2] or -1)]

  def saves(self) -> bool:
    """Whether a checkpoint is incomplete."""
    return self.life.writes(self.stage(), "checkpoints/*orbax-checkpoint-tmp*")

  def evaluates(self) -> bool:
    """Whether the newest line is of averages, and an evaluation is due at its step."""
    stage = self.stage()
    if not self.said(f" {stage.name}: starts from") or not (lines := metrics.read(epath.Path(stage))):
      return False
    config, step = json.loads((stage / "config.json").read_text()), lines[-1]["step"]
    due = step == config["total_steps"]
    due |= any(step % section["every_steps"] == 0 for section in config["evals"].values())
    return due and "input_wait" in lines[-1]

  def hands_over(self) -> bool:
    """Whether a stage has finished, and the next has not begun for the first time."""
    index, step = self.saved()
    if not index or step >= 0:
      return False
    before, stage = self.stages()[index - 1 : index + 1]
    return self.said(f" {before.name}: finished") and not self.said(f" {stage.name}: starts from")

  def freezes(self) -> bool:
    """Whether a file of frozen parts is incomplete."""
    return self.life.writes(self.stage(), "frozen/*.tmp") and self.hands_over()

  def end(self) -> None:
    """Stops processes that a failed check left running."""
    if self.launcher.poll() is None:
      self.launcher.send_signal(signal.SIGTERM)
      self.launcher.send_signal(signal.SIGTERM)  # does not wait
      self.launcher.wait()


# What a kill can meet: the first of these that holds, a shard of a token writer's, or any other moment.
SHARD, OTHER = "token shard", "other"
MOMENTS = {
  "frozen write": Run.freezes,
  "hand-over": Run.hands_over,
  "save": Run.saves,
  "evaluation": Run.evaluates,
}


def kill_once(run: Run, aim: str, chance: random.Random) -> str | None:
  """Kills one process at a moment; returns what that met, or None if the run finished before.

  Args:
    run: of whose processes one is killed.
    aim: a moment, or OTHER for any.
    chance: decides on everything else.
  """
  if not run.until(lambda: len(run.processes()) == run.count):
    return None
  first = run.saved()
  if aim == OTHER:
    moment = time.monotonic() + SECONDS * chance.random()
    waited = run.until(lambda: time.monotonic() > moment)
  elif aim in ("save", "evaluation"):
    later = chance.random() < 0.7  # mostly not the first save, or nothing moves
    waited = run.until(lambda: run.saved() != first or not later)
    waited = waited and run.until(lambda: MOMENTS[aim](run))
    time.sleep(0.05 * chance.random())
  else:
    waited = run.until(lambda: MOMENTS[aim](run) or run.handed_over(), pause=0.001)
  victims = run.processes()
  if not waited or len(victims) < run.count:  # it comes to its end
    return None
  os.kill(chance.choice(victims), signal.SIGKILL)
  if not run.until(lambda: run.said("restarting all processes")):
    return None
  # All have ended: what was not completed remains.
  return next((name for name, holds in MOMENTS.items() if holds(run)), OTHER)


class TokenWriter:
  """One of several processes that share the shards of a token cache."""

  def __init__(self, out: pathlib.Path, model: pathlib.Path, index: int, count: int):
    self.out, self.index, self.count = out, index, count
    command = [sys.executable, "-m", "maskgen.tools.tokenize", f"--model={model}", "--source=digits"]
    command += [f"--out={out}", "--crops=1", "--shard_records=32", "--preprocess=decode(3)|resize(16)"]
    log = out.with_name(f"{out.name}_{index}.log")
    while find_processes(f"--out={out}", f"--process_index={index}"):
      time.sleep(0.1)
    self.life = Life(log)
    self.process = start([*command, f"--process_index={index}", f"--process_count={count}"], log, "KILL")

  def ended(self) -> bool:
    """Whether it has exited, which must be without an error."""
    status = self.process.poll()
    assert not status, f"a token writer ended with status {status}, see {self.life.log}"
    return status is not None

  def complete(self) -> int:
    """The number of its complete shards."""
    shards = [int(path.stem[-5:]) for path in self.out.glob("codes_*.npy")]
    return sum(shard % self.count == self.index for shard in shards)

  def origin(self) -> list[int] | None:
    """The number of its shards that were complete at its start, if it came to that."""
    left = re.search(rb"in (\d+) shards; (\d+) of them left", self.life.words())
    return [0, len(range(self.index, int(left[1]), self.count)) - int(left[2])] if left else None

  def writes(self) -> bool:
    """Whether a file of one of its shards is incomplete."""
    shards = [path.name.split(".")[0][-5:] for path in self.out.glob("*_*.tmp")]
    mine = [shard for shard in shards if int(shard) % self.count == self.index]
    return any(self.life.writes(self.out, f"*_{shard}.*.tmp") for shard in mine)


def write_tokens(
  out: pathlib.Path, model: pathlib.Path, count: int, kills: int, seed: str
) -> Generator[dict[str, Any]]:
  """Writes a token cache with several processes, and kills one up to `kills` times, mostly in a shard.

  Each is started again by its own command. Yields what each kill met, as `Campaign` notes it.
  """
  writers = [TokenWriter(out, model, index, count) for index in range(count)]
  for number in range(kills):
    chance = random.Random(f"{seed} {number}")
    running = [index for index, writer in enumerate(writers) if not writer.ended()]
    if not running:
      break
    index = chance.choice(running)
    writer, enough = writers[index], writers[index].complete() + chance.randrange(4)
    while not writer.ended() and not (writer.complete() >= enough and writer.writes()):
      time.sleep(0.001)
    if not writer.ended():
      writer.process.kill()
      writer.process.wait()
      met = SHARD if writer.writes() else OTHER
      yield {"writer": index, "met": met, "origin": writer.origin(), "saved": [0, writer.complete()]}
      writers[index] = TokenWriter(out, model, index, count)
  for writer in writers:
    while not writer.ended():
      time.sleep(0.1)
