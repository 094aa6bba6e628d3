"""A comparison of two objectives: its checks, its runs, its table, picture and page."""

import contextlib
import json
import re
import shutil
import types

import pytest
import test_report
from etils import epath

from maskgen import config as config_lib
from maskgen import objectives
from maskgen.errors import UserError
from maskgen.report import comparison
from maskgen.report import runs as report_runs
from maskgen.tools import compare

FLAGS = ("--config=configs/arena.py:debug", "--data=synthetic", "--budget=1.5e8")


def run(out, *flags, objectives="mae"):
  compare.main([*FLAGS, f"--objectives={objectives}", f"--out={out}", *flags])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
  """A comparison of a single objective, which needs no tokenizer."""
  out = epath.Path(tmp_path_factory.mktemp("compared"))
  run(out)
  return out


@pytest.fixture
def copied(compared, tmp_path):
  """Its folder, to be changed, and its plan."""
  out = epath.Path(shutil.copytree(compared, tmp_path / "copied"))
  return out, json.loads((out / "plan.json").read_text())


def read_rows(out):
  table = json.loads((out / "comparison.json").read_text())
  for row in table["rows"]:
    assert row["steps"] * row["flops"] == pytest.approx(table["plan"]["flops"], rel=0.02)
    for run in row["runs"]:
      config = json.loads((out / run / "config.json").read_text())
      assert config["total_steps"] == row["steps"] and config["data"]["source"] == "synthetic"
    results = [json.loads((out / run / "results.json").read_text()) for run in row["runs"]]
    for metric, curve in row["curves"].items():
      assert curve["the end"] == [numbers[metric] for numbers in results]
    assert comparison.RANDOM in row["floors"]
  return {row["name"]: row for row in table["rows"]}


def test_a_run_has_the_operations_of_the_budget_and_what_to_compare_with(compared):
  (row,) = read_rows(compared).values()
  assert row["name"] == "mae" and row["distance"] == "" and set(row["curves"]) == {comparison.PROBE}
  floors = {key.removeprefix(f"{comparison.PROBE}_") for key in row["floors"]}
  assert floors == {"random_encoder", "pixels", "patch_clusters"}
  assert [
    step for step, _ in report_runs.read(compared / "mae/seed_0").stages[0].curves[comparison.PROBE]
  ] == [
    max(row["steps"] // 10, 1),
    *(part * -(-row["steps"] // 3) for part in (1, 2)),
    row["steps"],
  ]
  assert (compared / "comparison.svg").read_text().count("<circle") == 1
  page = test_report.Page((compared / "report.html").read_text())
  assert [link["href"] for link in page.find("a")] == ["mae/seed_0/report.html"]


@pytest.mark.slow
def test_objectives_on_codes_share_a_tokenizer(tmp_path):
  out = epath.Path(tmp_path)
  run(out, "--budget=1.5e9", objectives="mae,mage")
  rows = read_rows(out)
  assert (out / "tokenizer/results.json").exists() and set(rows) == {"mae", "mage"}
  assert rows["mage"]["distance"] in rows["mage"]["curves"]
  floors = {key.removeprefix(f"{comparison.PROBE}_") for key in rows["mage"]["floors"]}
  assert {"pixels", "patch_clusters", "token_histogram", "token_onehot", "code_vectors"} <= floors
  lines = [line for line in (out / "comparison.md").read_text().splitlines() if line.startswith("| ma")]
  assert sorted("| - |" in line for line in lines) == [False, True]


def test_a_finished_comparison_trains_nothing_again(compared, monkeypatch):
  monkeypatch.setattr(compare.main_lib, "main", lambda flags: pytest.fail("trained again"))
  before = (compared / "comparison.json").read_text()
  run(compared)
  assert (compared / "comparison.json").read_text() == before


def test_what_is_active_elsewhere_is_left_out(copied, monkeypatch, caplog):
  """Three more seeds: another process trains the first, and begins the third when this one is about to."""
  out, _ = copied
  trained = []

  def train(flags):
    workdir = epath.Path(flags[1].removeprefix("--workdir="))
    trained.append((workdir.name, flags[0]))
    if workdir.name == "seed_3":
      with compare.lock.hold(workdir), compare.lock.hold(workdir):
        pass
    shutil.copytree(out / "mae/seed_0", workdir, dirs_exist_ok=True)

  monkeypatch.setattr(compare.main_lib, "main", train)
  (out / "mae/seed_1").mkdir()
  with compare.lock.hold(out / "mae/seed_1"), caplog.at_level("INFO"):
    run(out, "--seeds=4")
  (name, config), (taken, _) = trained
  assert name == "seed_2" and "seed=2" in config and "floors" not in config
  assert taken == "seed_3" and "2 runs left" in caplog.text


@pytest.fixture
def on_codes(compared, copied, monkeypatch):
  """A comparison with objectives on codes and latents, whose runs stop, and the flags of what it runs."""
  out, plan = copied
  entry = plan["entries"]["mae"]
  with_codes = entry | dict(on_codes=True, distance="generation/frechet_pixels")
  plan["entries"] |= {"lmd": entry | dict(on_codes=True), "mage": with_codes, "tokenizer": entry}
  (out / "plan.json").write_text(json.dumps(plan))
  begun = []

  def train(flags):
    begun.append(flags)
    if (workdir := epath.Path(flags[1].removeprefix("--workdir="))).parent.name not in ("mage", "lmd"):
      shutil.copytree(compared / "mae/seed_0", workdir, dirs_exist_ok=True)

  monkeypatch.setattr(compare.main_lib, "main", train)
  return out, begun


def test_an_interrupted_run_on_codes_continues_with_a_relative_path(on_codes, monkeypatch):
  out, begun = on_codes
  monkeypatch.chdir(out.parent)
  for _ in range(2):  # the tokenizer exists the second time
    run(out.name, objectives="mage")
  tokenizer, first, second = begun
  assert tokenizer[1] == f"--workdir={out / 'tokenizer'}" and first == second
  assert f"tokenizer={out / 'tokenizer'}," in first[0]


@pytest.mark.parametrize(("name", "key"), [("mage", "tokenizer"), ("lmd", "autoencoder")])
def test_an_interrupted_run_continues_in_a_folder_that_was_moved(on_codes, name, key):
  out, begun = on_codes
  config = {"seed": 0, "pretrained": {key: "/before/tokenizer", "teacher": "/another"}}
  (out / name / "seed_0").mkdir(parents=True)
  (out / name / "seed_0/config.json").write_text(json.dumps(config))
  run(out, objectives=name)
  config["pretrained"][key] = str(out / "tokenizer")
  assert json.loads((out / name / "seed_0/config.json").read_text()) == config and len(begun) == 2


def test_a_tokenizer_that_was_given_is_not_renamed(on_codes):
  out, begun = on_codes
  plan = json.loads((out / "plan.json").read_text())
  del plan["entries"]["tokenizer"]
  plan["overrides"] = {"pretrained.tokenizer": "/given"}
  (out / "plan.json").write_text(json.dumps(plan))
  (out / "mage/seed_0").mkdir(parents=True)
  (out / "mage/seed_0/config.json").write_text(text := json.dumps({"pretrained": {"tokenizer": "/given"}}))
  run(out, "--config.pretrained.tokenizer=/given", objectives="mage")
  assert (out / "mage/seed_0/config.json").read_text() == text and len(begun) == 1


def test_runs_measure_the_same_floors_when_objectives_are_added(on_codes):
  out, begun = on_codes
  shutil.rmtree(out / "mae/seed_0")
  run(out, objectives="mae,mage")
  floors = {epath.Path(workdir).parent.name: "floors=True" in config for config, workdir in begun[1:]}
  assert floors == {"mae": True, "mage": True}


def test_a_plan_that_another_process_writes_meanwhile_is_adopted(compared, tmp_path, monkeypatch):
  """That process also holds the folder for a while."""
  out = epath.Path(tmp_path / "new")

  def enter(*_):
    shutil.copytree(compared, out)
    other.enter_context(compare.lock.hold(out))
    return compare.Entry(flops=1, steps=1, reads="", on_codes=False, distance="")

  monkeypatch.setattr(compare.Comparison, "_enter", enter)
  monkeypatch.setattr(compare.main_lib, "main", lambda flags: pytest.fail("trained again"))
  with contextlib.ExitStack() as other:
    monkeypatch.setattr(compare, "time", types.SimpleNamespace(sleep=lambda seconds: other.close()))
    run(out)
  assert (out / "plan.json").read_text() == (compared / "plan.json").read_text()


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--budget=4e8", "compares with budget 1.5e8, not 4e8: give another --out"),
    ("--tokenizer=runs/other", "compares with tokenizer .*, not .*runs/other"),
    ("--trials=2", "compares with trials 0, not 2"),
    ("--data=digits", "compares with data synthetic, not digits"),
  ],
)
def test_a_folder_has_one_comparison(compared, flag, message):
  with pytest.raises(UserError, match=message):
    run(compared, flag)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--budget=1e6"], r"mae: --budget=1e6 is \d+ steps? of a run, too few to evaluate at a tenth of them"),
    (["--tokenizer=nothing", "--objectives=mage"], "mage: config.pretrained.tokenizer=.*nothing"),
    (["--objectives=siglip"], "siglip: config.data: tokenize .* needs 'caption', but the data has only"),
  ],
)
def test_what_does_not_fit_is_refused_before_any_run(tmp_path, flags, message):
  with pytest.raises(UserError, match=message):
    run(tmp_path / "new", *flags)
  assert not list((tmp_path / "new").glob("*/checkpoints"))


@pytest.mark.parametrize(
  ("name", "taught"),
  [
    *(("masked_pixels", False), ("dmjd", False), ("selfie", False), ("umd", False)),
    *(("mr_mae", True), ("mask_align", True)),
  ],
)
def test_objectives_without_codes_have_the_common_encoder(compared, name, taught):
  teacher = compared / "mae/seed_0"
  config = config_lib.load(f"configs/arena.py:objective={name},teacher={teacher},debug")
  encoder = config.objective.encoder
  assert (encoder.width, encoder.depth, encoder.image_size, encoder.patch) == (16, 1, (16, 16), 4)
  assert dict(config.pretrained) == ({"teacher": str(teacher)} if taught else {})
  assert ("generation" in config.evals) == (name == "umd")


def test_an_objective_on_latents_has_those_of_the_tokenizer():
  config = config_lib.load("configs/arena.py:objective=lmd,tokenizer=runs/mine,steps=90,debug")
  assert dict(config.pretrained) == {"autoencoder": "runs/mine"} and config.objective.rise_steps == 60
  mage = config_lib.load("configs/arena.py:objective=mage,debug")
  assert config.objective.autoencoder.tokenizer == mage.objective.tokenizer
  objective, codes = (objectives.build(config_lib.to_dict(one.objective)) for one in (config, mage))
  assert objective.encoder.grid == codes.grid


def test_pictures_are_compared_in_the_space_that_is_asked_for():
  space = "features=mobilenet_v2:weights.npz,reference=photos.npz"
  compared = config_lib.load(f"configs/arena.py:objective=mage,{space},debug").evals.generation
  assert (compared.features, compared.reference) == ("mobilenet_v2:weights.npz", "photos.npz")


def test_models_of_different_tokenizers_are_not_compared(copied):
  out, plan = copied
  shutil.copytree(out / "mae/seed_0", out / "mae/seed_1")
  for seed in (0, 1):
    path = out / f"mae/seed_{seed}/receipts.json"
    receipt = json.loads(path.read_text())
    receipt["model"]["frozen"]["tokenizer"] = f"tokenizer {seed}"
    path.write_text(json.dumps(receipt))
  with pytest.raises(UserError, match="have different tokenizers"):
    comparison.read(out, plan)


def test_intervals_are_those_of_means_over_seeds(copied):
  out, plan = copied
  path = out / "mae/seed_1/metrics.jsonl"
  shutil.copytree(out / "mae/seed_0", path.parent)
  changed = [json.loads(line) for line in path.read_text().splitlines()]
  for line in changed:
    line.update({comparison.PROBE: 0.9} if comparison.PROBE in line else {})
  path.write_text("".join(json.dumps(line) + "\n" for line in changed))
  (row,) = comparison.read(out, plan)
  one, other = row["curves"][comparison.PROBE]["the end"]
  assert other == 0.9
  # 12.7062 is Student's quantile for two values.
  text = f"{50 * (one + other):.1f} ± {100 * 12.7062 * abs(other - one) / 2:.1f}%"
  assert any(text in line for line in comparison.markdown(plan, [row]))
  assert comparison.draw([row]).count('class="bar"') == 1


def test_the_picture_has_a_column_for_what_generates_nothing():
  curves = {comparison.PROBE: {"the end": [0.3, 0.4]}}
  mage = dict(name="mage", distance="d", curves=curves | {"d": {"the end": [1.0, 2.0]}}, floors={}, speed=9.0)
  mae = dict(name="mae", distance="", curves=curves, floors={f"{comparison.PROBE}_pixels": 0.2}, speed=36.0)
  picture = comparison.draw([mage, mae])
  assert picture.count('class="bar"') == 3 and picture.count('class="floor"') == 1
  circles = re.findall(r'<circle cx="([\d.]+)"[^>]* r="([\d.]+)"', picture)
  places = [(float(x), float(r)) for x, r in circles]
  (left, small), (right, large) = places
  assert left < right and large == pytest.approx(2 * small, rel=0.02)  # areas are as speeds
