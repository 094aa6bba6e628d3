"""Receipts: results are computed again from them, and what was tampered with or mixed up is refused."""

import contextlib
import csv
import functools
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from maskgen import evaluators, files, main, plugins
from maskgen.data import emoji
from maskgen.errors import UserError
from maskgen.evaluators import feature_spaces, receipts, statistics_files
from maskgen.models.vilex import ImageWordsSampling
from maskgen.numerics.text import Captions
from maskgen.tools import evaluate, reference_stats, verify
from maskgen.training import evaluation, experiment

trained = tiny.trained

SIDE, COUNT = 16, 40
PREPROCESS = "decode|resize(16)"
RESULT, RECEIPT, CONFIG = "results.json", "receipts.json", "config.json"
GENERATED, REAL = (
  np.random.default_rng(0).integers(high, size=(COUNT, SIDE, SIDE, 3), dtype=np.uint8) for high in (200, 256)
)


@pytest.fixture(autouse=True)
def cached(monkeypatch):
  """Builds each experiment once, and reads each model once."""
  monkeypatch.setattr(experiment, "Experiment", lambda config: _experiment(json.dumps(config)))
  monkeypatch.setattr(evaluation, "load", lambda made, path: _load(made, str(path)))


_whole, _read = experiment.Experiment, evaluation.load


@functools.cache
def _experiment(config):
  return _whole(json.loads(config))


@functools.cache
def _load(made, path):
  return _read(made, path)


def change(path, values):
  """Sets values of a JSON file by keys with "|" between, or removes them (None)."""
  whole = json.loads(path.read_text())
  for name, value in values.items():
    *outer, last = name.split("|")
    part = functools.reduce(lambda found, key: found[key], outer, whole)
    if value is None:
      del part[last]
    else:
      part[last] = value
  path.write_text(json.dumps(whole))


# Runs


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
  """The receipt of `--mode=eval` with a distance, a probe and reconstructions."""
  folder = tmp_path_factory.mktemp("evaluated")
  section = "--config.mage.evals.generation"
  main.main(
    [
      f"--config={tiny.FILE}",
      "--mode=eval",
      f"--checkpoint={trained / 'mage'}",
      f"--workdir={folder}",
      *(f"{section}.{option}" for option in ("type=generation", "every_steps=1", "num_images=24", "seed=3")),
    ]
  )
  return folder


@pytest.fixture
def run(trained, tmp_path):
  """A copy of the finished run."""
  for name in ("config.json", "results.json", "mage/config.json", "mage/results.json", "mage/receipts.json"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy(trained / name, tmp_path / name)
  for name in ("checkpoints", "frozen"):
    (tmp_path / "mage" / name).symlink_to(trained / "mage" / name)
  return tmp_path / "mage"


def test_a_run_is_computed_again(trained, evaluated, capsys):
  change(evaluated / RECEIPT, {"command": f"touch {evaluated}/executed"})
  verify.main([str(trained)])
  verify.main([str(trained / "mage" / "results.json")])
  verify.main([str(evaluated)])
  said = capsys.readouterr().out.splitlines()
  assert len(said) == 4 and all(line.endswith("are equal in every bit") for line in said)
  assert "tokenizer/receipts.json: 5 numbers" in said[0]
  versions = statistics_files.versions() | {"jax": "0.1"}  # as of a row of a sweep that was continued
  change(evaluated / RECEIPT, {"evaluations|generation|versions": versions})
  verify.main([str(evaluated)])
  assert re.search("are equal to 1e-06, with jax 0.1 instead of [^,]*$", capsys.readouterr().out)
  change(evaluated / RECEIPT, {"evaluations|generation|versions": None})
  found = json.loads((evaluated / RECEIPT).read_text())
  assert not (evaluated / "executed").exists() and not (evaluated / "results.json").exists()
  assert found["evaluations"]["generation"]["samples_per_dimension"] == 24 / 192
  assert found["evaluations"]["generation"]["sampling"]["temperature"] == 4.0
  assert found["model"]["frozen"].keys() == {"tokenizer"} and found["model"]["averages"] == ["main"]


LOSS = "evaluations|validation|numbers|loss"
# What was done: changes of files by path, "|" between keys, None to remove; and what is said about it.
OF_RUNS = {
  "an edited number": (
    {RESULT: {"validation/loss": 1.0}},
    "results.json says that validation/loss is 1.0, but",
  ),
  "both edited": (
    {RESULT: {"validation/loss": 1.0}, RECEIPT: {LOSS: 1.0}},
    r"validation/loss is 1\.0, but 3\.\d+ when computed again",
  ),
  "a result too many": ({RESULT: {"fid50k": 2.0}}, "has fid50k, of which .* says nothing"),
  "a result too few": ({RESULT: {"validation/loss": None}}, "lacks validation/loss, which .* has"),
  "no model": ({RECEIPT: {"model": None}}, "lacks 'model.path', which a receipt has"),
  "no layout": ({RECEIPT: {"layout": None}}, "lacks 'layout'"),
  "no command": ({RECEIPT: {"command": None}}, "lacks 'command'"),
  "no numbers": ({RECEIPT: {"evaluations|validation|numbers": None}}, "validation lacks 'numbers'"),
  "no seed": ({RECEIPT: {"evaluations|samples|seed": None}}, "samples lacks 'seed'"),
  "an unknown fact": (
    {RECEIPT: {"evaluations|samples|best_of": 9}},
    "samples has 'best_of', which does not apply",
  ),
  "another resize": (
    {RECEIPT: {"config|data|eval_preprocess": "decode(3)|resize(20)|center_crop(16)"}},
    r"another config than config.json .*data\.eval_preprocess: .*resize\(20\)",
  ),
  "another resize everywhere": (
    {
      RECEIPT: {"config|data|eval_preprocess": "decode(3)|resize(20)|center_crop(16)"},
      CONFIG: {"data|eval_preprocess": "decode(3)|resize(20)|center_crop(16)"},
    },
    r"data: preprocess is decode\(3\)\|resize\(16\), but now",
  ),
  "other records": (
    {RECEIPT: {"data|training|fingerprint": "0"}},
    "data: training.fingerprint is 0, but now",
  ),
  "JPEGs": ({RECEIPT: {"data|evaluation|jpeg_decoding": "fast"}}, "data has 'evaluation.jpeg_decoding'"),
  "averages off": ({RECEIPT: {"model|averages": []}}, r"model: averages is \[\], but now \['main'\]"),
  "half precision": (
    {RECEIPT: {"model|precision|dtype": "bfloat16"}},
    "model: precision.dtype is bfloat16, but now",
  ),
  "another tokenizer": (
    {RECEIPT: {"model|frozen|tokenizer": "0" * 64}},
    r"model: frozen\.tokenizer is 0+\.\.\.",
  ),
  "another model": ({RECEIPT: {"model|weights": "0" * 64}}, r"model: weights is 0+\.\.\., but now"),
  "another step": ({RECEIPT: {"model|step": 4}}, "model: weights is"),
  "another seed": ({RECEIPT: {"evaluations|samples|seed": 1}}, "samples: seed is 1, but now 0"),
  "more steps": (
    {RECEIPT: {"evaluations|samples|sampling|steps": 9}},
    "samples: sampling.steps is 9, but now 3",
  ),
  "guidance": (
    {RECEIPT: {"evaluations|samples|sampling|guidance": 2.0}},
    "sampling.guidance is 2.0, but now 1.0",
  ),
}


@pytest.mark.parametrize("name", OF_RUNS)
def test_a_run_that_was_tampered_with_is_refused(name, run):
  changes, message = OF_RUNS[name]
  for file, values in changes.items():
    change(run / file, values)
  with pytest.raises(UserError, match=message) as error:
    verify.main([str(run)])
  assert "\n" not in str(error.value)


def test_receipts_of_other_results_are_refused(run, trained, evaluated, tmp_path):
  shutil.copy(trained / "tokenizer" / RECEIPT, run / RECEIPT)
  with pytest.raises(UserError, match=r"has validation/accuracy, of which .* says nothing"):
    verify.main([str(run)])
  shutil.copy(trained / "mage" / RECEIPT, run / RECEIPT)
  change(tmp_path / RESULT, {"mage|validation/loss": 1.0})
  with pytest.raises(UserError, match=r"/results\.json says that validation/loss is 1\.0, but"):
    verify.verify_run(*verify.stages(tmp_path).popitem())
  (run / RECEIPT).unlink()
  with pytest.raises(UserError, match=r"receipts\.json does not exist"):
    verify.main([str(run / RESULT)])
  change(tmp_path / RESULT, {"mage": None})
  with pytest.raises(UserError, match="lacks the stage 'mage'"):
    verify.main([str(tmp_path)])


@pytest.mark.parametrize(
  ("fact", "value", "message"),
  [
    ("num_images", 50_000, "generation: num_images is 50000, but now 24"),
    ("labels", "balanced", "generation: labels is balanced, but now unconditional"),
    ("networks|pixels|weights", "0" * 64, r"generation: networks\.pixels\.weights is 0+.*, but now ''"),
    ("reference", "the test split", "generation: reference is the test split, but now the training split"),
  ],
)
def test_an_evaluation_of_a_checkpoint_is_refused(fact, value, message, evaluated, tmp_path):
  shutil.copy(evaluated / RECEIPT, tmp_path / RECEIPT)
  change(tmp_path / RECEIPT, {f"evaluations|generation|{fact}": value})
  with pytest.raises(UserError, match=message):
    verify.main([str(tmp_path)])


# Feature networks


def test_every_evaluator_records_its_feature_networks():
  """Whichever option names one, by its documentation."""
  network = "model:digits"
  space = feature_spaces.open_space(network, None)
  known = emoji.load()
  captions = Captions(text_tokenizer=f"list:{' '.join(known.words)}", length=24)
  objective = tiny.FakeObjective(captions=captions, tokens=8, sampling=ImageWordsSampling())
  predict = dict.fromkeys(("encode", "generate", "reconstruct"))
  batch = {"image": jnp.zeros((4, 16, 16, 1), jnp.uint8), "valid": jnp.ones(4, bool)}
  context = evaluators.Context(objective, predict, lambda split: [batch], None, known.classes)
  opening = {}
  for kind in plugins.short_names("maskgen.evaluators", "Evaluator"):
    options = evaluators.find(kind, "here")
    for option, text in re.findall(r"(?m)^    (\w+): ((?:.|\n     )+)", options.__doc__):
      if "open_space" in text or "open_network" in text:
        opening[kind] = option
        given = network if isinstance(getattr(options, option), str) else ("drawing", network)
        evaluator = evaluators.build("it", {"type": kind, option: given}, context)
        recorded = receipts.of_evaluator(evaluator)["networks"]
        assert recorded["digits"] == {"protocol": "", "weights": space.weights}, kind
        assert len(space.weights) == 64 and len(recorded) == (1 if given == network else 2)
  assert opening == {"emoji": "spaces", "emoji_edits": "space", "generation": "features", "vilex": "features"}
  assert not context.networks


# Pictures of any program


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """Folders of generated and real pictures with their statistics, and what evaluate wrote about them."""
  folder = tmp_path_factory.mktemp("pictures")
  for name, images in (("generated", GENERATED), ("real", REAL)):
    write(folder / name, images)
  with (folder / "generated" / "labels.csv").open("w") as file:
    csv.writer(file).writerows([("file", "label"), *((f"{i:03}.png", i % 4) for i in range(COUNT))])
  described = {
    "sampling": {"steps": 8},
    "labels": {"rule": "balanced"},
    "captions": None,
    "count": COUNT,
    "seed": 1,
  }
  (folder / "generated" / files.MANIFEST).write_text(json.dumps(described))
  make_statistics(folder)
  compare(folder, folder / "real", "pictures.json", "--metrics=fid,recall")
  with contextlib.chdir(folder):
    compare(folder, "real.npz", "statistics.json", "--metrics=fid")
  return folder


def write(folder, images, suffix="png"):
  folder.mkdir(exist_ok=True)
  for i, image in enumerate(images):
    Image.fromarray(image).save(folder / f"{i:03}.{suffix}")


def make_statistics(folder, preprocess=PREPROCESS):
  flags = (
    f"--source=folder:{folder}/real",
    "--split=test",
    "--features=pixels",
    f"--preprocess={preprocess}",
  )
  reference_stats.main([*flags, f"--out={folder}/real.npz"])


def compare(folder, reference, out, *flags):
  flags = ("--features=pixels", "--labels=balanced", f"--json={folder / out}", *flags)
  evaluate.main([f"--generated={folder}/generated", f"--reference={reference}", *flags])


def save_references_as_jpeg(folder):
  shutil.rmtree(folder / "real")
  write(folder / "real", REAL, "jpg")


def replace_a_reference(folder):
  write(folder / "real", REAL[1:2])


def resize_references(folder):
  write(folder / "real", REAL.repeat(2, axis=1).repeat(2, axis=2))


def resize_all(folder):
  resize_references(folder)
  write(folder / "generated", GENERATED.repeat(2, axis=1).repeat(2, axis=2))


def label_unevenly(folder):
  path = folder / "generated" / "labels.csv"
  path.write_text(path.read_text().replace("000.png,0", "000.png,1"))


def remove_one(folder):
  (folder / "generated" / "039.png").unlink()


def make_other_statistics(folder):
  make_statistics(folder, "decode|center_crop(16)")


def use_other_weights(folder):
  statistics, manifest = statistics_files.read(str(folder / "real.npz"))
  other = {**vars(manifest), "weights": "1234"}
  statistics_files.write(str(folder / "real.npz"), statistics, statistics_files.Manifest(**other))


OF_PICTURES = [
  (save_references_as_jpeg, "pictures.json", "reference.formats is 40 PNG, but now 40 JPEG"),
  (replace_a_reference, "pictures.json", "reference.sha256 is"),
  (
    resize_references,
    "pictures.json",
    r"have \(16, 16\) .* pixels, but those of .* have \(32, 32\): resize them",
  ),
  (resize_all, "pictures.json", r"generated.size is \[16, 16\], but now \[32, 32\]"),
  (
    label_unevenly,
    "pictures.json",
    "--labels=balanced, but .* has 9 pictures of one class and 11 of another",
  ),
  (remove_one, "pictures.json", "has 39 of the 40 pictures of its manifest.json"),
  (make_other_statistics, "statistics.json", r"manifest.preprocess is .*resize\(16\), but now .*center_crop"),
  (use_other_weights, "statistics.json", "manifest.weights is '', but now 1234"),
  ({"metrics|frechet_pixels": 0.5}, "pictures.json", "frechet_pixels is 0.5, but .* when computed again"),
  ({"metrics|fid50k/adm": 0.5}, "pictures.json", "has fid50k/adm, which is not what its evaluation measures"),
  ({"weights": "0" * 64}, "pictures.json", r"weights is 0+\.\.\., but now ''"),
  ({"labels": "random"}, "pictures.json", "labels is random, but now balanced"),
  (
    {"arguments|labels": "random"},
    "pictures.json",
    "--labels=random, but .* was made with 'balanced' labels",
  ),
  ({"arguments|batch_size": None}, "pictures.json", "lacks 'arguments.batch_size'"),
  ({"arguments|command": "x"}, "pictures.json", "unrecognized arguments: --command=x"),
  ({"generated|count": 50_000}, "pictures.json", "generated.count is 50000, but now 40"),
  ({"generated|made_by|seed": 2}, "pictures.json", "generated.made_by.seed is 2, but now 1"),
  ({"samples_per_dimension": None}, "pictures.json", "lacks 'samples_per_dimension.generated'"),
  ({"versions": None}, "pictures.json", "lacks 'versions'"),
]


def test_pictures_are_compared_again(pictures, capsys):
  for name in ("pictures.json", "statistics.json"):
    verify.main([str(pictures / name)])
  assert capsys.readouterr().out.count("are equal in every bit") == 2
  found = json.loads((pictures / "statistics.json").read_text())
  assert found["samples_per_dimension"] == {"generated": COUNT / 192, "reference": COUNT // 10 / 192}


@pytest.mark.parametrize(("tampering", "name", "message"), OF_PICTURES)
def test_pictures_that_were_mixed_up_are_refused(tampering, name, message, pictures, tmp_path):
  """In a copy at the same place, which the receipt names."""
  shutil.copytree(pictures, tmp_path / "kept")
  try:
    if callable(tampering):
      tampering(pictures)
    else:
      change(pictures / name, tampering)
    with pytest.raises(UserError, match=message) as error:
      verify.main([str(pictures / name)])
    assert "\n" not in str(error.value)
  finally:
    shutil.rmtree(pictures)
    shutil.copytree(tmp_path / "kept", pictures)


def test_other_surroundings_allow_rounding():
  now = receipts.plain(receipts.surroundings(batch_size=8))
  assert receipts.elsewhere(now, now) == []
  before = {"layout": {**now["layout"], "devices": 1}, "versions": {**now["versions"], "jax": "0.1"}}
  reasons = receipts.elsewhere(before, now)
  assert reasons == ["devices 1 instead of 8", f"jax 0.1 instead of {now['versions']['jax']}"]
  receipts.check_numbers({"a": 1.0, "b": float("nan")}, {"a": 1.0 + 1e-7, "b": float("nan")}, reasons, "x")
  for other, allowed in ((1.0 + 1e-7, []), (1.0 + 1e-5, reasons)):
    with pytest.raises(UserError, match=r"x: a is 1.0, but 1.0000.* when computed again"):
      receipts.check_numbers({"a": 1.0}, {"a": other}, allowed, "x")
  with pytest.raises(UserError, match="x has b, which is not what its evaluation measures"):
    receipts.check_numbers({"a": 1.0, "b": 2.0}, {"a": 1.0}, reasons, "x")


def test_a_receipt_may_lack_numbers_that_are_measured_now(caplog):
  receipts.check_numbers({"a": 1.0}, {"a": 1.0, "c": 3.0, "b": 2.0}, [], "x")
  assert "x lacks b, c, which its evaluation also measures now" in caplog.text
