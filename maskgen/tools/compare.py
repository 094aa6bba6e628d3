"""Compares objectives at equal compute: python -m maskgen.tools.compare --objectives=mage,mae ..."""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from maskgen import cli, files
from maskgen import config as config_lib
from maskgen import main as main_lib
from maskgen.errors import UserError, counted
from maskgen.training import cpu, lock
from maskgen.training.pretrained import complete
from maskgen.training.sections import find_type

PLAN, RESULTS = "plan.json", "results.json"
TOKENIZER = "tokenizer"
# With as many, whole steps are the budget to 2%, and an evaluation is at a tenth of them.
LEAST_STEPS = 25
RATES = (1.0, 0.5, 2.0, 0.25, 4.0)  # multiples of the learning rate, one for each trial
TRIAL_SHARE = 0.25
_SECONDS = {"s": 1, "min": 60, "h": 3600}
_TIMED = 10  # steps, with which a budget of time becomes one of operations
log = logging.getLogger("maskgen")


@dataclasses.dataclass(frozen=True)
class Entry:
  """An objective of a comparison.

  Attributes:
    flops: the operations of a training step.
    steps: of a run.
    reads: what the losses read beside pictures: "labels", "captions" or "".
    on_codes: whether it trains on what the tokenizer computes.
    distance: the metric by which its samples are compared with real pictures, or "".
  """

  flops: int
  steps: int
  reads: str
  on_codes: bool
  distance: str


def main(argv: Sequence[str]) -> None:
  """Parses the command line, trains what is missing, and writes the table.

  Raises:
    UserError: if an input is wrong, before any training.
  """
  parser = cli.Parser(
    "Trains objectives with the same data, tokenizer, evaluations and number of floating-point operations, "
    "and writes a table, a picture and a page. An interrupted comparison continues with the same command; in "
    "several processes, the same command shares the runs among them. Any key of all runs can be set with "
    "--config.KEY=VALUE.",
    "python -m maskgen.tools.compare --objectives=mage,mae,my_package.my_objective --budget=10min --seeds=3 "
    "--data=folder:/data/cifar10 --out=runs/arena",
  )
  parser.add_argument("--objectives", required=True, help="rows of --config or modules, separated by commas")
  parser.add_argument("--data", required=True, help="data source with classes, such as digits or folder:PATH")
  parser.add_argument(
    "--budget",
    required=True,
    help="of each run: a number of FLOPs, or a time such as 10min, which the first objective takes here",
  )
  parser.add_argument("--seeds", type=int, default=1, help="runs of each objective")
  parser.add_argument(
    "--trials",
    type=int,
    default=0,
    help=f"learning rates to try for each objective at {TRIAL_SHARE:g} of the budget, at most {len(RATES)}",
  )
  parser.add_argument(
    "--tokenizer", help="a trained tokenizer; by default one is trained with the same budget"
  )
  parser.add_argument("--config", default="configs/arena.py", help="config file, FILE[:key=value,...]")
  parser.add_argument("--out", required=True, help="folder to write, or to continue")
  args, rest = parser.parse_known_args(argv)
  if args.seeds < 1 or not 0 <= args.trials <= len(RATES):
    raise UserError(
      f"--seeds={args.seeds} --trials={args.trials}: give at least 1 seed and 0 to {len(RATES)} trials"
    )
  names = args.objectives.split(",")
  if len(set(names)) < len(names) or not all(names):
    raise UserError(f"--objectives={args.objectives}: give different names, separated by commas")
  read_budget(args.budget)
  cli.check_out_folder(args.out)
  compare = Comparison(args, names, main_lib.parse_overrides(rest))
  compare.make_plan()
  compare.run()


def read_budget(text: str) -> tuple[float, bool]:
  """A budget in seconds or FLOPs, and whether it is a time.

  Raises:
    UserError: if it is neither.
  """
  found = re.fullmatch(r"([0-9.]+(?:e\+?[0-9]+)?)(s|min|h|)", text)
  try:
    value = float(found[1]) if found else 0.0
  except ValueError:
    value = 0.0
  if not found or value <= 0:
    raise UserError(f"--budget={text}: give FLOPs such as 2e14, or a time such as 30s, 10min or 1h")
  return value * _SECONDS.get(found[2], 1), bool(found[2])


class Comparison:
  """The runs of a comparison, in folders of `--out`: `tokenizer`, `OBJECTIVE/seed_S`, `OBJECTIVE/trial_T`.

  Attributes:
    out: the folder.
    plan: what PLAN says, once it is made.
    entries: the objectives of the plan, and the tokenizer if it is trained here.
  """

  def __init__(self, args: argparse.Namespace, names: Sequence[str], overrides: Mapping[str, str]):
    self.out = epath.Path(args.out)
    self.plan: dict[str, Any] = {}
    self.entries: dict[str, Entry] = {}
    self._args, self._names, self._overrides = args, names, overrides
    # The configs of runs name it, and stay the same once it exists.
    out = args.out if "://" in args.out else os.path.abspath(args.out)
    given = files.absolute(args.tokenizer) if args.tokenizer else ""
    self._tokenizer = epath.Path(given or epath.Path(out) / TOKENIZER)

  def make_plan(self) -> None:
    """Checks everything, counts the operations of each objective, and writes PLAN.

    If another process writes it first, that plan holds, and what it lacks is added.

    Raises:
      UserError: if an objective does not fit the data, the budget is too small, or the folder has another
        comparison.
    """
    while True:
      before = self._read_plan()
      self._extend(before)
      if self.plan == before:
        return
      self.out.mkdir(parents=True, exist_ok=True)
      try:
        with lock.hold(self.out):
          if self._read_plan() == before:
            files.replace(self.out / PLAN, json.dumps(self.plan, indent=2))
            return
      except lock.TakenError:
        time.sleep(1.0)
      log.info("another process writes %s: reading it again", self.out / PLAN)

  def _extend(self, before: Mapping[str, Any]) -> None:
    """Makes the plan from the one that is stored, or from an empty one."""
    args = self._args
    fixed = {key: getattr(args, key) for key in ("data", "budget", "trials", "config")}
    # A folder that is moved keeps its own tokenizer.
    fixed |= {"tokenizer": str(self._tokenizer) if args.tokenizer else TOKENIZER}
    fixed |= {"overrides": dict(self._overrides)}
    for key, value in fixed.items():
      if before.get(key, value) != value:
        raise UserError(f"{self.out} compares with {key} {before[key]}, not {value}: give another --out")
    self.plan = {**before, **fixed}
    self.entries = {name: Entry(**entry) for name, entry in before.get("entries", {}).items()}
    configs = {name: self._configure(name) for name in self._names if name not in self.entries}
    if not args.tokenizer and TOKENIZER not in self.entries and any(map(self._on_codes, configs.values())):
      configs[TOKENIZER] = self._configure(TOKENIZER)
    cpu.use_cores(configs.values())

    from maskgen import compile_cache

    compile_cache.use()
    for name, config in configs.items():
      log.info("checking %s", name)
      try:
        self.entries[name] = self._enter(name, config)
      except UserError as error:
        error.args = (f"{name}: {error}",)
        raise
    self.plan["entries"] = {name: dataclasses.asdict(entry) for name, entry in self.entries.items()}
    self.plan["floors"] = self._choose_floors(before.get("floors", []))

  def _choose_floors(self, chosen: list[str]) -> list[str]:
    """The objectives whose first run measures floors: those of before, and one on codes if there is any."""
    # What sees the tokenizer's latents generates nothing, and has no codes to measure.
    on_codes = [name for name, entry in self.entries.items() if entry.on_codes and entry.distance]
    if set(chosen) & set(on_codes):
      return chosen
    return chosen + on_codes[:1] or [self._names[0]]

  def _read_plan(self) -> dict[str, Any]:
    path = self.out / PLAN
    found: dict[str, Any] = (
      files.read_json(path, "restore it, or give another --out") if path.exists() else {}
    )
    return found

  def _enter(self, name: str, config: Mapping[str, Any]) -> Entry:
    """Checks one objective and counts its operations, those of a teacher and of the tokenizer included."""
    from maskgen.benchmarks.model_flops import model_flops
    from maskgen.training.experiment import Experiment

    experiment = Experiment(config)
    experiment.check_pretrained(self.out / name, pending=() if self._args.tokenizer else [self._tokenizer])
    flops = model_flops(experiment, experiment.data.spec)
    if "flops" not in self.plan:
      self.plan |= self._measure_budget(name, experiment, flops)
    steps = round(self.plan["flops"] / flops)
    share = TRIAL_SHARE if self._args.trials else 1.0
    if steps * share < LEAST_STEPS:
      raise UserError(
        f"--budget={self._args.budget} is {counted(int(steps * share), 'step')} of a run, too few to "
        f"evaluate at a tenth of them: give at least {LEAST_STEPS / share * flops:.1e} FLOPs"
      )
    spec, generation = experiment.objective.batch_spec(), experiment.evaluators.get("generation")
    return Entry(
      flops=flops,
      steps=steps,
      reads="labels" if spec.num_classes else "captions" if spec.captions else "",
      on_codes=self._on_codes(config),
      distance=f"generation/{getattr(generation[1], 'distance', '')}" if generation else "",
    )

  def _on_codes(self, config: Mapping[str, Any]) -> bool:
    return str(self._tokenizer) in config.get("pretrained", {}).values()

  def _measure_budget(self, name: str, experiment: Any, flops: int) -> dict[str, Any]:
    """The budget in operations, and if it is a time, how it became that."""
    value, is_time = read_budget(self._args.budget)
    if not is_time:
      return {"flops": value}
    import jax

    from maskgen.training import forecast

    log.info("measuring %s, which turns %s into operations", name, self._args.budget)
    with contextlib.closing(experiment.train_batches(0)) as batches:
      seconds = forecast.seconds_per_step(experiment, experiment.compile(), batches, _TIMED)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    timed = {"objective": name, "seconds_per_step": seconds, "device": device}
    return {"flops": value / seconds * flops, "timed": timed}

  def run(self) -> None:
    """Trains what is missing and free, then writes the table of what is finished."""
    import jax

    from maskgen.report import comparison

    left = []
    for workdir, flags in self._runs():
      if flags is None or _is_active(workdir):
        left.append(workdir)
        continue
      self._rename_tokenizer(workdir, flags)
      try:
        main_lib.main(flags)
      except lock.TakenError:  # meanwhile
        left.append(workdir)
      else:
        if not _is_finished(workdir):
          return  # preempted
      jax.clear_caches()
    if left:
      log.info("%s left to other processes: repeat the command when these end", counted(len(left), "run"))
    comparison.write(self.out, self.plan)

  def _rename_tokenizer(self, workdir: epath.Path, flags: Sequence[str]) -> None:
    """Lets a run continue that began before the folder was moved, with its tokenizer."""
    file = workdir / "config.json"
    if TOKENIZER not in self.entries or not file.exists():
      return
    config, now = files.read_json(file, "restore it from a copy"), self._load(flags)["pretrained"]
    moved = {key: path for key, path in now.items() if path == str(self._tokenizer)}
    before = config.get("pretrained", {})
    if {**before, **moved} != before:
      files.replace(file, json.dumps({**config, "pretrained": {**before, **moved}}, indent=2))

  def _runs(self) -> Iterator[tuple[epath.Path, list[str] | None]]:
    """Workdirs of unfinished runs with the flags of `maskgen.main`, or None if they need one of these."""
    names = [name for name in self._names if name in self.entries]
    if TOKENIZER in self.entries and not _is_finished(self._tokenizer):
      yield self._tokenizer, self._flags(TOKENIZER, self._tokenizer)
    for name in names:
      for trial in range(self._args.trials):
        steps = round(TRIAL_SHARE * self.entries[name].steps)
        yield from self._run(name, f"trial_{trial}", dict(rate=RATES[trial], steps=steps))
    for seed in range(self._args.seeds):
      for name in names:
        given: dict[str, Any] = dict(seed=seed, rate=self._rate(name))
        if seed == 0 and name in self.plan["floors"]:
          given["floors"] = True
        yield from self._run(name, f"seed_{seed}", given)

  def _run(
    self, name: str, run: str, given: Mapping[str, Any]
  ) -> Iterator[tuple[epath.Path, list[str] | None]]:
    workdir = self.out / name / run
    if not _is_finished(workdir):
      waits = self.entries[name].on_codes and TOKENIZER in self.entries and not _is_finished(self._tokenizer)
      yield workdir, None if waits or given["rate"] is None else self._flags(name, workdir, **given)

  def _rate(self, name: str) -> float | None:
    """The learning rate's multiple that was best in trials; None while these are not finished."""
    trials = [self.out / name / f"trial_{trial}" for trial in range(self._args.trials)]
    if not all(map(_is_finished, trials)):
      return None
    from maskgen.report.comparison import PROBE

    results = [files.read_json(trial / RESULTS, "delete it") for trial in trials]
    distance = self.entries[name].distance
    scores = [found.get(PROBE, -found.get(distance, 0.0)) for found in results]
    return RATES[scores.index(max(scores))] if scores else 1.0

  def _configure(self, name: str) -> dict[str, Any]:
    return complete(self._load(self._flags(name, self.out / name)))

  def _load(self, flags: Sequence[str]) -> dict[str, Any]:
    path = flags[0].removeprefix("--config=")
    return config_lib.to_dict(config_lib.load(path, self._overrides, find_type))

  def _flags(self, name: str, workdir: epath.Path, **given: Any) -> list[str]:
    """The flags of `maskgen.main`."""
    path, arg = config_lib.split_path(self._args.config)
    steps = self.entries[name].steps if name in self.entries else LEAST_STEPS
    arguments = dict(objective=name, source=self._args.data, tokenizer=self._tokenizer, steps=steps) | given
    quoted = [
      f"{key}='{value}'" if "," in str(value) else f"{key}={value}" for key, value in arguments.items()
    ]
    config = f"--config={path}:{','.join([arg] * bool(arg) + quoted)}"
    changed = [f"--config.{key}={value}" for key, value in self._overrides.items()]
    return [config, f"--workdir={workdir}", *changed]


def _is_finished(workdir: epath.Path) -> bool:
  return (workdir / RESULTS).exists()


def _is_active(workdir: epath.Path) -> bool:
  """Whether another process trains in a workdir."""
  workdir.mkdir(parents=True, exist_ok=True)
  try:
    with lock.hold(workdir):
      return False
  except lock.TakenError:
    return True


if __name__ == "__main__":
  cpu.use_large_pages()
  cli.run(main)
