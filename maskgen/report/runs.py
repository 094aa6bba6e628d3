"""What a workdir holds: settings, curves, results, pictures and tables."""

import csv
import dataclasses
import io
import json
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from maskgen import files
from maskgen.errors import UserError

_REMEDY = "restore it from a copy, or delete the run"
_SAMPLE = re.compile(r"(.+)_(\d{7,})\.(png|csv)")

Points = list[tuple[int, float]]  # steps and values, by step
Files = list[tuple[int, epath.Path]]  # steps and files, by step


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of a run; a run without stages is one.

  Attributes:
    name: of the stage, or "" for the only one.
    config: its section of the config.
    curves: the values of each metric by step, of averages while training and of evaluations.
    results: the final values of evaluations; empty while the stage is unfinished.
    pictures: the files of each picture by step.
    tables: the files of each table by step.
    receipt: its `receipts.json`, or empty.
  """

  name: str
  config: Mapping[str, Any]
  curves: Mapping[str, Points]
  results: Mapping[str, float]
  pictures: Mapping[str, Files]
  tables: Mapping[str, Files]
  receipt: Mapping[str, Any]

  @property
  def step(self) -> int:
    """The last step with a metric."""
    return max((points[-1][0] for points in self.curves.values()), default=0)


@dataclasses.dataclass(frozen=True)
class Run:
  """A workdir.

  Attributes:
    name: its path.
    config: its `config.json`.
    facts: what `results.json` says of the whole run, such as its device.
    stages: those that have begun.
  """

  name: str
  config: Mapping[str, Any]
  facts: Mapping[str, Any]
  stages: list[Stage]


def read(workdir: epath.Path) -> Run:
  """Reads a workdir.

  Raises:
    UserError: if it holds no run, or a damaged file.
  """
  if not (workdir / "config.json").exists():
    raise UserError(f"{workdir} holds no run (no config.json): give the --workdir of one")
  config = _read(workdir / "config.json")
  names = config.get("stages", [""])
  stages = [_read_stage(name, config[name] if name else config, workdir / name) for name in names]
  results = _read(workdir / "results.json")
  return Run(
    str(workdir),
    config,
    results.get("run", {}) if "stages" in config else {},
    [stage for stage in stages if stage.curves],
  )


def _read_stage(name: str, config: Mapping[str, Any], folder: epath.Path) -> Stage:
  curves: dict[str, dict[int, float]] = {}
  metrics = folder / "metrics.jsonl"
  for line in files.read_json_lines(metrics, {"step": int}, _REMEDY) if metrics.exists() else []:
    for key, value in line.items():
      if key != "step" and isinstance(value, int | float):
        curves.setdefault(key, {})[line["step"]] = float(value)
  samples: dict[str, dict[str, Files]] = {"png": {}, "csv": {}}
  for file in sorted((folder / "samples").iterdir()) if (folder / "samples").exists() else []:
    if match := _SAMPLE.fullmatch(file.name):
      samples[match[3]].setdefault(match[1], []).append((int(match[2]), file))
  by_step = {key: sorted(points.items()) for key, points in curves.items()}
  results, receipt = (_read(folder / f"{kind}.json") for kind in ("results", "receipts"))
  return Stage(name, config, by_step, results, samples["png"], samples["csv"], receipt)


def read_table(file: epath.Path) -> list[list[str]]:
  """The rows of a table, the first with the names of its columns.

  Raises:
    UserError: if the file is no table.
  """
  try:
    rows = list(filter(None, csv.reader(io.StringIO(file.read_bytes().decode(), newline=""), strict=True)))
  except (UnicodeDecodeError, csv.Error) as error:
    raise files.damaged(file, error, "remove it") from error
  if not rows:
    raise files.damaged(file, "it is empty", "remove it")
  return rows


def _read(file: epath.Path) -> dict[str, Any]:
  return files.read_json(file, _REMEDY) if file.exists() else {}


def to_text(config: Mapping[str, Any]) -> str:
  """A config as JSON."""
  return json.dumps(config, indent=2, sort_keys=True)
