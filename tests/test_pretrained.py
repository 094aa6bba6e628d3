"""Models that come with maskgen: found by name, complete, and described truly."""

import importlib.resources
import json
import re

import numpy as np
import pytest
import safetensors.numpy
import tiny
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from test_errors import assert_clear

import maskgen
from maskgen import cli, storage, tree
from maskgen import config as config_lib
from maskgen.data import emoji
from maskgen.errors import UserError
from maskgen.storage import tensors
from maskgen.tools import edit, export, generate
from maskgen.training.experiment import Experiment

trained = tiny.trained

FILES = {"README.md", "config.json", "manifest.json", "results.json", "weights.safetensors"}


def files_of(name: str) -> dict[str, bytes]:
  """What an installed package has, which reads no file by its path in the repository."""
  folder = importlib.resources.files("maskgen.pretrained") / name
  return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_names_are_listed():
  assert isinstance(maskgen.available(), tuple)
  assert "digits" in maskgen.available()


def test_all_of_them_are_small():
  sizes = {name: sum(map(len, files_of(name).values())) for name in maskgen.available()}
  assert sum(sizes.values()) < 20e6, sizes


def test_a_home_folder_is_found(trained, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(trained))
  assert maskgen.load("~/tokenizer").config["objective"]["name"] == "tokenizer"
  assert storage.resolve("~/mage", tmp_path) == trained / "mage"
  parser = cli.Parser("Reads.", "read")
  parser.add_argument("--workdir")
  parser.add_argument("--text", action="append")
  args, rest = parser.parse_known_args(["--workdir=~/run", "--text=a~", "--text=~/b", "--config.resume=~/x"])
  assert args.workdir == f"{trained}/run" and args.text == ["a~", f"{trained}/b"]
  assert rest == ["--config.resume=~/x"]  # stored as it is written
  resumed = config_lib.to_dict(config_lib.load(f"{tiny.FILE}:only=mage", {"resume": "~/mage"}))
  Experiment(resumed).check_pretrained(trained / "longer")


@pytest.mark.parametrize("name", maskgen.available())
def test_a_model_is_complete(name):
  files = files_of(name)
  assert set(files) == FILES
  text = b"".join(data for file, data in files.items() if file != storage.WEIGHTS).decode()
  assert not re.search(r"(?<![\w.:/])/(tmp|home|root|work|Users)\b", text)
  assert {"objective", "data"} <= json.loads(files["config.json"]).keys()
  assert all(np.isfinite(leaf).all() for leaf in tree.flatten(maskgen.load(name).variables).values())


@pytest.mark.parametrize("name", maskgen.available())
def test_a_card_says_what_the_run_gave(name):
  files = files_of(name)
  card, results = files["README.md"].decode(), json.loads(files["results.json"])
  results.pop("run", None)
  stages = [stage for stage in results.values() if isinstance(stage, dict)] or [results]
  numbers = {key: value for stage in stages for key, value in stage.items()}
  rows = re.findall(r"^\| `([\w/]+)` \| ([\d.]+) \|", card, flags=re.MULTILINE)
  assert rows
  for key, value in rows:
    assert value == f"{numbers[key]:.3f}", key
  for config in re.findall(r"--config=(\S+)", card):
    config_lib.load(config)
  assert f'maskgen.load("{name}")' in card and "Apache-2.0" in card


def test_a_name_is_a_model_wherever_a_folder_is(tmp_path):
  images = maskgen.load("digits").generate(seed=0, batch=2)
  assert images.shape == (2, 16, 16, 3) and images.std() > 0.2
  file = tmp_path / "digits.png"
  generate.main(["--model=digits", f"--out={file}", "--count=2"])
  assert file.exists()
  assert storage.load_config(storage.resolve("digits", tmp_path)) == storage.load_config("digits")
  assert storage.resolve("stage:digits", tmp_path / "run") == tmp_path / "digits"


def test_a_model_of_classes_draws_what_is_asked():
  pixels, labels = load_digits(return_X_y=True)
  nearest = KNeighborsClassifier(3).fit(pixels / 16, labels)
  asked = np.tile(np.arange(10), 3)
  images = maskgen.load("digits-class").generate(seed=0, label=asked, steps=8)
  made = images.mean(axis=-1).reshape(-1, 8, 2, 8, 2).mean(axis=(2, 4)).reshape(-1, 64)
  assert (nearest.predict(made) == asked).mean() > 0.8


def test_a_model_of_prompts_draws_what_is_asked():
  prompt = "a large red three in the middle on a blue background"
  images = maskgen.load("digits-vilex").generate(prompt=prompt, batch=2, seed=0, steps=4)
  red, _, blue = np.moveaxis(images, -1, 0)  # [2, 16, 16]
  assert (blue - red)[:, :, :2].min() > 0.1 and ((red - blue)[:, 4:12, 4:12] > 0.2).mean() > 0.2


def test_a_model_of_emoji_draws_and_edits_what_is_asked(tmp_path):
  known = emoji.load()

  def nearest(image):
    return int(np.square(known.images / 255 - image).sum(axis=(1, 2, 3)).argmin())

  new = known.names.index("woman artist, medium-light skin tone")
  assert known.held_out[new] == "tone"
  names = ["red apple", "japan flag", known.names[new]]
  *seen, made = (nearest(image) for image in maskgen.load("emoji").generate(prompt=names, seed=0))
  assert [known.names[i] for i in seen] == names[:2] and known.bases[made] == known.bases[new]
  before = known.images[known.names.index("woman mechanic, light skin tone")]
  Image.fromarray(before).save(tmp_path / "in.png")
  files = [f"--image={tmp_path / 'in.png'}", f"--out={tmp_path / 'out.png'}"]
  edit.main(["--model=emoji", *files, "--box=3,9,32,32", "--prompt=woman mechanic, dark skin tone"])
  edited = np.array(Image.open(tmp_path / "out.png"))
  assert known.bases[nearest(edited / 255)] == "woman mechanic"
  assert edited[16:24, 8:18].mean() < before[16:24, 8:18].mean() - 50  # the face
  edited[9:, 3:] = before[9:, 3:]
  np.testing.assert_array_equal(edited, before)


def test_words_change_a_picture_beside_them():
  known = emoji.load()
  picture = known.images[known.names.index("princess")]
  prompts = ["{}, light skin tone", "{}, dark skin tone", "red apple"]
  model = maskgen.load("emoji-vilex")
  light, dark = model.generate(prompt=prompts[:2], images=[picture], num_tokens=1, seed=0)
  (apple,) = model.generate(prompt=prompts[2:], seed=0)
  shown = [np.square(known.images / 255 - made).sum(axis=(1, 2, 3)).argmin() for made in (light, dark, apple)]
  tones = ("light skin tone", "dark skin tone")
  assert [known.names[i] for i in shown] == [*(f"princess, {tone}" for tone in tones), "red apple"]


def test_a_path_comes_before_a_name(trained, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "digits").symlink_to(trained / "tokenizer")
  assert maskgen.load("digits").config["objective"]["name"] == "tokenizer"
  (tmp_path / "digits").unlink()
  assert maskgen.load("digits").config["objective"]["name"] == "mage"
  with pytest.raises(
    UserError, match=r"model \./digits does not exist: give the workdir of a run, or an export$"
  ):
    maskgen.load("./digits")


@pytest.mark.parametrize(("name", "end"), [("digit", "did you mean 'digits'?"), ("qqqq", "known: digits")])
def test_an_unknown_name(name, end):
  with pytest.raises(
    UserError, match=f"model {name} does not exist: .* or a name; {re.escape(end)}"
  ) as error:
    maskgen.load(name)
  assert_clear(error)


def test_an_export_in_float16_is_read_as_float32(trained, tmp_path):
  arguments = [f"--model={trained / 'mage'}", "--dtype=float16"]
  export.main([*arguments, f"--out={tmp_path / 'half'}"])
  full = tree.flatten(maskgen.load(trained / "mage").variables)
  half = tree.flatten(maskgen.load(tmp_path / "half").variables)
  tiny.assert_same_bits(half, {name: np.float32(np.float16(leaf)) for name, leaf in full.items()})
  stored = safetensors.numpy.load_file(tmp_path / "half" / storage.WEIGHTS)
  assert {leaf.dtype for leaf in stored.values()} == {np.dtype(np.float16)}
  shapes: dict = {}
  storage.read_chosen(tmp_path / "half", lambda found: shapes.update(found) or {})
  assert {leaf.dtype for leaf in shapes.values()} == {np.dtype(np.float32)}


def test_an_export_in_int8_is_read_as_float32(trained, tmp_path):
  export.main([f"--model={trained / 'mage'}", "--dtype=int8", f"--out={tmp_path / 'small'}"])
  full = tree.flatten(maskgen.load(trained / "mage").variables)
  small = tree.flatten(maskgen.load(tmp_path / "small").variables)
  assert full.keys() == small.keys()
  for name, leaf in full.items():
    assert (small[name].dtype, small[name].shape) == (leaf.dtype, leaf.shape), name
    # Half a step of the coarsest scale, which is itself rounded; vectors are float16.
    step = np.abs(leaf).max() / (1024 if leaf.size in leaf.shape else 127)
    assert np.abs(small[name] - leaf).max() <= 0.503 * step + 3e-8, name
  stored = safetensors.numpy.load_file(tmp_path / "small" / storage.WEIGHTS)
  for name in full:
    vector = stored[name].size in stored[name].shape
    assert stored[name].dtype == (np.float16 if vector else np.int8), name
  shapes: dict = {}
  storage.read_chosen(tmp_path / "small", lambda found: shapes.update(found) or {})
  assert shapes.keys() <= full.keys() and {leaf.dtype for leaf in shapes.values()} == {np.dtype(np.float32)}


def test_float16_is_refused_where_it_does_not_fit(trained, tmp_path):
  with pytest.raises(
    UserError, match="params/main/kernel has numbers that are too large for float16"
  ) as error:
    storage.write_export(
      tmp_path / "out", {}, {"params": {"main": {"kernel": np.full(3, 1e5, np.float32)}}}, "float16"
    )
  assert_clear(error)
  with pytest.raises(UserError, match="dtype 'int' does not exist; did you mean 'int8'") as error:
    maskgen.load("digits").save(tmp_path / "out", dtype="int")
  assert_clear(error)
  with pytest.raises(UserError, match="--dtype=float16: --format=mage writes float32") as error:
    export.main(["--model=digits", "--format=mage", "--dtype=float16", f"--out={tmp_path / 'a.safetensors'}"])
  assert_clear(error)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_numbers_that_are_not_finite_are_not_rounded(tmp_path, dtype):
  arrays = {"kernel": np.array([[1.0, np.nan], [2.0, 3.0]], np.float32)}
  with pytest.raises(UserError, match="kernel has numbers that are not finite") as error:
    tensors.write_weights(tmp_path / "out", arrays, dtype)
  assert_clear(error)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [np.float32, np.float16])  # earlier versions wrote float32
def test_only_an_int8_file_has_scales(dtype):
  arrays = {"a": np.full((2, 3), 4, np.int8), "a:scales": np.full((2, 1), 0.5, dtype)}
  assert tensors.parse(safetensors.numpy.save(arrays)).keys() == arrays.keys()
  (read,) = tensors.parse(safetensors.numpy.save(arrays, {"float32": "stored as int8"})).items()
  assert read[0] == "a" and read[1].dtype == np.float32 and (read[1] == 2).all()
