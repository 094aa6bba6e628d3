"""Curves as SVG, with the colours and type of the page."""

import html
import itertools
import json
import math
from collections.abc import Callable, Mapping

from maskgen.report.runs import Points

Scale = Callable[[float], float]

MOST_POINTS = 400  # of a curve; longer ones are thinned
WIDTH, HEIGHT = 300, 160
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 22


def thin(points: Points, most: int = MOST_POINTS) -> Points:
  """Keeps the first and last points, and the lowest and highest of equal parts, at most about `most`."""
  if len(points) <= most:
    return points
  parts = most // 2
  kept = {points[0], points[-1]}
  for i in range(parts):
    part = points[i * len(points) // parts : (i + 1) * len(points) // parts]
    kept |= {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
  return sorted(kept)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
  """Round numbers within a range, about `count` of them."""
  if high <= low:
    return [low]
  rough = (high - low) / count
  size = 10.0 ** math.floor(math.log10(rough))
  step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
  first = math.ceil(low / step)
  return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(name: str, series: Mapping[int, Points]) -> str:
  """One metric of several runs as a figure.

  Args:
    name: of the metric.
    series: its points by the number of the run, which chooses the colour.
  """
  finite = {run: [p for p in points if math.isfinite(p[1])] for run, points in series.items()}
  kept = {run: thin(points) for run, points in finite.items() if points}
  if not kept:
    return ""
  every = list(itertools.chain(*kept.values()))
  end = max(step for step, _ in every) or 1
  x = scale(0.0, end, LEFT, WIDTH - RIGHT)
  low, high = min(value for _, value in every), max(value for _, value in every)
  margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
  y = scale(low - margin, high + margin, HEIGHT - BOTTOM, TOP)
  grid = "".join(
    f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
    f'<text x="{LEFT - 5}" y="{y(t) + 3.5:.1f}" text-anchor="end">{_short(t)}</text>'
    for t in ticks(low - margin, high + margin)
  )
  grid += "".join(
    f'<text x="{x(t):.1f}" y="{HEIGHT - 7}" text-anchor="{"end" if x(t) > WIDTH - 2 * RIGHT else "middle"}">'
    f"{_short(t)}</text>"
    for t in ticks(0.0, end)
    if t
  )
  lines = "".join(_line(run, points, x, y) for run, points in kept.items())
  data = json.dumps({run: [[step, float(f"{v:.5g}")] for step, v in points] for run, points in kept.items()})
  last = ", ".join(number(points[-1][1]) for points in kept.values())
  return (
    f'<figure class="chart"><figcaption>{html.escape(name)} <b>{last}</b></figcaption>'
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(name)}, last {last}" '
    f"data-points='{data}' data-end=\"{end}\">"
    f'<g class="grid">{grid}</g>{lines}'
    f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg></figure>'
  )


def number(value: float) -> str:
  """A value with four digits."""
  return f"{value:.4g}"


def _line(run: int, points: Points, x: Scale, y: Scale) -> str:
  places = [(x(step), y(value)) for step, value in points]
  path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
  # A short curve has marks, and a single point is nothing else.
  marks = (
    "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.2"/>' for a, b in places) if len(places) < 12 else ""
  )
  return f'<g class="run{run}"><polyline points="{path}"/>{marks}</g>'


def scale(low: float, high: float, start: float, end: float) -> Scale:
  """The linear map from a range of values to one of places."""
  return lambda value: start + (value - low) / (high - low) * (end - start)


def _short(value: float) -> str:
  for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= size:
      return f"{value / size:.4g}{unit}"
  return f"{value:.4g}"
