"""Trains for many steps and watches the memory and the open files of the process.

python tests/soak.py --workdir=/tmp/soak

It runs a tiny version of the quickstart's MAGE, with a save and a line of metrics every 500 steps and an
evaluation every 10,000. The last line is a report in JSON. The exit status is 0 if neither grows over the
last third by more than it scatters, and if `metrics.jsonl` and TensorBoard's files have every line.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import tensorflow as tf
from etils import epath

from maskgen.training import metrics

ROOT = pathlib.Path(__file__).parents[1]
EVERY = 500  # steps between saves, and between lines of metrics
SECONDS = 2.0  # between two looks at the process


def look(process: subprocess.Popen, stage: pathlib.Path) -> dict[str, float]:
  """The newest step of a run, and what its process holds."""
  folder = pathlib.Path("/proc") / str(process.pid)
  _, resident, files, *_ = map(int, (folder / "statm").read_text().split())
  steps = [line["step"] for line in metrics.read(epath.Path(stage))]
  return {
    "step": max(steps, default=0),
    # Without pages of files, which the kernel takes back and reads again as it likes.
    "megabytes": (resident - files) * os.sysconf("SC_PAGE_SIZE") / 1e6,
    "files": len(os.listdir(folder / "fd")),
    "threads": len(os.listdir(folder / "task")),
  }


def trend(steps: np.ndarray, values: np.ndarray) -> dict[str, float]:
  """A line through values: its growth from the first step to the last, and the scatter around it."""
  slope, start = np.polyfit(steps, values, 1)
  scatter = (values - slope * steps - start).std()
  return {"mean": values.mean(), "growth": slope * (steps[-1] - steps[0]), "scatter": scatter}


def logged(stage: pathlib.Path) -> dict[str, list[int]]:
  """The steps at which the training loss was logged: in `metrics.jsonl`, and for TensorBoard."""
  name = "train/loss/main"
  events = [
    event.step
    for file in stage.glob("events.*")
    for event in tf.compat.v1.train.summary_iterator(str(file))
    if any(value.tag == name for value in event.summary.value)
  ]
  lines = [line["step"] for line in metrics.read(epath.Path(stage)) if name in line]
  return {"metrics": lines, "tensorboard": events}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--workdir", required=True, type=pathlib.Path, help="an empty folder")
  parser.add_argument("--steps", type=int, default=100_000)
  args = parser.parse_args()
  began = time.monotonic()
  args.workdir.mkdir(parents=True, exist_ok=True)
  stage = args.workdir.absolute() / "run" / "mage"
  settings = {
    "total_steps": args.steps,
    "log_every_steps": EVERY,
    "checkpoint.save_steps": EVERY,
    "data.source": "digits",
    **{f"evals.{name}.every_steps": 10_000 for name in ("validation", "probe", "generation", "samples")},
  }
  command = [sys.executable, "-m", "maskgen.main", "--config=configs/quickstart.py:debug"]
  command += [
    f"--workdir={stage.parent}",
    *(f"--config.mage.{key}={value}" for key, value in settings.items()),
  ]
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
  found = []
  with (
    open(args.workdir / "log", "w") as log,
    open(args.workdir / "samples.jsonl", "w") as file,
    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log) as process,
  ):
    while process.poll() is None:
      found.append(look(process, stage))
      print(json.dumps(found[-1]), file=file, flush=True)
      time.sleep(SECONDS)
  assert process.returncode == 0, args.workdir / "log"
  # Until then the pools of allocators fill, and at its last step a run ends.
  late = [at for at in found if args.steps * 2 // 3 < at["step"] < args.steps]
  columns = {name: np.array([at[name] for at in late]) for name in found[0]}
  steps = columns.pop("step")
  trends = {name: trend(steps, values) for name, values in columns.items()}
  readable = all(at == list(range(EVERY, args.steps + 1, EVERY)) for at in logged(stage).values())
  flat = all(found["growth"] <= found["scatter"] for found in trends.values())
  report: dict = {
    name: {key: round(float(x), 2) for key, x in found.items()} for name, found in trends.items()
  }
  seconds = round(time.monotonic() - began)
  print(json.dumps(report | {"looks": len(found), "readable": readable, "flat": flat, "seconds": seconds}))
  sys.exit(not (readable and flat))


if __name__ == "__main__":
  main()
