"""The main entry point: trains, evaluates or checks a config.

python -m maskgen.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

import argparse
import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from maskgen import cli, files
from maskgen import config as config_lib
from maskgen.errors import UserError, is_permanent, nearest, storage_errors
from maskgen.training import cpu, longer
from maskgen.training.pretrained import complete, stored_first
from maskgen.training.sections import find_type

log = logging.getLogger("maskgen")


def main(argv: Sequence[str]) -> None:
  """Parses the command line and runs it.

  Raises:
    UserError: if any input is invalid.
  """
  began = time.monotonic()
  parser = cli.Parser(
    "Trains, evaluates or checks a config. Any key of the config can be set with --config.KEY=VALUE. A run "
    "that was killed continues with the same command.",
    "python -m maskgen.main --config=configs/quickstart.py --workdir=runs/quickstart",
  )
  parser.add_argument("--config", required=True, help="config file, FILE[:key=value,...]")
  parser.add_argument("--workdir", required=True, help="folder of the run, local or remote")
  parser.add_argument(
    "--mode",
    default="train",
    choices=("train", "eval", "check"),
    help="eval: evaluate the newest checkpoint; check: build all, compile the step and time it",
  )
  parser.add_argument(
    "--checkpoint",
    help="with --mode=eval: a model to evaluate on the config's data: a workdir, WORKDIR/checkpoints/STEP, "
    "an export, converted weights or a name of maskgen.available(); --workdir is where pictures go",
  )
  parser.add_argument("--stage", help="with --checkpoint: a stage of the config, by default the last")
  others = parser.add_argument_group("multi-process runs outside Cloud TPU, GKE, Slurm and Open MPI")
  others.add_argument("--coordinator", help="host:port of process 0")
  others.add_argument("--process_count", type=int, help="number of processes")
  others.add_argument("--process_index", type=int, help="index of this process, from 0")
  args, rest = parser.parse_known_args(argv)
  overrides = parse_overrides(rest)
  if not args.workdir:
    raise UserError("--workdir is empty: give the folder of the run")
  if args.checkpoint is not None:
    evaluate_checkpoint(args, overrides)
    return
  if args.stage is not None:
    raise UserError(f"--stage={args.stage} needs --checkpoint: give both, or leave it out")
  root = epath.Path(args.workdir)
  with stored_first(root):
    config = config_lib.to_dict(config_lib.load(args.config, overrides, find_type))
    defaults = config_lib.to_dict(config_lib.load(args.config)) if overrides else config
  overridden = config_lib.overridden(defaults, config)
  config = complete(config, root)
  continued = check_workdir(root, config, args.mode)
  stages = split_stages(config, root)

  # Importing these takes seconds: errors in flags, configs and workdirs are reported first.
  import jax

  from maskgen import compile_cache, objectives, plugins, processes, report, storage

  processes.start(args.coordinator, args.process_count, args.process_index)
  cpu.use_cores(stages.values())
  compile_cache.use()
  if problem := cpu.missing_accelerator(jax.default_backend()):
    log.warning("%s", problem)

  from maskgen.training import evaluation, memory, train
  from maskgen.training.experiment import Experiment
  from maskgen.training.workdir import only_run_in, write_config

  def naming(workdir: epath.Path) -> contextlib.AbstractContextManager[None]:
    return name_stage(workdir.name) if "stages" in config else contextlib.nullcontext()

  experiments: dict[epath.Path, Experiment] = {}
  from_outside: set[str] = set()  # modules that the config names
  for workdir, stage in stages.items():
    log.info("checking %s", workdir.name)
    with naming(workdir), plugins.recording() as named:
      experiment = Experiment(storage.use_assets_if_gone(stage, workdir))
      if not (workdir / "checkpoints").exists():  # else everything needed is in the workdir
        experiment.check_pretrained(workdir, pending=experiments)
      if args.mode != "eval":
        experiment.check_precision()
      if workdir == continued:
        longer.check(workdir, experiment.config.checkpoint)
      if args.mode != "train":
        memory.check(experiment, workdir.name)
      elif workdir == continued or train.read_results(workdir) is None:
        memory.check(experiment, workdir.name)
        experiment.check_data(workdir)
    experiments[workdir] = experiment
    from_outside |= named
  if args.mode == "check":
    for workdir, experiment in experiments.items():
      with naming(workdir):
        check(experiment, workdir)
    log.info("check passed: nothing was trained")
    return
  if args.mode == "eval":
    for workdir, experiment in experiments.items():
      with naming(workdir):
        evaluation.evaluate_model(experiment, workdir, workdir)
    return
  # Only now: an invalid config must not claim the workdir.
  with only_run_in(root):
    if continued:
      longer.go_on(continued, experiments[continued])
    resumed, known = (root / "config.json").exists(), train.read_results(root) or {}
    write_config(root, config, argv, overridden)
    results: dict[str, Any] = {}
    for workdir, experiment in experiments.items():
      if (finished := train.read_results(workdir)) is not None:
        results[workdir.name] = finished
      else:
        write_config(workdir, stages[workdir], argv, overridden, _classes(experiment))
        if jax.process_index() == 0:
          storage.write_assets(workdir, objectives.local_files(stages[workdir]["objective"]))
          if from_outside:
            plugins.write_code(workdir)
        experiment.write_data(workdir)
        try:
          with naming(workdir):
            results[workdir.name] = train.train(experiment, workdir)
        except train.PreemptedError:
          log.info(
            "%s: stopped because it was preempted; the state is saved, run the same command to continue",
            workdir.name,
          )
          return
        train.write_results(workdir, results[workdir.name])
      log.info("%s: finished, results in %s", workdir.name, workdir / train.RESULTS)
    if "stages" in config:
      if not known.items() >= results.items():
        results["run"] = describe_run(stages, time.monotonic() - began, resumed)
        train.write_results(root, results)
      log.info("all stages finished, results in %s", root / train.RESULTS)
    if jax.process_index() == 0:
      try:
        report.write(root / report.REPORT, [root])
        log.info("all pictures, curves and results are in %s", root / report.REPORT)
      except (UserError, OSError) as error:  # the run itself has succeeded
        log.warning("no report was written: %s", error)


def evaluate_checkpoint(args: argparse.Namespace, overrides: Mapping[str, str]) -> None:
  """Evaluates the model at `--checkpoint` with a config's data and evaluations.

  Raises:
    UserError: if the flags contradict each other, or model and config do not fit.
  """
  if args.mode != "eval":
    raise UserError(
      f"--checkpoint={args.checkpoint} needs --mode=eval: to train from it, set config.init_from instead"
    )
  cli.check_out_folder(args.workdir, "workdir")
  stage, config = choose_stage(args.config, overrides, args.stage, args.checkpoint)

  from maskgen import compile_cache, processes
  from maskgen.training import evaluation, memory
  from maskgen.training.experiment import Experiment

  processes.start(args.coordinator, args.process_count, args.process_index)
  cpu.use_cores([config])
  compile_cache.use()
  with name_stage(stage) if stage else contextlib.nullcontext():
    experiment = Experiment(config)
    memory.check(experiment, args.checkpoint)
    evaluation.evaluate_model(experiment, args.checkpoint, epath.Path(args.workdir))


def choose_stage(
  path_and_args: str, overrides: Mapping[str, str], stage: str | None = None, model: str | None = None
) -> tuple[str | None, dict[str, Any]]:
  """Loads the config of one stage.

  Args:
    path_and_args: see `config.load`.
    overrides: likewise.
    stage: its name, by default that of the last stage.
    model: a trained model whose objective replaces the config's, or None.

  Returns:
    The name of the stage, None for a config without stages, and its plain config.

  Raises:
    UserError: if the config is wrong or has no such stage, or by `of_model`.
  """
  config = config_lib.to_dict(config_lib.load(path_and_args, overrides, find_type))
  config = config if model else complete(config)
  if stage is not None and "stages" not in config:
    raise UserError(f"--stage={stage}: {path_and_args} has no stages, remove the flag")
  stages = {path.name: run for path, run in split_stages(config, epath.Path("run")).items()}
  name = stage if stage is not None else list(stages)[-1]
  if name not in stages:
    raise UserError(f"--stage={name}: {path_and_args} has no such stage{nearest(name, stages)}")
  chosen = stages[name]
  if model:
    for key in overrides:
      if "objective" in key.split(".")[:2]:
        raise UserError(f"--config.{key}: the objective is that of {model}, leave it out")

    from maskgen.training.of_model import of_model  # takes seconds

    chosen = of_model(chosen, model)
  return name if "stages" in config else None, chosen


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
  """Reads `--config.KEY=VALUE` arguments.

  Raises:
    UserError: for any other argument.
  """
  overrides = {}
  for argument in arguments:
    key, separator, value = argument.partition("=")
    if not key.startswith("--config.") or not separator:
      raise UserError(f"argument '{argument}' is not understood; to set a config key: --config.KEY=VALUE")
    overrides[key.removeprefix("--config.")] = value
  return overrides


def split_stages(config: Mapping[str, Any], root: epath.Path) -> dict[epath.Path, dict[str, Any]]:
  """Returns the workdir and config of each stage; a config without stages is a single stage in the root."""
  if "stages" not in config:
    return {root: dict(config)}
  if not config["stages"]:
    raise UserError("config.stages is empty: name at least one stage, or remove the key")
  for stage in config["stages"]:
    if stage not in config:
      raise UserError(f"config.stages names '{stage}', which has no section in the config")
  for key in config:
    if key != "stages" and key not in config["stages"]:
      raise UserError(f"config has no key '{key}': with stages, each stage has its own section")
  return {root / stage: dict(config[stage]) for stage in config["stages"]}


@contextlib.contextmanager
def name_stage(stage: str) -> Iterator[None]:
  """Adds the stage to the keys that errors name: `config.evals.loss` becomes `config.mage.evals.loss`."""
  keys = "|".join(field.name for field in dataclasses.fields(config_lib.RunConfig))
  try:
    yield
  except UserError as error:
    named = re.sub(rf"^config(?=: )|\bconfig(?=\.({keys})\b| (has|needs) )", f"config.{stage}", str(error))
    error.args = (named, *error.args[1:])
    raise


def check_workdir(root: epath.Path, config: Mapping[str, Any], mode: str) -> epath.Path | None:
  """Checks that the workdir can be created or written, and contains no run of another config.

  Returns:
    The workdir of a finished run, or of its last stage, that the config continues; see `longer`.

  Raises:
    UserError: if not.
    TransientError: if the failure may be temporary.
  """
  with storage_errors(root):
    continued = check_same_run(root, config, mode)
    try:
      if mode == "train" or "://" not in str(root):
        # A new workdir is not created yet: the config may still turn out to be invalid.
        cli.probe(root)
    except OSError as error:
      if not is_permanent(error):
        raise
      raise UserError(
        f"workdir {root} is not writable ({error.strerror or error}): give another --workdir"
      ) from None
  return continued


def check_same_run(root: epath.Path, config: Mapping[str, Any], mode: str) -> epath.Path | None:
  """Checks that a workdir is new, or belongs to a run of this config, or to a finished one that goes on.

  Returns:
    The workdir that goes on, see `check_workdir`.

  Raises:
    UserError: if not.
  """
  previous = root / "config.json"
  if previous.exists():
    stored = config_lib.without_origin(
      files.read_json(previous, "restore it from a copy, or give another --workdir")
    )
    if stored == config:
      return None
    changes = config_lib.difference(stored, config, find_type)
    if changes and mode != "eval" and (continued := longer.find(root, stored, config, changes)):
      return continued
    if changes:
      more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
      remedy = "repeat the --config and the overrides of its training command, or give another --workdir"
      if mode == "train":
        remedy = _longer(root, config, changes) or (
          "give another --workdir, or delete this one, or go back to its config"
        )
      raise UserError(f"workdir {root} holds another config's run ({'; '.join(changes[:3])}{more}): {remedy}")
  elif root.exists() and any((root / name).exists() for name in ("checkpoints", "metrics.jsonl")):
    raise UserError(f"workdir {root} holds a run without config.json: give another --workdir")
  return None


def _longer(root: epath.Path, config: Mapping[str, Any], changes: Sequence[str]) -> str:
  """How to train longer than a run was planned, if these changes of its config are no others; else ""."""
  keys = [change.split(":")[0].split(".") for change in changes]
  if not all(key[-1] in ("total_steps", "total_epochs") and len(key) <= 2 for key in keys):
    return ""
  changed = {key[0] for key in keys}
  stages = list(config.get("stages", ()))
  while stages and stages[-1] not in changed:  # those are trained anew on the longer ones
    stages.pop()
  resume = [f"--config.{stage}.resume={root / stage}" for stage in stages] or [f"--config.resume={root}"]
  return (
    f"its schedules depend on its length; to train longer, give another --workdir and {' '.join(resume)}, or "
    "go back to its config"
  )


def _classes(experiment: Any) -> Sequence[str]:
  """The names of the classes that a model knows, if any."""
  return (experiment.objective.num_classes and experiment.data.class_names) or ()


def check(experiment: Any, workdir: epath.Path) -> None:
  """Fails fast: loads a batch, compiles and times the step, and traces the prediction functions."""
  from maskgen.training import forecast, train

  log.info("%s: %s", workdir.name, train.describe(experiment))
  log.info("%s: state and frozen parts on the mesh\n%s", workdir.name, experiment.coverage())
  if experiment.warm_start:
    log.info("%s: parameters taken from the source\n%s", workdir.name, experiment.warm_start.report())
  log.info("%s: tracing the evaluations", workdir.name)
  experiment.check_predict_fns()
  log.info("%s: reading a batch", workdir.name)
  batches = experiment.train_batches(0)
  batch = next(batches)
  shapes = {key: f"{value.dtype}{list(value.shape)}" for key, value in batch.items()}
  log.info("%s: one batch %s", workdir.name, shapes)
  log.info("%s: compiling the training step", workdir.name)
  began = time.monotonic()
  compiled = experiment.compile()
  memory = compiled.memory_analysis()
  log.info(
    "%s: the step compiles in %.0f s; per device %.0f MB of state and batch, %.0f MB of temporaries",
    workdir.name,
    time.monotonic() - began,
    memory.argument_size_in_bytes / 1e6,
    memory.temp_size_in_bytes / 1e6,
  )
  with contextlib.closing(batches):
    log.info("%s: %s", workdir.name, forecast.forecast(experiment, compiled, batches))
  log.info("%s: evaluations %s", workdir.name, ", ".join(experiment.evaluators) or "none")


def describe_run(stages: Mapping[epath.Path, Any], elapsed: float, resumed: bool) -> dict[str, Any]:
  """Returns the `run` entry of the top-level `results.json`; `elapsed` is this process's age in seconds."""
  import jax

  from maskgen import __version__
  from maskgen.training import metrics

  ages = [
    max((line.get("timing/seconds", 0.0) for line in metrics.read(workdir)), default=0.0)
    for workdir in stages
  ]
  return {
    "wall_seconds": max(elapsed, sum(ages)),  # the ages include earlier processes
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "version": __version__,
    **({"resumed": True} if resumed else {}),
  }


if __name__ == "__main__":
  cpu.use_large_pages()
  cli.run(main)
