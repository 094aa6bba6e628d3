"""The page about runs: everything in it, nothing beside it, small whatever the length of the run."""

import html.parser
import json
import re

import numpy as np
import pytest
from etils import epath

from maskgen import images, report
from maskgen.errors import UserError
from maskgen.report import charts, page, runs
from maskgen.tools import report as tool

STEPS = 3000


class Page(html.parser.HTMLParser):
  """The tags of a page, with their attributes; elements must be closed in order."""

  VOID = frozenset(("meta", "img", "input", "line", "polyline", "circle"))

  def __init__(self, text: str):
    super().__init__()
    self.tags: list[tuple[str, dict]] = []
    self.open: list[str] = []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    if tag not in self.VOID:
      assert self.open.pop() == tag

  def find(self, wanted: str) -> list[dict]:
    return [attributes for tag, attributes in self.tags if tag == wanted]


def make_run(folder, name: str, steps: int = STEPS, finished: bool = True) -> epath.Path:
  """A workdir of two stages, the second with pictures, as the loop writes it."""
  root = epath.Path(folder) / name
  stage = {"total_steps": steps, "objective": {"name": "<b>"}}
  config = {
    "stages": ["one", "two"],
    "one": stage,
    "two": stage,
    "version": "0.1.0",
    "command": "python -m x",
    "overridden": {"one.total_steps": [7, steps], "one.evals.<fid>.type": [None, "generation"]},
  }
  for number in ("one", "two"):
    (root / number / "samples").mkdir(parents=True)
    lines = [
      {"step": i, "train/loss/main": 1 / i, "timing/steps_per_second": 2.0} for i in range(1, steps + 1)
    ]
    lines.append({"step": steps, "probe/top1": 0.5, "probe/odd": float("nan")})
    (root / number / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
      (root / number / "results.json").write_text(json.dumps({"probe/top1": 0.5}))
      receipt = {
        "evaluations": {"probe": {"numbers": {"top1": 0.5}}},
        "model": {"weights": "ab<c"},
        "config": 7,
      }
      (root / number / "receipts.json").write_text(json.dumps(receipt))
  for step in range(100):
    images.write_png(root / "two/samples" / f"grid_{step:07d}.png", np.full((8, 8, 3), step, np.uint8))
  for step, count in ((10, 1), (20, 2)):
    table = "class,accuracy\n" + '"a, <b>",0.5\n' * count
    (root / "two/samples" / f"classes_{step:07d}.csv").write_text(table)
  images.write_png(root / "two/samples" / "large_0000001.png", np.zeros((2000, 10, 3), np.uint8))
  (root / "config.json").write_text(json.dumps(config))
  if finished:
    (root / "results.json").write_text(json.dumps({"run": {"device": "2 x cpu", "wall_seconds": 60.0}}))
  return root


def test_a_page_is_whole_and_thin(tmp_path):
  root = make_run(tmp_path, "run")
  report.write(root / report.REPORT, [root])
  text = (root / report.REPORT).read_text()
  found = Page(text)
  assert not [tag for tag in found.tags if "src" in tag[1] and not tag[1]["src"].startswith("data:")]
  assert "http" not in text.replace("http-equiv", "") and not found.find("link")
  steps = [int(image["data-step"]) for image in found.find("img") if image["alt"].startswith("grid")]
  assert len(steps) == page.MOST_PICTURES and steps[0] == 0 and steps[-1] == 99
  curves = [json.loads(svg["data-points"])["0"] for svg in found.find("svg")]
  assert max(map(len, curves)) <= charts.MOST_POINTS + 2
  loss = max(curves, key=len)
  assert loss[0] == [1, 1.0] and loss[-1][0] == STEPS
  assert "&lt;b&gt;" in text and "<b>&" not in text and "python -m x" in text and "2 x cpu" in text
  assert "probe/top1</th><td>0.5</td>" in text
  assert f"<th>one.total_steps</th><td>7 → {STEPS}</td>" in text and "&quot;overridden&quot;" not in text
  assert "<th>one.evals.&lt;fid&gt;.type</th><td>null → generation</td>" in text
  assert "classes at step 20</summary>" in text and "classes at step 10<" not in text
  assert text.count("<tr><th>a, &lt;b&gt;</th><td>0.5</td></tr>") == 2
  assert text.count("<summary>receipt of ") == 2 and "probe.numbers.top1</th><td>0.5<" in text
  assert "ab&lt;c" in text
  assert len(text) < 400_000
  (root / "two/samples/classes_0000030.csv").write_text("a,b\n" + "1,2\n" * page.MOST_CELLS)
  assert "<p>too large for this page: classes_0000030.csv" in page.render([runs.read(root)])


def test_several_runs_are_side_by_side(tmp_path, capsys):
  """Also an unfinished one, one with other stages, and pictures that only one of them has."""
  roots = [make_run(tmp_path, "first", 20), make_run(tmp_path, "second", 10, finished=False)]
  (roots[1] / "two/metrics.jsonl").unlink()
  out = tmp_path / "both.html"
  tool.main(["--workdir", *map(str, roots), f"--out={out}"])
  text = out.read_text()
  assert re.search("step 10 of 10", text) and str(roots[0]) in text
  both = [json.loads(svg["data-points"]) for svg in Page(text).find("svg")]
  assert sorted({len(points) for points in both}) == [1, 2]
  assert capsys.readouterr().out == f"wrote {out}\n"


def test_a_run_that_has_just_begun(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  report.write(tmp_path / "page.html", [tmp_path])
  Page((tmp_path / "page.html").read_text())


@pytest.mark.parametrize("count", [3, 400, 401, 100_000])
def test_thinning_keeps_ends_and_extremes(count):
  rng = np.random.default_rng(count)
  points = list(enumerate(rng.normal(size=count).tolist()))
  kept = charts.thin(points)
  assert len(kept) <= charts.MOST_POINTS + 2 and kept == sorted(kept) and set(kept) <= set(points)
  for extreme in (min, max):
    assert extreme(points, key=lambda p: p[1]) in kept and extreme(points) in kept


@pytest.mark.parametrize("low, high", [(0, 1), (-3.7, 12), (1e-9, 2e-9), (999, 1001), (0, 500_000)])
def test_ticks_are_round_and_inside(low, high):
  found = charts.ticks(low, high)
  assert 2 <= len(found) <= 6 and low <= min(found) and max(found) <= high * (1 + 1e-9)
  digits = {re.sub("0*(e.*)?$", "", f"{tick:.9e}".replace(".", "")) for tick in found if tick}
  assert max(map(len, digits)) <= 5


def test_what_is_no_run(tmp_path):
  for arguments, message in (
    ([f"--workdir={tmp_path}"], r"holds no run \(no config.json\): give the --workdir of one"),
    ([f"--workdir={tmp_path}", "--out=page.txt"], "give the name of a .html file"),
  ):
    with pytest.raises(UserError, match=message):
      tool.main(arguments)
  (tmp_path / "config.json").write_text("[]")
  with pytest.raises(UserError, match=r"config\.json is damaged"):
    tool.main([f"--workdir={tmp_path}"])
  root = make_run(tmp_path, "run", steps=10)
  (root / "two/samples/grid_0000099.png").write_bytes(b"")
  with pytest.raises(UserError, match=r"grid_0000099\.png is damaged .*: remove it"):
    tool.main([f"--workdir={root}"])
  (root / "two/samples/grid_0000099.png").unlink()
  for content in (b"\xff", b""):
    (root / "two/samples/classes_0000020.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"classes_0000020\.csv is damaged .*: remove it"):
      tool.main([f"--workdir={root}"])
