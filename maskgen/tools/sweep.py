"""Evaluates sampling options: python -m maskgen.tools.sweep --model=DIR --temperature=1,2,4 --out=DIR"""

import argparse
import collections
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from maskgen import cli, files
from maskgen import config as config_lib
from maskgen import main as main_lib
from maskgen.errors import UserError, counted
from maskgen.tools import sampling_flags

TABLE, SHEET, PICTURES = "sweep.csv", "sweep.png", "pictures"
BASE = ("weights", "num_images", "features", "data")  # the columns in which all rows of a table agree
VERSIONS = "versions"  # the column of the packages that a row was measured with
_SHOWN = 16  # images of each setting, in one row
_CALLS = 3  # timed calls; the fastest counts
log = logging.getLogger("maskgen")


def main(argv: Sequence[str]) -> None:
  """Parses the command line and measures.

  Raises:
    UserError: if the model, a setting or the folder is wrong.
  """
  from maskgen import objectives

  parser = cli.Parser(
    "Generates images with every combination of the given sampling options, compares them with the data that "
    f"the model was trained on, and writes {TABLE}, best first, and {SHEET}, one row of images per setting. "
    "An interrupted sweep continues with the same command and repeats no measurement.",
    "python -m maskgen.tools.sweep --model=runs/quickstart/mage --temperature=1,2.5,6 --steps=8,16 "
    "--order=confidence,halton --out=runs/sweep",
  )
  parser.add_model("workdir of a run, an export, or converted weights; the data must be available")
  parser.add_argument("--out", required=True, help="folder to write, or to continue")
  parser.add_argument(
    "--config",
    help="config file, FILE[:key=value,...], with the data and the evaluation; by default the model's own",
  )
  parser.add_argument("--stage", help="which stage of --config, by default the last")
  parser.add_argument("--features", help="feature space of the distance, by default that of the evaluation")
  parser.add_argument(
    "--num_images",
    type=int,
    default=500,
    help="images per setting; distances for different numbers are not comparable",
  )
  sampling_flags.add(parser, argv, several=True)
  args, rest = parser.parse_known_args(argv)
  if args.num_images < 2:
    raise UserError(f"--num_images={args.num_images}: give at least 2")
  cli.check_out_folder(args.out)
  if args.features is not None:
    from maskgen.evaluators.comparison import check_features

    check_features(args.features)
  config = _config(args, main_lib.parse_overrides(rest))
  objective = objectives.build(config.get("objective", {}))
  if not hasattr(objective, "sampling"):
    raise UserError(
      f"--model={args.model} does not generate images: give a model of an objective such as 'mage'"
    )
  out, wanted = epath.Path(args.out), settings(objective, args)
  sweep(args.model, config, wanted, out, args.num_images, args.features)


def _config(args: argparse.Namespace, overrides: Mapping[str, str]) -> dict[str, Any]:
  """The config of the model, with the data and the evaluations of `--config`, if it is given.

  Raises:
    UserError: if neither has data.
  """
  from maskgen import storage

  if args.config is not None:
    return main_lib.choose_stage(args.config, overrides, args.stage, args.model)[1]
  config = storage.load_config(args.model)
  has_data = "source" in config.get("data", {})
  if not has_data or overrides or args.stage is not None:
    reason = "is given with flags of a config" if has_data else "has no data of its own"
    raise UserError(f"--model={args.model} {reason}: add --config=FILE")
  return config_lib.without_origin(config)


def settings(objective: Any, args: argparse.Namespace) -> list[Any]:
  """Returns every combination of the flags, without those that differ only in ignored options.

  Args:
    objective: the objective of the model; its `sampling` has the defaults.
    args: flags with the names of the fields of `sampling`, texts or None.

  Raises:
    UserError: if a value is no number, or is valid in no combination; invalid combinations are left out.
  """
  from maskgen import objectives

  defaults = objective.sampling
  choices: dict[str, list[Any]] = {}
  for field in dataclasses.fields(defaults):
    text: str | None = getattr(args, field.name)
    kind: Any = type(getattr(defaults, field.name))
    try:
      choices[field.name] = (
        [getattr(defaults, field.name)] if text is None else [kind(value) for value in text.split(",")]
      )
    except ValueError:
      what = "whole numbers" if kind is int else "numbers"
      raise UserError(f"--{field.name}={text}: give {what}, separated by commas") from None
  found, invalid = [], collections.Counter[str]()
  valid: set[tuple[str, Any]] = set()  # options with a value, such as ("steps", 8), of a valid combination
  refused: dict[tuple[str, Any], str] = {}
  for values in itertools.product(*choices.values()):
    options = dict(zip(choices, values, strict=True))
    try:
      objectives.check_sampling(objective, options)
    except UserError as error:
      invalid[str(error)] += 1
      for option in options.items():
        refused.setdefault(option, str(error))
      continue
    valid.update(options.items())
    setting = dataclasses.replace(defaults, **options)
    ignored = {name: getattr(defaults, name) for name in getattr(setting, "ignored", ())}
    found.append(dataclasses.replace(setting, **ignored))
  for option, reason in refused.items():
    if option not in valid:
      raise UserError(reason)
  for reason, number in invalid.items():
    log.warning("left out %s: %s", counted(number, "combination"), reason)
  return list(dict.fromkeys(found))


def sweep(
  model: str,
  config: Mapping[str, Any],
  wanted: Sequence[Any],
  out: epath.Path,
  num_images: int,
  features: str | None = None,
) -> None:
  """Measures the settings that are not in the table yet, then sorts the table and draws the sheet."""
  import jax

  from maskgen import images, objectives, tree
  from maskgen.evaluators import receipts, statistics_files
  from maskgen.training import evaluation, receipt
  from maskgen.training.experiment import Experiment

  # The first evaluation of generated images in the run's config, if any: its feature space and classifier.
  sections = (section for section in config.get("evals", {}).values() if section["type"] == "generation")
  section = next(sections, {"type": "generation", "every_steps": 1}) | {"num_images": num_images}
  if objectives.build(config["objective"]).captions is not None:
    section["captions"] = True  # guidance needs captions
  if features is not None:
    section["features"] = features
  experiment = Experiment({**config, "evals": {"sweep": section}})
  evaluator: Any = experiment.evaluators["sweep"][1]
  variables, step = evaluation.load(experiment, model)
  rank = evaluator.distance
  reference = json.dumps([experiment.data.fingerprints, config["data"].get("eval_preprocess")])
  values = (
    tree.fingerprint(variables)[:12],
    num_images,
    evaluator.features,
    hashlib.sha256(reference.encode()).hexdigest()[:12],
  )
  base = dict(zip(BASE, values, strict=True))
  rows = read_table(out / TABLE, base)
  if any(rank not in row for row in rows):
    raise UserError(f"{out / TABLE} has measurements without {rank}: give another --out")
  (out / PICTURES).mkdir(parents=True, exist_ok=True)
  todo = [setting for setting in wanted if not find(rows, setting)]
  log.info("%d settings, %d of them already measured", len(wanted), len(wanted) - len(todo))
  rng, began = jax.random.key(0), time.monotonic()
  for number, setting in enumerate(todo, 1):
    options = dataclasses.asdict(setting)
    seconds, made = _time(experiment, variables, options)
    report = evaluator.measure(variables, rng, **options)
    strip = images.enlarge(images.grid(made[:_SHOWN], columns=_SHOWN), smallest=1000)
    images.write_png(out / PICTURES / f"{_name(options)}.png", strip)
    measured = {"seconds_per_image": seconds, **report.numbers}
    packages = ", ".join(f"{name} {version}" for name, version in statistics_files.versions().items())
    row = options | base | {VERSIONS: packages} | measured
    rows.append({name: str(value) for name, value in row.items()})
    write_table(out / TABLE, rows)
    left = (time.monotonic() - began) / number * (len(todo) - number)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
    log.info("%d of %d: %s: %s; %.0f s left", number, len(todo), _name(options), shown, left)
  rows.sort(key=lambda row: float(row[rank]))
  write_table(out / TABLE, rows)
  chosen = [row for row in rows if any(find([row], setting) for setting in wanted)]
  print("\n".join(_markdown(chosen, wanted)))
  _draw(out, chosen, wanted, rank)
  described = receipt.of_run(experiment, variables, receipt.located(model, step), {})
  receipts.write(out, described | _of_settings(described, wanted, rows))
  print(f"wrote {out / TABLE} and {out / SHEET}, and {out / receipts.FILE} of these settings")


def _of_settings(
  described: Mapping[str, Any], wanted: Sequence[Any], rows: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
  """What a receipt says of the settings: an evaluation for each, in the place of the sweep's.

  Rows of an earlier sweep that was made with other packages have `versions` of their own.
  """
  facts, evaluations, sections = described["evaluations"]["sweep"], {}, {}
  section = described["config"]["evals"]["sweep"]
  for setting in wanted:
    options = dataclasses.asdict(setting)
    row = next(row for row in rows if find([row], setting))
    others = {*options, *BASE, VERSIONS, "seconds_per_image"}
    numbers = {name: float(value) for name, value in row.items() if name not in others and value}
    evaluations[_name(options)] = {**facts, "sampling": options, "numbers": numbers}
    if (packages := _packages(row, described["versions"])) != described["versions"]:
      evaluations[_name(options)][VERSIONS] = packages
    sections[_name(options)] = {**section, "sampling": options}
  return {"evaluations": evaluations, "config": {**described["config"], "evals": sections}}


def _packages(row: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
  """The versions of the packages of `now` that a row was measured with; older tables do not say."""
  known = dict(package.split(" ", 1) for package in row.get(VERSIONS, "").split(", ") if package)
  return {name: known.get(name, "unknown") for name in now}


def _time(experiment: Any, variables: Any, options: dict[str, Any]) -> tuple[float, np.ndarray]:
  """Seconds per image in a batch, without compilation, and the images."""
  import jax

  from maskgen import sharding
  from maskgen.evaluators import batches

  like = jax.ShapeDtypeStruct((experiment.eval_batch_size,), bool)
  like = jax.device_put(np.ones(like.shape, bool), sharding.batch_sharding(experiment.mesh))
  batch, seconds = {"key": batches.make_keys({"valid": like}, seed=0)}, []
  if num_classes := experiment.objective.num_classes:
    batch["label"] = batches.make_labels({"valid": like}, num_classes)
  if (captions := experiment.objective.captions) is not None:
    empty = np.repeat(captions.read([""]), len(like), axis=0)
    batch["caption"] = batches.place({"valid": like}, empty)
  for _ in range(1 + _CALLS):
    began = time.monotonic()
    made = jax.block_until_ready(
      experiment.predict["generate"](variables, batch, jax.random.key(0), **options)
    )
    seconds.append(time.monotonic() - began)
  return min(seconds[1:]) / experiment.eval_batch_size, batches.gather(made)


def read_table(path: epath.Path, base: Mapping[str, Any]) -> list[dict[str, str]]:
  """Returns the rows of the table of an earlier sweep, if there is one.

  Raises:
    UserError: if it differs in one of the columns `BASE`.
  """
  if not path.exists():
    return []
  rows = list(csv.DictReader(io.StringIO(path.read_text())))
  for row in rows:
    for name, value in base.items():
      if row.get(name, str(value)) != str(value):  # older tables have no features and data
        raise UserError(
          f"{path} has measurements with {name} {row.get(name)}, this sweep has {value}: give another --out"
        )
  return rows


def write_table(path: epath.Path, rows: Sequence[Mapping[str, str]]) -> None:
  """Writes rows as CSV, atomically."""
  text = io.StringIO()
  writer = csv.DictWriter(
    text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
  )
  writer.writeheader()
  writer.writerows(rows)
  files.replace(path, text.getvalue())


def find(rows: Sequence[Mapping[str, str]], setting: Any) -> bool:
  """Whether a setting has been measured."""
  options = dataclasses.asdict(setting).items()
  return any(all(row.get(name) == str(value) for name, value in options) for row in rows)


def _name(options: Mapping[str, Any]) -> str:
  return ",".join(f"{name}={value}" for name, value in options.items())


def _varied(wanted: Sequence[Any]) -> list[str]:
  """The options that differ between settings."""
  names = [field.name for field in dataclasses.fields(wanted[0])]
  return [name for name in names if len({getattr(setting, name) for setting in wanted}) > 1]


def _markdown(rows: Sequence[Mapping[str, str]], wanted: Sequence[Any]) -> Iterator[str]:
  hidden = {field.name for field in dataclasses.fields(wanted[0])} - {*_varied(wanted)} | {*BASE, VERSIONS}
  names = [name for name in rows[0] if name not in hidden]
  yield "| " + " | ".join(names) + " |"
  yield "|" + " --- |" * len(names)
  for row in rows:
    yield "| " + " | ".join(_short(row[name]) for name in names) + " |"


def _short(value: str) -> str:
  try:
    return f"{float(value):.4g}"
  except ValueError:
    return value


def _draw(out: epath.Path, rows: Sequence[Mapping[str, str]], wanted: Sequence[Any], rank: str) -> None:
  """Draws the images of each row under its setting and metrics."""
  from PIL import Image

  from maskgen import images, sheet

  sections = {}
  for place, row in enumerate(rows, 1):
    options = {field.name: row[field.name] for field in dataclasses.fields(wanted[0])}
    title = ", ".join(f"{name} {row[name]}" for name in _varied(wanted)) or "the config's setting"
    speed = f"{1e3 * float(row['seconds_per_image']):.3g} ms per image"
    title = f"{place}. {title}: {rank} {_short(row[rank])}, {speed}"
    strip = np.asarray(Image.open(io.BytesIO((out / PICTURES / f"{_name(options)}.png").read_bytes())))
    sections[title] = [sheet.Card([strip], [], "")]
  images.write_png(out / SHEET, sheet.draw(sections))


if __name__ == "__main__":
  cli.run(main)
