"""Kills a small run at chosen and at random moments, and compares its end with that of undisturbed runs.

python tests/faults.py --workdir=/tmp/faults

Half of the kills (`kill -9`) hit a save, an evaluation, the hand-over from one stage to the next, the writing
of frozen parts or a shard of a token cache, and the others any moment. They are divided among runs of one,
two and four processes, which only `launch/local.sh` restarts. A run that finishes before all kills are used
is compared with an undisturbed one, and the next begins.

The campaign notes each kill in `record.jsonl` and goes on from there when it is itself killed and started
again. At its end it prints a table; the exit status is 0 if nothing was lost and every end has the same bits.
"""

import argparse
import contextlib
import json
import pathlib
import random
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from victims import MOMENTS, OTHER, RESULTS, SHARD, Run, kill_once, write_tokens

from maskgen import files, storage
from maskgen.training import metrics

WALL_CLOCK = re.compile("timing/|input_wait")
SMALL = (
  "--config=configs/quickstart.py:debug",
  *(
    f"--config.{stage}.objective.tokenizer.{key}"
    for stage in ("tokenizer", "mage")
    for key in ("multipliers=(1, 1)", "strides=(4,)")
  ),
  "--config.tokenizer.total_steps=20",
  "--config.tokenizer.log_every_steps=5",
  "--config.tokenizer.checkpoint.save_steps=5",
  "--config.mage.total_steps=400",
  "--config.mage.log_every_steps=10",
  "--config.mage.checkpoint.save_steps=10",
  "--config.mage.evals.validation.every_steps=40",
)

# Comparing ends


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


def same_stage(a: pathlib.Path, b: pathlib.Path) -> bool:
  """Whether two stages ended with the same bits."""
  left, right = arrays(a), arrays(b)
  same = left.keys() == right.keys() and lines(a) == lines(b)
  for file in (RESULTS, "frozen/weights.safetensors"):
    same &= not (a / file).exists() or (a / file).read_bytes() == (b / file).read_bytes()
  return same and all(left[name].tobytes() == right[name].tobytes() for name in left)


def same_tokens(a: pathlib.Path, b: pathlib.Path) -> bool:
  """Whether two token caches have the same bits."""
  left, right = ({p.name: p.read_bytes() for p in out.iterdir() if p.suffix != ".tmp"} for out in (a, b))
  return left == right


# The campaign


class Campaign:
  """Kills, and the record of them, from which it goes on."""

  def __init__(self, workdir: pathlib.Path, seed: int, arguments: Sequence[str]):
    workdir.mkdir(parents=True, exist_ok=True)
    self.workdir, self._seed, self._arguments = workdir.absolute(), seed, arguments
    self._file = epath.Path(workdir / "record.jsonl")
    self.record: list[dict[str, Any]] = []
    if self._file.exists():
      self.record = files.read_json_lines(self._file, {"run": str}, "give an empty --workdir")

  def _note(self, **line: Any) -> None:
    self.record.append(line)
    files.replace(self._file, "".join(json.dumps(line) + "\n" for line in self.record))
    print(json.dumps(line), flush=True)

  def _kills(self, count: int, kind: str) -> list[dict[str, Any]]:
    """The kills that are noted for a number of processes, and a kind of run."""
    return [at for at in self.record if "met" in at and (at["processes"], at["kind"]) == (count, kind)]

  def _known(self, count: int, kind: str) -> dict[str, Any]:
    """What every line on the run that goes on says, or on a new one if the last has ended."""
    ended = sum("same" in at and (at["processes"], at["kind"]) == (count, kind) for at in self.record)
    return {"run": f"{kind}{count}_{ended}", "processes": count, "kind": kind}

  def _undisturbed(self, count: int) -> pathlib.Path:
    """A run without kills, whose folder has this name once it has ended."""
    whole = self.workdir / f"whole{count}"
    if not whole.exists():
      run = Run(self.workdir / f"begun{count}_{time.time_ns()}", count, self._arguments)
      run.finish()
      run.workdir.rename(whole)
    return whole

  def train(self, count: int, kills: int) -> None:
    """Kills runs of `count` processes until `kills` kills are noted."""
    whole = self._undisturbed(count)
    while len(self._kills(count, "run")) < kills:
      known = self._known(count, "run")
      run = Run(self.workdir / known["run"], count, self._arguments)
      try:
        while len(done := self._kills(count, "run")) < kills:
          chance = random.Random(f"{self._seed} {count} {len(done)}")
          possible = ["save", "evaluation"] if run.handed_over() else list(MOMENTS)
          aim = OTHER if 2 * sum(at["met"] != OTHER for at in done) > len(done) else chance.choice(possible)
          if (met := kill_once(run, aim, chance)) is None:
            break
          self._note(**known, aim=aim, met=met, origin=run.origin(), saved=run.saved())
          run.begin_life()
        run.finish()
      finally:
        run.end()
      assert b"is damaged" not in run.log.read_bytes(), run.log
      same = all(same_stage(whole / stage.name, stage) for stage in run.stages())
      self._note(**known, same=same)

  def tokenize(self, count: int, kills: int) -> None:
    """Kills writers of token caches until `kills` kills are noted."""
    model, whole = self._undisturbed(1) / "tokenizer", self.workdir / "tokens"
    if not whole.exists():
      begun = self.workdir / f"tokens_{time.time_ns()}"
      list(write_tokens(begun, model, 1, 0, ""))
      begun.rename(whole)
    while (done := len(self._kills(count, "tokens"))) < kills:
      known = self._known(count, "tokens")
      out = self.workdir / known["run"]
      for kill in write_tokens(out, model, count, kills - done, f"{self._seed} {count} {done}"):
        self._note(**known, **kill)
      self._note(**known, same=same_tokens(whole, out))


def count_lost(record: Sequence[dict[str, Any]]) -> int:
  """How often a process continued from less than what was complete when it was killed."""
  saved: dict[Any, list[int]] = {}
  lost = 0
  for at in record:
    if "met" in at:
      who = at["run"], at.get("writer")
      lost += at["origin"] is not None and at["origin"] < saved.get(who, [0, -1])
      saved[who] = at["saved"]
  return lost


def table(record: Sequence[dict[str, Any]]) -> list[dict[str, int]]:
  """What happened, for each number of processes."""
  rows = []
  for count in sorted({at["processes"] for at in record}):
    own = [at for at in record if at["processes"] == count]
    met = [at["met"] for at in own if "met" in at]
    ends = [at["same"] for at in own if "same" in at]
    row = {"processes": count, "kills": len(met)}
    row |= {name: met.count(name) for name in (*MOMENTS, SHARD, OTHER)}
    rows.append(row | {"saves lost": count_lost(own), "ends": len(ends), "bit-equal": sum(ends)})
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--workdir", required=True, type=pathlib.Path, help="an empty folder, or a campaign's")
  parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="of the runs")
  parser.add_argument("--kills", type=int, default=100, help="for each number of processes")
  parser.add_argument("--seed", type=int, default=0)
  args, rest = parser.parse_known_args()
  campaign = Campaign(args.workdir, args.seed, rest or SMALL)
  shards = -(-args.kills // 8)
  for count in args.processes:
    campaign.train(count, args.kills - shards)
    campaign.tokenize(count, shards)
  rows = table(campaign.record)
  for cells in (rows[0].keys(), *(row.values() for row in rows)):
    print(f"| {' | '.join(map(str, cells))} |")
  sys.exit(any(row["saves lost"] or row["ends"] != row["bit-equal"] for row in rows))


if __name__ == "__main__":
  main()
