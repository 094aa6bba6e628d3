"""Computes results again from their receipt: python -m maskgen.tools.verify runs/quickstart"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from maskgen import cli, files
from maskgen import config as config_lib
from maskgen.errors import UserError

RESULTS = "results.json"
_RESTORE = "restore it from a copy"
_MOST_DEVICES = 65  # that one CPU is divided into
# The parts of receipts of runs, and of the JSON files of maskgen.tools.evaluate and `vilex subjects`.
_OF_RUN = {"config.evals": dict, "data": dict, "model.path": str, "evaluations": dict}
_OF_PICTURES = {"metrics": dict, "generated": dict, "reference": dict, "labels": str, "arguments": dict}
_OF_SUBJECTS = {"metrics": dict, "model": dict, "subjects": dict, "networks": dict, "arguments": dict}


def main(argv: Sequence[str]) -> None:
  """Parses the command line and verifies.

  Raises:
    UserError: naming what differs.
  """
  from maskgen.evaluators import receipts

  parser = cli.Parser(
    "Computes results again from what their receipt names, after checking that model, data, networks and "
    "options are those of the receipt. Numbers must be equal in every bit on CPUs in the same layout of "
    f"devices with the same versions, otherwise to {receipts.TOLERANCE:g} of their size. The command in a "
    "receipt is never run.",
    "python -m maskgen.tools.verify runs/quickstart",
  )
  parser.add_argument(
    "results",
    help=f"workdir of a finished run, its {RESULTS}, another folder with {receipts.FILE}, or the JSON file "
    "of maskgen.tools.evaluate or maskgen.tools.vilex subjects",
  )
  path = epath.Path(parser.parse_args(argv).results)
  if not path.exists():
    raise UserError(f"{path} does not exist: give a workdir, its {RESULTS}, or a JSON file of evaluate")
  if path.is_dir() or path.name in (RESULTS, receipts.FILE):
    folder = path if path.is_dir() else path.parent
    for each, results in stages(folder).items():
      verify_run(each, results)
  else:
    verify_pictures(path)


def stages(folder: epath.Path) -> dict[epath.Path, dict[str, Any]]:
  """The folders with receipts of a run, and for each the results that are said to be its own, by their file.

  Raises:
    UserError: if the run is not finished, or its results lack a stage.
  """
  config = files.read_json(folder / "config.json", _RESTORE) if (folder / "config.json").exists() else {}
  if "stages" not in config:
    return {folder: _results(folder)}
  (file, whole), *_ = [*_results(folder).items(), ("", {})]
  if not file:
    raise UserError(f"{folder} has no {RESULTS}: finish the run, or give the folder of one of its stages")
  for stage in config["stages"]:
    if not isinstance(whole.get(stage), dict):
      raise UserError(f"{file} lacks the stage '{stage}': {_RESTORE}")
  return {folder / stage: {file: whole[stage], **_results(folder / stage)} for stage in config["stages"]}


def _results(folder: epath.Path) -> dict[str, Any]:
  file = folder / RESULTS
  return {str(file): files.read_json(file, _RESTORE)} if file.exists() else {}


def verify_run(folder: epath.Path, results: Mapping[str, Mapping[str, Any]]) -> None:
  """Verifies the receipt in a folder, and results against it.

  Args:
    folder: with `receipts.json`.
    results: by the file that they are from.

  Raises:
    UserError: naming what differs.
  """
  from maskgen import compile_cache, storage
  from maskgen.evaluators import receipts
  from maskgen.training import cpu, evaluation, receipt
  from maskgen.training.experiment import Experiment

  path = folder / receipts.FILE
  recorded, where = receipts.read(path, _OF_RUN), str(path)
  layout = recorded["layout"]
  if layout.get("platform") == "cpu" and layout.get("devices") in range(1, _MOST_DEVICES):
    cpu.use_devices(layout["devices"])
  compile_cache.use()
  metrics = numbers_of(recorded, where)
  for file, numbers in results.items():
    compare_results(file, numbers, metrics, where)
  config = recorded["config"]
  if (folder / "config.json").exists():
    compare_config(folder, config, where)
  names = recorded["evaluations"]
  if lacking := sorted(config["evals"].keys() - names.keys()):
    raise UserError(f"{where} lacks the evaluation '{lacking[0]}' of its config: evaluate again")
  experiment = Experiment(config | {"evals": {name: config["evals"].get(name, {}) for name in names}})
  receipts.check(recorded["data"], receipt.of_data(experiment), f"{where}: data")
  model = recorded["model"]
  at = epath.Path(model["path"]) if "://" in model["path"] else folder / model["path"]
  at = at if model.get("step") is None else at / storage.CHECKPOINTS / str(model["step"])
  variables, step = evaluation.load(experiment, at)
  found = {"path": model["path"], "step": step, "averages": storage.averages(at)}
  receipts.check(model, receipt.of_model(experiment, variables, found), f"{where}: model")
  facts = receipt.of_evaluations(experiment)
  for name, said in names.items():
    options = {key: value for key, value in said.items() if key not in ("numbers", "versions")}
    receipts.check(options, facts[name], f"{where}: {name}")
  now = receipts.surroundings(**receipt.layout(experiment))
  # Rows of a sweep that was continued may have versions of their own.
  versions = [recorded["versions"], *(said["versions"] for said in names.values() if "versions" in said)]
  reasons = [receipts.elsewhere({**recorded, "versions": each}, now) for each in versions]
  elsewhere = list(dict.fromkeys(itertools.chain(*reasons)))
  receipts.check_numbers(metrics, evaluation.evaluate(experiment, variables, None).numbers, elsewhere, where)
  say(where, metrics, elsewhere)


def numbers_of(recorded: Mapping[str, Any], where: str) -> dict[str, Any]:
  """All numbers of a run's receipt by `NAME/METRIC`.

  Raises:
    UserError: if an evaluation has none.
  """
  found: dict[str, Any] = {}
  for name, facts in recorded["evaluations"].items():
    if not isinstance(facts, dict) or not isinstance(facts.get("numbers"), dict):
      raise UserError(f"{where}: {name} lacks 'numbers', which a receipt has: evaluate again")
    found |= {f"{name}/{key}": value for key, value in facts["numbers"].items()}
  return found


def compare_results(file: str, results: Mapping[str, Any], metrics: Mapping[str, Any], where: str) -> None:
  """Checks that the results of a file are those of a receipt.

  Raises:
    UserError: naming the first that differs.
  """
  for name in dict.fromkeys((*results, *metrics)):
    if name not in metrics:
      raise UserError(f"{file} has {name}, of which {where} says nothing: it belongs to other results")
    if name not in results:
      raise UserError(f"{file} lacks {name}, which {where} has: it belongs to other results")
    if str(results[name]) != str(metrics[name]):
      raise UserError(f"{file} says that {name} is {results[name]}, but {where} {metrics[name]}: {_RESTORE}")


def compare_config(folder: epath.Path, config: Mapping[str, Any], where: str) -> None:
  """Checks that the config of a run is that of its receipt.

  Raises:
    UserError: naming the first key that differs.
  """
  from maskgen.training import receipt
  from maskgen.training.sections import find_type

  text = config_lib.without_origin(files.read_json(folder / "config.json", _RESTORE))
  stored = receipt.plain_config(config_lib.build_dataclass(config_lib.RunConfig, text, "config"))
  changes = config_lib.difference(config, stored, find_type)
  changes += [
    f"evals.{name}.{key}: {section[key]} -> {stored['evals'].get(name, {}).get(key)}"
    for name, section in config["evals"].items()
    for key in section
    if section[key] != stored["evals"].get(name, {}).get(key)
  ]
  if changes:
    raise UserError(f"{where} has another config than config.json beside it ({changes[0]}): {_RESTORE}")


def verify_pictures(path: epath.Path) -> None:
  """Verifies a JSON file of maskgen.tools.evaluate or maskgen.tools.vilex subjects.

  Raises:
    UserError: naming what differs.
  """
  from maskgen.evaluators import receipts
  from maskgen.tools import evaluate, vilex_subjects

  is_subjects = "subjects" in files.read_json(path, _RESTORE)
  tool: Any = vilex_subjects if is_subjects else evaluate
  recorded, where = receipts.read(path, _OF_SUBJECTS if is_subjects else _OF_PICTURES), str(path)
  given = [f"--{name}={value}" for name, value in recorded["arguments"].items() if value is not None]
  args = tool.parser().parse_args(given)
  vars(args).update(dict.fromkeys(tool.OUTPUTS))  # nothing is written
  tool.check_flags(args)
  inputs = tool.open_inputs(args)
  said = {key: value for key, value in recorded.items() if key not in ("metrics", *receipts.SURROUNDINGS)}
  receipts.check(said, tool.describe(inputs), where)
  elsewhere = receipts.elsewhere(recorded, receipts.surroundings())
  receipts.check_numbers(recorded["metrics"], tool.compute(inputs), elsewhere, where)
  say(where, recorded["metrics"], elsewhere)


def say(where: str, numbers: Mapping[str, Any], elsewhere: Sequence[str]) -> None:
  """Prints that numbers are those of a receipt."""
  from maskgen.evaluators.receipts import TOLERANCE

  exactly = f"to {TOLERANCE:g}, with {', '.join(elsewhere)}" if elsewhere else "in every bit"
  print(f"{where}: {len(numbers)} numbers computed again are equal {exactly}")


if __name__ == "__main__":
  cli.run(main)
