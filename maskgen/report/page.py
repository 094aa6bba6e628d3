"""Renders runs as one self-contained HTML page."""

import base64
import html
import io
import json
import pathlib
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from PIL import Image

from maskgen import config as config_lib
from maskgen import files
from maskgen.report import charts
from maskgen.report.runs import Run, Stage, read_table, to_text

COLOURS = 6  # as many as the page defines
MOST_PICTURES = 16  # of one name and run; more are thinned evenly
MOST_PIXELS = 1024  # of a picture's longer side; larger ones are reduced
MOST_CELLS = 10_000  # of a table; of a larger one only the file is named
# Metrics that describe how a run goes rather than what it learns.
_DETAILS = ("train/norm/", "train/learning_rate/", "timing/", "data/", "input_wait")
_TEMPLATE = string.Template((pathlib.Path(__file__).parent / "page.html").read_text())


def render(runs: Sequence[Run]) -> str:
  """Returns the page."""
  title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
  names = dict.fromkeys(stage.name for run in runs for stage in run.stages)
  parts = [_header(runs, title), *(_stage(runs, name) for name in names), *map(_settings, runs)]
  return document(title, parts, len(runs))


def document(title: str, parts: Sequence[str], count: int) -> str:
  """Returns a page.

  Args:
    title: of the page.
    parts: HTML.
    count: the number of runs, each with a colour.
  """
  colours = "".join(
    f".run{i} {{ stroke: var(--run{i % COLOURS}); fill: var(--run{i % COLOURS}); }}\n" for i in range(count)
  )
  return _TEMPLATE.substitute(
    title=html.escape(title),
    body="\n".join(parts),
    colours=colours,
    width=charts.WIDTH,
    left=charts.LEFT,
    right=charts.RIGHT,
  )


def _header(runs: Sequence[Run], title: str) -> str:
  lines = [f"<h1>{html.escape(title)}</h1>"]
  if len(runs) == 1:
    lines.append(f'<p class="soft">{html.escape(_facts(runs[0]))}</p>')
  else:
    items = "".join(
      f'<li style="--colour: var(--run{i % COLOURS})">{i + 1}: {html.escape(run.name)} '
      f'<span class="soft">{html.escape(_facts(run))}</span></li>'
      for i, run in enumerate(runs)
    )
    lines.append(f'<ul class="legend">{items}</ul>')
  return "\n".join(lines)


def _facts(run: Run) -> str:
  """Where and for how long a run ran, and how far it came."""
  facts = [f"maskgen {run.config['version']}"] if "version" in run.config else []
  if "device" in run.facts:
    facts.append(str(run.facts["device"]))
  if "wall_seconds" in run.facts:
    facts.append(f"{run.facts['wall_seconds'] / 60:.1f} minutes")
  for stage in run.stages:
    total = stage.config.get("total_steps")
    of = f" of {total:,}" if total and not stage.results else ""
    facts.append(f"{stage.name} step {stage.step:,}{of}".strip())
  return ", ".join(facts)


def _stage(runs: Sequence[Run], name: str) -> str:
  stages = {i: stage for i, run in enumerate(runs) for stage in run.stages if stage.name == name}
  keys = dict.fromkeys(key for stage in stages.values() for key in stage.curves)
  evaluated = sorted(key for key in keys if not key.startswith(("train/", *_DETAILS)))
  trained = sorted(key for key in keys if key.startswith("train/") and not key.startswith(_DETAILS))
  details = sorted(key for key in keys if key.startswith(_DETAILS))

  def draw(chosen: Iterable[str]) -> str:
    drawn = "".join(
      charts.chart(key, {i: stage.curves[key] for i, stage in stages.items() if key in stage.curves})
      for key in chosen
    )
    return f'<div class="charts">{drawn}</div>'

  lines = [f"<h2>{html.escape(name)}</h2>" if name else ""]
  lines += [_pictures(stages), _results(stages), _tables(stages)]
  lines += ["<h3>Evaluations</h3>", draw(evaluated)] if evaluated else []
  lines += ["<h3>Training</h3>", draw(trained)] if trained else []
  lines += [_folded("speed, learning rates and norms", draw(details))] if details else []
  return "\n".join(lines)


def _results(stages: Mapping[int, Stage]) -> str:
  """The final value of every evaluation, a column for each run."""
  keys = sorted({key for stage in stages.values() for key in stage.results})
  if not keys:
    return ""
  head = "".join(f"<th>run {i + 1}</th>" for i in stages) if len(stages) > 1 else "<th>final value</th>"
  rows = "".join(
    f"<tr><th>{html.escape(key)}</th>"
    + "".join(f"<td>{_cell(stage.results.get(key))}</td>" for stage in stages.values())
    + "</tr>"
    for key in keys
  )
  return f"<h3>Results</h3>{table(f'<th></th>{head}', rows)}"


def table(head: str, rows: str) -> str:
  """A table, as wide as it needs, of cells in HTML."""
  return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _tables(stages: Mapping[int, Stage]) -> str:
  """The newest of each table of the evaluations, folded, those of all runs below each other."""
  lines = []
  for name in sorted({name for stage in stages.values() for name in stage.tables}):
    for i, stage in stages.items():
      if name in stage.tables:
        step, file = stage.tables[name][-1]
        title = f"{name} at step {step}" if len(stages) == 1 else f"run {i + 1}: {name} at step {step}"
        lines.append(_folded(title, _rows(file)))
  return "".join(lines)


def _rows(file: epath.Path) -> str:
  head, *rows = read_table(file)
  if len(head) * len(rows) > MOST_CELLS:
    return f"<p>too large for this page: {html.escape(file.name)} in the samples of the run</p>"
  return table(
    "".join(f"<th>{html.escape(cell)}</th>" for cell in head),
    "".join(
      f"<tr><th>{html.escape(first)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in rest)}</tr>"
      for first, *rest in rows
    ),
  )


def _cell(value: Any) -> str:
  return charts.number(value) if isinstance(value, int | float) else html.escape(str(value or "n/a"))


def _pictures(stages: Mapping[int, Stage]) -> str:
  """Each picture with a slider over training steps, the runs side by side."""
  names = dict.fromkeys(name for stage in stages.values() for name in stage.pictures)
  if not names:
    return ""
  figures = []
  for name in sorted(names):
    for i, stage in stages.items():
      if name in stage.pictures:
        title = name if len(stages) == 1 else f"run {i + 1}: {name}"
        figures.append(_slider(title, evenly(stage.pictures[name], MOST_PICTURES)))
  return f'<h3>Pictures</h3><div class="pictures">{"".join(figures)}</div>'


def _slider(title: str, pictures: Sequence[tuple[int, epath.Path]]) -> str:
  last = len(pictures) - 1
  images = "".join(
    f'<img{" class=shown" if i == last else ""} data-step="{step}" alt="{html.escape(title)} at step {step}" '
    f'src="data:image/png;base64,{_encode(file)}">'
    for i, (step, file) in enumerate(pictures)
  )
  slider = ""
  if last:
    slider = (
      f'<input type="range" min="0" max="{last}" value="{last}" aria-label="step of {html.escape(title)}">'
    )
  caption = f'{html.escape(title)} <span class="soft">at step <output>{pictures[-1][0]}</output></span>'
  return f"<figure><figcaption>{caption}</figcaption>{images}{slider}</figure>"


def _encode(file: epath.Path) -> str:
  """A PNG file as base64, reduced if it is large."""
  data = file.read_bytes()
  try:
    with Image.open(io.BytesIO(data)) as image:
      if max(image.size) > MOST_PIXELS:
        image.thumbnail((MOST_PIXELS, MOST_PIXELS))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        data = buffer.getvalue()
  except OSError as error:
    raise files.damaged(file, "it is no whole picture", "remove it") from error
  return base64.b64encode(data).decode()


def evenly(items: Sequence[Any], most: int) -> list[Any]:
  """At most `most` items at even distances, with the first and the last."""
  if len(items) <= most:
    return list(items)
  return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _settings(run: Run) -> str:
  """The command, the config and where it differs from the config file, and the receipts of the results."""
  lines = [f"<h2>{html.escape(run.name)}</h2>"]
  if command := run.config.get("command"):
    lines.append(f"<p>Started by</p><pre>{html.escape(command)}</pre>")
  if changed := run.config.get("overridden"):
    lines.append("<p>Different from the config file</p>")
    lines.append(_list({key: " → ".join(map(_text, values)) for key, values in changed.items()}))
  config = config_lib.without_origin(run.config)
  lines.append(_folded("config", f"<pre>{html.escape(to_text(config))}</pre>"))
  for stage in run.stages:
    if stage.receipt:
      lines.append(_folded(f"receipt of {stage.name or 'the results'}", _receipt(stage.receipt)))
  return "\n".join(lines)


def _receipt(receipt: Mapping[str, Any]) -> str:
  """What the results were computed from; the config is shown already."""

  def flat(value: Any, name: str) -> dict[str, str]:
    if isinstance(value, Mapping) and value:
      found: dict[str, str] = {}
      for key, inner in value.items():
        found |= flat(inner, f"{name}.{key}".lstrip("."))
      return found
    return {name: _text(value)}

  parts = {key: value for key, value in receipt.items() if key not in ("config", "evaluations")}
  return _list(flat({**receipt.get("evaluations", {}), **parts}, ""))


def _list(facts: Mapping[str, str]) -> str:
  rows = "".join(
    f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in facts.items()
  )
  return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _text(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value)


def _folded(title: str, content: str) -> str:
  return f"<details><summary>{html.escape(title)}</summary>{content}</details>"
