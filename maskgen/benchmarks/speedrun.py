"""A race to a fixed quality on the digits, which any config can enter."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from maskgen import cli, files, storage
from maskgen import config as config_lib
from maskgen import main as main_lib
from maskgen.errors import UserError
from maskgen.training import metrics, train
from maskgen.training.sections import find_type

# A run arrives at its first evaluation that is at least as good in both.
LEAST_TOP1 = 0.93
MOST_FRECHET = 1.0
_TOP1, _FRECHET = "probe/top1", "generation/frechet_pixels"
# What every config has at these keys, of each stage and of the last one: (value, whether it is the default).
_EACH = {
  "data.source": ("digits", False),
  "data.split": ("train", True),
  "data.eval_split": ("test", True),
  "data.eval_source": (None, True),
  "init_from": (None, True),
  "resume": (None, True),
}
_LAST = {
  "evals.probe.type": ("probe", False),
  "evals.probe.num_images": (None, True),
  "evals.generation.type": ("generation", False),
  "evals.generation.num_images": (500, False),
  "evals.generation.features": ("pixels", True),
  "evals.generation.reference": (None, True),
  "evals.generation.seed": (0, True),
}


def main(argv: Sequence[str]) -> Iterator[dict[str, Any]]:
  """Parses the command line, trains if a config is given, and says when the run arrived.

  Raises:
    UserError: if the run breaks a rule, is not finished, or has not arrived.
  """
  parser = cli.Parser(
    f"Measures how long a run takes to reach {LEAST_TOP1:.0%} by a linear probe and a Frechet distance of "
    f"{MOST_FRECHET:g} on scikit-learn's digits, from nothing: start, compilation, all stages and all "
    "evaluations count. --config trains a config in a new workdir first; any of its keys can be set with "
    "--config.KEY=VALUE. Without it, --workdir is a finished run.",
    "python -m maskgen.tools.bench speedrun --config=configs/quickstart.py --workdir=runs/speedrun",
  )
  parser.add_argument("--config", help="config file, FILE[:key=value,...]")
  parser.add_argument("--workdir", required=True, help="folder of the run")
  args, rest = parser.parse_known_args(argv)
  overrides = main_lib.parse_overrides(rest)
  if args.config is not None:
    cli.check_out_folder(args.workdir, "workdir", new=True)
    check_rules(config_lib.to_dict(config_lib.load(args.config, overrides, find_type)))
    main_lib.main([f"--config={args.config}", f"--workdir={args.workdir}", *rest])
  elif overrides:
    raise UserError("--config.KEY=VALUE needs --config: give the config that it changes, or leave it out")
  yield judge(epath.Path(args.workdir))


def check_rules(config: Mapping[str, Any]) -> None:
  """Checks that a run trains on the digits from nothing, and is evaluated as all others are.

  Args:
    config: its plain config.

  Raises:
    UserError: naming a key that breaks a rule.
  """
  if "stages" not in config:
    raise UserError("a speedrun has stages, as configs/quickstart.py has: add config.stages")
  stages = main_lib.split_stages(config, epath.Path())
  for path, stage in stages.items():
    last = path.name == config["stages"][-1]
    for key, (value, default) in (_EACH | _LAST if last else _EACH).items():
      found: Any = stage
      for part in key.split("."):
        found = found.get(part, value if default else None) if isinstance(found, Mapping) else None
      if found != value:
        raise UserError(f"config.{path.name}.{key} is {found!r}: a speedrun has {value!r}")
    for name, model in stage.get("pretrained", {}).items():
      if not model.startswith("stage:"):
        raise UserError(
          f"config.{path.name}.pretrained.{name} is {model}: a speedrun trains all of its stages"
        )


def judge(root: epath.Path) -> dict[str, Any]:
  """When a finished run arrived.

  Args:
    root: its workdir.

  Returns:
    `seconds` from the start of its process to the end of the evaluation; `step` of the last stage; what the
    evaluation found; `device` and `version`.

  Raises:
    UserError: if it breaks a rule, is not finished, took more than one process, or has not arrived.
  """
  results = train.read_results(root)
  if results is None:
    raise UserError(f"{root} has no {train.RESULTS}: give the folder of a run, and finish it first")
  config = config_lib.without_origin(files.read_json(root / storage.CONFIG, "restore it from a copy"))
  check_rules(config)
  if results["run"].get("resumed"):
    raise UserError(
      f"{root} took more than one process, and its time does not count the start of each, nor repeated "
      "steps: train it in one go in a new --workdir"
    )
  lines = metrics.read(root / config["stages"][-1])
  evaluations = [line for line in lines if {_TOP1, _FRECHET} <= line.keys()]
  arrived = [line for line in evaluations if line[_TOP1] >= LEAST_TOP1 and line[_FRECHET] <= MOST_FRECHET]
  if not arrived:
    found = [f"step {line['step']}: {line[_TOP1]:.3f} and {line[_FRECHET]:.3g}" for line in evaluations]
    raise UserError(
      f"{root} has not reached {LEAST_TOP1} and {MOST_FRECHET:g} "
      f"({'; '.join(found) or 'no evaluation has both'}): train for longer, or better"
    )
  first, run = arrived[0], results["run"]
  after = lines[-1]["timing/seconds"] - first["timing/seconds"]
  return {
    "seconds": round(run["wall_seconds"] - after, 1),
    **{key: first[key] for key in ("step", _TOP1, _FRECHET)},
    "device": run["device"],
    "version": run["version"],
  }
