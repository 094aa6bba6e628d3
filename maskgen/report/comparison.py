"""What `maskgen.tools.compare` has measured: a table, a picture and a page."""

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from maskgen import files
from maskgen.errors import UserError, counted
from maskgen.evaluators import linear
from maskgen.evaluators.probe import BASELINES
from maskgen.report import charts, page, runs

PROBE, SPEED = "probe/top1", "timing/images_per_second"
RANDOM = f"{PROBE}_random_encoder"
SHARES = {"a tenth": 0.1, "a third": 1 / 3, "the end": 1.0}
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 760, 460, 60, 44, 16
_APART = 110  # the width of the column of objectives without a distance
_AREA = 900.0  # of the largest point
_REMEDY = "restore it, or delete the run"

Values = list[float]  # one of each seed
Row = dict[str, Any]


def write(out: epath.Path, plan: Mapping[str, Any]) -> None:
  """Writes `comparison.json`, `.md` and `.svg`, and `report.html` about a comparison with a finished run.

  Args:
    out: its folder.
    plan: see `maskgen.tools.compare`.

  Raises:
    UserError: if its runs have different tokenizers.
  """
  rows = read(out, plan)
  if not rows:
    return
  text = "\n".join(markdown(plan, rows))
  picture = draw(rows)
  files.replace(out / "comparison.json", json.dumps({"plan": plan, "rows": rows}, indent=2))
  files.replace(out / "comparison.md", text + "\n")
  files.replace(out / "comparison.svg", picture)
  files.replace(out / "report.html", render(plan, rows, picture))
  print(text)


def read(out: epath.Path, plan: Mapping[str, Any]) -> list[Row]:
  """The numbers of each objective with a finished run, the best probe first; for arguments see `write`.

  Returns:
    For each its `name`, its entry in the plan, the workdirs of its finished `runs`, `curves` (for a metric
    and a share of the budget, a number of each seed), `floors` (numbers of probes without training and
    distances of other pictures), and `speed` in images per second.
  """
  rows: list[Row] = []
  tokenizers: dict[str, epath.Path] = {}
  for name, entry in plan["entries"].items():
    found = [path for path in sorted((out / name).glob("seed_*")) if (path / "results.json").exists()]
    stages = [stage for path in found for stage in runs.read(path).stages]
    if not stages:
      continue
    for path in found:
      frozen = files.read_json(path / "receipts.json", _REMEDY)["model"]["frozen"]
      if tokenizer := frozen.get("tokenizer") or frozen.get("autoencoder"):
        tokenizers.setdefault(tokenizer, path)
    metrics = [metric for metric in (PROBE, entry["distance"]) if metric and metric in stages[0].results]
    numbers = {key: value for stage in stages for key, value in stage.results.items()}
    known = [f"{PROBE}_{name}" for name in BASELINES]
    known += [f"{entry['distance']}_{name}" for name in ("floor", "reconstructions", "uniform_codes")]
    rows.append(
      {
        "name": name,
        **entry,
        "runs": [str(path.relative_to(out)) for path in found],
        "curves": {
          metric: {
            share: [_nearest(stage, metric, part) for stage in stages] for share, part in SHARES.items()
          }
          for metric in metrics
        },
        "floors": {key: numbers[key] for key in known if key in numbers},
        "speed": float(np.median([value for stage in stages for _, value in stage.curves.get(SPEED, ())])),
      }
    )
  if len(tokenizers) > 1:
    first, second = list(tokenizers.values())[:2]
    raise UserError(
      f"{first} and {second} have different tokenizers, so that they cannot be compared: delete one of them"
    )
  return sorted(rows, key=lambda row: -_last(row, PROBE, -math.inf))


def markdown(plan: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
  """The lines of the table, and of what to compare it with."""
  head, cells = _table(rows)
  yield "| " + " | ".join(head) + " |"
  yield "|" + " --- |" * len(head)
  for row in cells:
    yield "| " + " | ".join(row) + " |"
  yield ""
  for line in (*_floors(rows), *_terms(plan, rows)):
    yield f"- {line}"


def draw(rows: Sequence[Row]) -> str:
  """The picture, as SVG: probe against distance, points as large as training is fast."""
  shown = [row for row in rows if PROBE in row["curves"]]
  if not shown:
    return '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"/>'
  floors = {name: value for row in shown for name, value in row["floors"].items() if name.startswith(PROBE)}
  floors.pop(RANDOM, None)
  heights = [value for row in shown for value in row["curves"][PROBE]["the end"]] + list(floors.values())
  y = charts.scale(*_around(heights), _HEIGHT - _BOTTOM, _TOP)
  distances = [value for row in shown for value in row["curves"].get(row["distance"], {}).get("the end", ())]
  right = _WIDTH - _APART
  x = charts.scale(*_around(distances or [0.0, 1.0]), _LEFT, right - 20)
  fastest = max(row["speed"] for row in shown)
  parts = [
    f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
    f'<text x="{_LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{100 * t:.4g}%</text>'
    for t in charts.ticks(*_around(heights), 6)
  ]
  parts += [
    f'<line x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
    f'<text x="{x(t):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{t:.4g}</text>'
    for t in charts.ticks(*_around(distances), 6)
    if distances
  ]
  for i, (name, value) in enumerate(sorted(floors.items(), key=lambda floor: floor[1])):
    parts.append(
      f'<line class="floor" x1="{_LEFT}" x2="{_WIDTH}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
      f'<text x="{_LEFT + 4 + 110 * (i % 2)}" y="{y(value) - 4:.1f}">{_floor_name(name)}</text>'
    )
  for i, row in enumerate(shown):
    points = row["curves"].get(row["distance"], {}).get("the end")
    across = x(float(np.mean(points))) if points else right + _APART / 2
    parts.append(_point(i, row, across, y, x if points else None, fastest))
  labels = f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">Frechet distance</text>'
  labels += f'<text x="{right + _APART / 2}" y="{_HEIGHT - 8}" text-anchor="middle">generates nothing</text>'
  return (
    f'<svg class="arena" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
    f'aria-label="probe against Frechet distance"><style>{_STYLE}</style>{"".join(parts)}{labels}</svg>'
  )


_STYLE = (
  ".arena text { font: 12px system-ui, sans-serif; fill: #66665f } .arena line { stroke: #dcdcd6 } "
  ".arena .floor { stroke: #8a8a82; stroke-dasharray: 4 4 } .arena .bar { stroke: currentColor } "
  ".arena circle { fill: currentColor; fill-opacity: 0.6 } "
  + " ".join(
    f".point{i} {{ color: {colour} }} .arena .point{i} text {{ fill: {colour}; font-weight: 600 }}"
    for i, colour in enumerate(("#2f6fd0", "#d1600f", "#2c8a4b", "#a2399b", "#8a6d00", "#c22f45"))
  )
)


def _point(i: int, row: Row, across: float, y: charts.Scale, x: charts.Scale | None, fastest: float) -> str:
  """A point with intervals and name; `x` is None for an objective without a distance."""
  values = row["curves"][PROBE]["the end"]
  mean, half = float(np.mean(values)), _half(values)
  radius = math.sqrt(_AREA * row["speed"] / fastest / math.pi)
  bars = ""
  if half is not None:
    bars += f'<line class="bar" x1="{across:.1f}" x2="{across:.1f}" y1="{y(mean - half):.1f}" '
    bars += f'y2="{y(mean + half):.1f}"/>'
  if x is not None and (wide := _half(points := row["curves"][row["distance"]]["the end"])) is not None:
    left, right = x(float(np.mean(points)) - wide), x(float(np.mean(points)) + wide)
    bars += f'<line class="bar" x1="{left:.1f}" x2="{right:.1f}" y1="{y(mean):.1f}" y2="{y(mean):.1f}"/>'
  side, anchor = (-1, "end") if across > 0.7 * _WIDTH else (1, "start")
  return (
    f'<g class="point{i % page.COLOURS}">{bars}'
    f'<circle cx="{across:.1f}" cy="{y(mean):.1f}" r="{radius:.1f}"/>'
    f'<text x="{across + side * (radius + 4):.1f}" y="{y(mean) - 5:.1f}" text-anchor="{anchor}">'
    f"{html.escape(row['name'])}</text></g>"
  )


def render(plan: Mapping[str, Any], rows: Sequence[Row], picture: str) -> str:
  """The page."""
  head, cells = _table(rows)
  body = "".join(
    f"<tr><th>{html.escape(first)}</th>{''.join(f'<td>{_unbroken(cell)}</td>' for cell in rest)}</tr>"
    for first, *rest in cells
  )
  lines = "".join(f"<li>{html.escape(line)}</li>" for line in (*_floors(rows), *_terms(plan, rows)))
  curves = {
    metric: {
      i: [(round(100 * part), float(np.mean(row["curves"][metric][share]))) for share, part in SHARES.items()]
      for i, row in enumerate(rows)
      if metric in row["curves"]
    }
    for metric in dict.fromkeys(metric for row in rows for metric in row["curves"])
  }
  legend = "".join(
    f'<li style="--colour: var(--run{i % page.COLOURS})">{i + 1}: {html.escape(row["name"])} '
    + ", ".join(f'<a href="{html.escape(run)}/report.html">{html.escape(run)}</a>' for run in row["runs"])
    + "</li>"
    for i, row in enumerate(rows)
  )
  charted = "".join(charts.chart(metric, series) for metric, series in curves.items())
  title = f"{counted(len(rows), 'objective')} compared"
  parts = [f"<h1>{title}</h1>", page.table("".join(f"<th>{name}</th>" for name in head), body)]
  parts += [f"<figure>{picture}</figure>", f"<ul>{lines}</ul>", "<h2>By percent of the budget</h2>"]
  parts += [f'<ul class="legend">{legend}</ul>', f'<div class="charts">{charted}</div>']
  return page.document(title, parts, len(rows))


def _table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
  """Heads and cells; a dash where an objective has no such ability."""
  head = ["objective", "learns from", "steps", "FLOPs", "images/s"]
  head += [f"probe at {share}" for share in SHARES] + ["random encoder"]
  distance = next((row["distance"] for row in rows if row["distance"]), "")
  if distance:
    head += [f"{distance.split('/', 1)[1]} at {share}" for share in SHARES]
  cells = []
  for row in rows:
    line = [row["name"], " and ".join(["pictures"] + [row["reads"]] * bool(row["reads"]))]
    line += [f"{row['steps']:,}", f"{row['steps'] * row['flops']:.3g}", f"{row['speed']:.0f}"]
    line += [_cell(row["curves"].get(PROBE, {}).get(share), 100.0, "%") for share in SHARES]
    line.append(_cell([row["floors"][RANDOM]] if RANDOM in row["floors"] else None, 100.0, "%"))
    if distance:
      line += [_cell(row["curves"].get(distance, {}).get(share)) for share in SHARES]
    cells.append(line)
  return head, cells


def _floors(rows: Sequence[Row]) -> Iterator[str]:
  """What is reached without training."""
  found = {name: value for row in rows for name, value in row["floors"].items()}
  probes = [
    f"{_floor_name(name)} {100 * value:.1f}%"
    for name, value in found.items()
    if name.startswith(PROBE) and name != RANDOM
  ]
  if probes:
    yield f"The same probe without any encoder: {', '.join(probes)}."
  for name, value in found.items():
    if name.endswith("_floor"):
      yield f"The distance of the evaluation split: {value:.4g}."
    elif name.endswith("_reconstructions"):
      yield f"The distance of the tokenizer's reconstructions of the evaluation split: {value:.4g}."
    elif name.endswith("_uniform_codes"):
      yield f"The distance of pictures of uniformly drawn codes: {value:.4g}."


def _terms(plan: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
  """The terms of the comparison."""
  said = f"Each run has {plan['flops']:.3g} FLOPs (--budget={plan['budget']}), to whole steps"
  if timed := plan.get("timed"):
    said += (
      f", as many as {timed['objective']} does in that time at {timed['seconds_per_step']:.3g} s per step "
    )
    said += f"on {timed['device']}"
  yield f"{said}; evaluations and the training of tokenizer and teachers are not counted."
  seeds = {len(row["runs"]) for row in rows}
  number = str(min(seeds)) if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
  yield f"Seeds: {number}." + " Means with 95% intervals of the mean (Student)." * (max(seeds) > 1)
  yield (
    f"Learning rates: the best of {plan['trials']} for each objective at a quarter of the budget, by the "
    "same probe on the same evaluation split."
    if plan["trials"]
    else "Learning rates were not tuned."
  )
  yield f"Data: {plan['data']}. Receipts of all numbers are in the folder of each run."


def _cell(values: Values | None, scale: float = 1.0, unit: str = "") -> str:
  if not values:
    return "-"
  digits = 1 if unit else 3
  mean, half = scale * float(np.mean(values)), _half(values)
  return f"{mean:.{digits}f}{f' ± {scale * half:.{digits}f}' if half is not None else ''}{unit}"


def _unbroken(text: str) -> str:
  return html.escape(text).replace(" ", "&nbsp;")


def _half(values: Values) -> float | None:
  """Half of the interval of the mean; None for a single value."""
  return linear.interval(np.asarray(values)) if len(values) > 1 else None


def _last(row: Row, metric: str, default: float) -> float:
  return float(np.mean(row["curves"][metric]["the end"])) if metric in row["curves"] else default


def _nearest(stage: runs.Stage, metric: str, part: float) -> float:
  """The value of the evaluation that is nearest to a part of the run."""
  points = stage.curves[metric]
  return min(points, key=lambda point: abs(point[0] - part * points[-1][0]))[1]


def _floor_name(name: str) -> str:
  return name.removeprefix(f"{PROBE}_").replace("_", " ")


def _around(values: Sequence[float]) -> tuple[float, float]:
  """A range with a margin around values."""
  low, high = min(values, default=0.0), max(values, default=1.0)
  margin = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
  return low - margin, high + margin
