"""Sets of generated images: what is on disk, shared and continued; and the tool that writes them."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

import maskgen
from maskgen import config as config_lib
from maskgen import images as images_lib
from maskgen import objectives, storage
from maskgen.data.listing import list_pictures
from maskgen.errors import UserError
from maskgen.serving import model as model_lib
from maskgen.serving import requests, sample_set
from maskgen.tools import generate

trained = tiny.trained

SHAPE = (4, 6, 3)
MADE = np.random.default_rng(0).integers(0, 256, (10, *SHAPE), np.uint8)
LABELS = np.arange(10) % 3


def manifest(**changes):
  return {"seed": 0, "start": 5, "count": 10, "image_shape": SHAPE, "format": "npz", **changes}


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


# Sets on disk


def test_parts_in_any_order_and_of_any_size_become_one_file(tmp_path):
  made = sample_set.create(tmp_path, manifest(), LABELS)
  assert made.missing().all()
  for first, stop in ((4, 8), (0, 2), (1, 5)):
    made.write(5 + first, MADE[first:stop])
  np.testing.assert_array_equal(made.missing(), np.arange(10) >= 8)
  made = sample_set.create(tmp_path, manifest(model="elsewhere"), LABELS)  # continues
  made.write(11, MADE[6:] / np.float32(255))
  made.finish()
  assert not made.missing().any()
  assert {*contents(tmp_path)} == {"manifest.json", "samples.npz"}
  with np.load(tmp_path / "samples.npz") as arrays:
    assert {*arrays} == {"arr_0", "arr_1"} and arrays["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(arrays["arr_0"], MADE)
    np.testing.assert_array_equal(arrays["arr_1"], LABELS)
  before = contents(tmp_path)
  made.finish()  # again, by another process
  assert contents(tmp_path) == before


def test_a_file_is_not_made_of_the_parts_that_another_process_has_left(tmp_path):
  made = sample_set.create(tmp_path, manifest())
  made.write(5, MADE[:4])
  made.write(9, MADE[4:])
  (tmp_path / "part_00000005_00000009.npy").unlink()
  with pytest.raises(FileNotFoundError, match="no part with image 5"):
    made.finish()
  assert {*contents(tmp_path)} == {"manifest.json", "part_00000009_00000015.npy"}


def test_a_process_whose_parts_were_removed_finds_the_file_of_another(tmp_path, monkeypatch):
  made = sample_set.create(tmp_path, manifest())
  made.write(5, MADE)
  read = sample_set.Npz._read

  def finished_meanwhile(self, part, shape):
    monkeypatch.setattr(sample_set.Npz, "_read", read)
    sample_set.create(tmp_path, manifest()).finish()
    return read(self, part, shape)

  monkeypatch.setattr(sample_set.Npz, "_read", finished_meanwhile)
  made.finish()
  assert {*contents(tmp_path)} == {"manifest.json", "samples.npz"}


def test_files_that_were_cut_off_are_missing(tmp_path):
  made = sample_set.create(tmp_path, manifest(format="png"), LABELS)
  made.write(5, MADE[..., :1])
  assert not made.missing().any()
  np.testing.assert_array_equal(
    np.asarray(Image.open(tmp_path / "00000007.png")), MADE[2, ..., :1].repeat(3, -1)
  )
  whole = (tmp_path / "00000006.png").read_bytes()
  for number, size in ((6, len(whole) - 1), (9, 0)):
    (tmp_path / f"{number:08d}.png").write_bytes(whole[:size])
  (tmp_path / "00000014.png").unlink()
  np.testing.assert_array_equal(np.flatnonzero(made.missing()), [1, 4, 9])
  made.finish()
  rows = list(csv.DictReader((tmp_path / "labels.csv").open()))
  assert rows[2] == {"file": "00000007.png", "label": "2"} and len(rows) == 10


def test_another_set_is_not_continued(tmp_path):
  sample_set.create(tmp_path / "set", manifest())
  with pytest.raises(UserError, match="has images with seed 0, not 1: give another folder, or the flags"):
    sample_set.create(tmp_path / "set", manifest(seed=1))
  steps = [manifest(sampling={"order": "halton", "steps": steps}) for steps in (2, 3)]
  sample_set.create(tmp_path / "steps", steps[0])
  with pytest.raises(UserError, match="has images with sampling/steps 2, not 3: give another folder"):
    sample_set.create(tmp_path / "steps", steps[1])
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "photo.png").write_bytes(b"")
  with pytest.raises(UserError, match="mine is not empty: give a new folder"):
    sample_set.create(tmp_path / "mine", manifest())
  made = sample_set.create(tmp_path / "damaged", manifest())
  made.write(5, MADE)
  (tmp_path / "damaged" / "part_00000005_00000015.npy").write_bytes(b"no array")
  with pytest.raises(
    UserError, match=r"part_00000005_00000015\.npy is damaged .*: delete it, and run the same"
  ):
    made.finish()
  assert not [name for name in contents(tmp_path / "damaged") if "samples" in name]


def test_another_version_is_told(tmp_path, caplog):
  sample_set.create(tmp_path, manifest(made_with={"jax": "0.1"}))
  sample_set.create(tmp_path, manifest(made_with={"jax": "0.2"}))
  assert "was begun with {'jax': '0.1'}" in caplog.text


# The tool


def random_export(folder, config):
  """An export of an untrained model."""
  objective = objectives.build(config["objective"])
  shapes = jax.eval_shape(objective.init, jax.random.key(0), objective.pretrained_shapes())
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda leaf: jnp.float32(0.3 * rng.normal(size=leaf.shape)), shapes)
  storage.write_export(folder, config, variables)
  return folder


@pytest.fixture(scope="module")
def with_classes(tmp_path_factory):
  config = tiny.stage("mage")
  config["objective"] |= {"name": "mage_conditional", "classes": 3, "condition_width": 8}
  return random_export(tmp_path_factory.mktemp("classes") / "model", config)


def run(model, out, *flags, count=10):
  generate.main(
    [f"--model={model}", f"--out_dir={out}", f"--count={count}", "--steps=2", "--batch_size=4", *flags]
  )


def test_images_do_not_depend_on_how_they_are_made(trained, tmp_path, capsys):
  model = trained / "mage"
  run(model, tmp_path / "whole")
  assert "seed 0, without classes or captions" in capsys.readouterr().out
  whole = contents(tmp_path / "whole")
  made = np.stack([np.asarray(Image.open(tmp_path / "whole" / f"{i:08d}.png")) for i in range(10)])
  expected = images_lib.to_uint8(maskgen.load(model).generate(batch=10, steps=2))
  assert made.shape == (10, *tiny.SIZE, 3) and (np.abs(made - expected.astype(int)) <= 1).mean() > 0.99

  # Two processes, of which one has not finished, and then begins again.
  run(model, tmp_path / "two", "--process_index=0", "--process_count=2")
  assert "4 images of" in capsys.readouterr().out
  (tmp_path / "two" / "00000003.png").unlink()
  for index in (1, 0):
    run(model, tmp_path / "two", f"--process_index={index}", "--process_count=2")
  assert contents(tmp_path / "two") == whole

  run(model, tmp_path / "some", "--start=3", "--format=npz", count=4)
  with np.load(tmp_path / "some" / "samples.npz") as arrays:
    np.testing.assert_array_equal(arrays["arr_0"], made[3:7])
  with pytest.raises(UserError, match="has images with sampling/order 'confidence', not 'halton'"):
    run(model, tmp_path / "two", "--order=halton")


def test_labels_are_interleaved_and_written(with_classes, tmp_path, capsys):
  run(with_classes, tmp_path / "balanced", "--start=1", "--guidance=2", "--reuse=2")
  assert "balanced labels of 3 classes" in capsys.readouterr().out
  assert list_pictures(str(tmp_path / "balanced"), "train").class_names == ("0", "1", "2")
  rows = list(csv.DictReader((tmp_path / "balanced" / "labels.csv").open()))
  assert [int(row["label"]) for row in rows] == [i % 3 for i in range(1, 11)]
  known = json.loads((tmp_path / "balanced" / "manifest.json").read_text())
  assert (
    known["labels"] == {"rule": "balanced", "classes": [0, 1, 2]} and known["sampling"]["guidance"] == 2.0
  )

  run(with_classes, tmp_path / "random", "--labels=random", "--label=0,2", "--format=npz")
  with np.load(tmp_path / "random" / "samples.npz") as arrays:
    images, labels = arrays["arr_0"], arrays["arr_1"]
  assert {*labels} == {0, 2} and (np.diff(labels) < 0).any()
  made = images_lib.to_uint8(maskgen.load(with_classes).generate(label=labels, steps=2))
  assert (np.abs(made - images.astype(int)) <= 1).mean() > 0.99


def test_random_choices_depend_on_the_seed_and_the_image():
  drawn = requests.draws(7, range(1000), 5)
  np.testing.assert_array_equal(requests.draws(7, range(300, 400), 5), drawn[300:400])
  assert np.bincount(drawn).min() > 150 and (requests.draws(8, range(1000), 5) != drawn).any()


@pytest.mark.parametrize("config", ["mage_text_cond.py:debug", "diffusion_digits.py:debug"])
def test_captions_are_taken_in_turn(config, tmp_path):
  section = config_lib.to_dict(config_lib.load(f"configs/{config}"))
  model = random_export(tmp_path / "model", section.get("mage_text", section))
  (tmp_path / "captions.txt").write_text("a red three\n\na small five\n")
  run(model, tmp_path / "out", f"--captions={tmp_path / 'captions.txt'}", count=3)
  rows = list(csv.DictReader((tmp_path / "out" / "captions.csv").open()))
  assert [row["caption"] for row in rows] == ["a red three", "a small five", "a red three"]
  assert list_pictures(str(tmp_path / "out"), "train").captions
  assert json.loads((tmp_path / "out" / "manifest.json").read_text())["captions"]["number"] == 2


def test_one_image_has_its_own_size(trained, tmp_path):
  file = tmp_path / "one.png"
  generate.main([f"--model={trained / 'mage'}", f"--out={file}", "--count=1", "--steps=2"])
  made = maskgen.load(trained / "mage").generate(batch=1, steps=2)
  np.testing.assert_array_equal(np.asarray(Image.open(file)), images_lib.to_uint8(made[0]))


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([], "give --out=FILE.png for one picture, or --out_dir=DIR"),
    (["--out=a.png", "--format=npz"], "--format is for --out_dir: leave it out"),
    (["--out_dir=d", "--trajectory=a.png"], "--trajectory=a.png is for --out"),
    (["--out_dir=d", "--count=0"], "--count=0: give at least 1"),
    (["--out_dir=d", "--batch_size=0"], "--batch_size=0: give at least 1"),
    (["--out_dir=d", "--start=-1"], "--start=-1: give a whole number"),
    (["--out_dir=d", "--process_index=0"], "--process_index and --process_count are used together"),
    (["--out_dir=d", "--process_index=2", "--process_count=2"], "--process_index=2: give a number from 0"),
    (["--out_dir=d", "--captions=none.txt"], "--captions=none.txt cannot be read"),
    (["--out_dir=d", "--prompt=a three"], "trained without captions"),
    (["--out_dir=d", "--negative_prompt=x"], "--negative_prompt=x: --model=.* takes none, leave it out"),
    (["--out_dir=d", "--label=1", "--labels=none"], "--label=1 and --labels=none: give one of them"),
    (["--out_dir=d", "--labels=random", "--prompt=x"], "--labels=random and --prompt=x: give one of them"),
    (["--out_dir=d", "--label=1"], "--label=1: this model was trained without classes"),
    (["--out_dir=d", "--labels=balanced"], "--labels=balanced: this model was trained without classes"),
    (["--out_dir=d", "--top_p=0"], "top_p is 0.0"),
  ],
)
def test_wrong_flags_are_refused_before_a_folder_is_begun(trained, tmp_path, monkeypatch, flags, message):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=message):
    generate.main([f"--model={trained / 'mage'}", *flags])
  assert not [*tmp_path.iterdir()]


def test_a_tokenizer_does_not_generate(trained, tmp_path):
  with pytest.raises(UserError, match="does not generate images"):
    generate.main([f"--model={trained / 'tokenizer'}", f"--out_dir={tmp_path / 'out'}"])


def test_many_images_are_made_in_parts(trained, monkeypatch):
  model = maskgen.load(trained / "mage")
  whole = model.generate(seed=1, batch=10, steps=2)
  sizes = []
  call = type(model).call

  def watched(self, name, batch, **options):
    sizes.append(len(batch["key"]))
    return call(self, name, batch, **options)

  monkeypatch.setattr(type(model), "call", watched)
  monkeypatch.setattr(model_lib, "LARGEST", 4)
  np.testing.assert_allclose(model.generate(seed=1, batch=10, steps=2), whole, atol=1e-4)
  assert sizes == [4, 4, 2]
