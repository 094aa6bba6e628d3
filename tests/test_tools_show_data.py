"""The tool that shows the preprocessed data of a config: its numbers, its picture, its errors."""

import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from etils import epath
from PIL import Image

from maskgen import objectives, sheet
from maskgen.data import inspect
from maskgen.data.cache import Cache, Manifest
from maskgen.data.pipeline import Data
from maskgen.data.sources import open_source
from maskgen.errors import UserError
from maskgen.images import enlarge
from maskgen.tools import show_data
from maskgen.training.state import TrainState
from maskgen.training.step import make_update

GREY = (128, 128, 128)
QUICKSTART = "configs/quickstart.py:debug"
FILES = 40
MAGE = tiny.stage("mage")["objective"]


@pytest.fixture
def show(tmp_path, capsys):
  """Runs the tool and returns what it printed, as lines without indentation, and its picture."""

  def run(*arguments: str) -> tuple[list[str], np.ndarray]:
    show_data.main([f"--out={tmp_path / 'sheet.png'}", *arguments])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    return lines, np.asarray(Image.open(tmp_path / "sheet.png"))

  return run


@pytest.fixture
def folder(tmp_path):
  """Pictures of two classes with captions; two of them are damaged."""
  rng = np.random.default_rng(0)
  root = tmp_path / "photos"
  for number in range(FILES):
    path = root / ("cat" if number % 4 else "dog") / f"{number:02d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (20 + number, 30, 3), np.uint8)).save(path)
    path.with_suffix(".txt").write_text(f"the {path.parent.name} of {number}\nanother line\n")
  (root / "dog" / "04.png").write_bytes(b"no picture at all")
  content = (root / "cat" / "05.png").read_bytes()
  (root / "cat" / "05.png").write_bytes(content[: len(content) // 2])
  return root


def write_config(folder, data: dict, **keys) -> str:
  """Writes the config of the tiny MAGE with other data, and returns its name."""
  text = json.dumps({"data": data, **keys})
  path = folder / "config.py"
  path.write_text(
    f"import json\nimport sys\nsys.path.insert(0, {str(epath.Path(tiny.FILE).parent)!r})\nimport tiny\n"
    f"def get_config(arg=None):\n  config = tiny.get_config('only=mage')\n"
    f"  config.update(json.loads({text!r}))\n  return config\n"
  )
  return str(path)


def find(picture: np.ndarray, part: np.ndarray) -> tuple[int, int] | None:
  """The places where a picture contains a given part, pixel for pixel."""
  height, width = part.shape[:2]
  part = np.broadcast_to(part, (height, width, 3))
  first = part[0].tobytes()
  for top in range(len(picture) - height + 1):
    row = picture[top].tobytes()
    at = row.find(first)
    while at >= 0:
      left = at // 3
      if at % 3 == 0 and np.array_equal(picture[top : top + height, left : left + width], part):
        return top, left
      at = row.find(first, at + 1)
  return None


def test_quickstart(show):
  lines, picture = show(f"--config={QUICKSTART}")
  counts = np.bincount([i % 10 for i in range(256)])
  names = open_source("synthetic", "train").class_names
  assert lines[:3] == [
    "training: synthetic, split 'train', 256 records",
    "scanned 256 of 256",
    "scanned records of each of the 10 classes:",
  ]
  assert lines[3:13] == [f"{count}  {name}" for count, name in zip(counts, names, strict=True)]
  # Drawn pictures are not files.
  assert lines[13:16] == [
    "damaged: none",
    "evaluation: synthetic, split 'test', 64 records",
    "scanned 64 of 64",
  ]
  assert f"{picture.shape[1]} x {picture.shape[0]} pixels, 8 of the 8 training images" in lines[-1]

  data = Data("synthetic", "decode(3)|resize(16)|pad(1)|random_crop(16)", "decode(3)|resize(16)", 8)
  batch = next(data.train_batches())
  masks = show_data._draw_masks(objectives.build(MAGE), 0, 8, 8)
  lefts = set()
  for image, mask in zip(batch["image"], masks, strict=True):
    place = find(picture, enlarge(image, 128))
    assert place is not None and enlarge(image, 128).shape == (128, 128, 3)
    lefts.add(place[1])
    beside = picture[place[0] : place[0] + 128, place[1] + 132 : place[1] + 260]
    grey = (beside == GREY).all(axis=-1).reshape(4, 32, 4, 32).all(axis=(1, 3))
    np.testing.assert_array_equal(grey, mask)
    assert 8 <= grey.sum() <= 16  # of 4 x 4 tokens, from half to all
    shown = ~np.repeat(np.repeat(grey, 32, 0), 32, 1)
    np.testing.assert_array_equal(beside[shown], enlarge(image, 128)[shown])
  assert len(lefts) == 4  # beside each other
  for image in next(data.eval_batches("eval", 8))["image"]:
    assert find(picture, enlarge(image, 128)) is not None

  _, picture = show(f"--config={QUICKSTART}", "--count=3", "--scan=0")
  found = [find(picture, enlarge(image, 128)) is not None for image in batch["image"]]
  assert found == [True] * 3 + [False] * 5  # fewer are the first rows of the same batch

  lines, picture = show(f"--config={QUICKSTART}", "--stage=tokenizer", "--count=4", "--scan=0")
  assert "scanned no records" in lines and "4 of the 8 training images" in lines[-1]
  assert picture.shape[1] == 16 + 4 * (128 + 16)  # one picture for each record: nothing is masked


def test_masks_are_those_of_the_first_step():
  objective = objectives.build(MAGE)
  shown = show_data._draw_masks(objective, seed=3, batch_size=8, count=5)

  class Spy:
    """Returns the keys of a batch as metrics."""

    def losses(self, params, frozen, extra, batch, rng, step, *, train):
      return {"main": params["main"]}, {"keys": jax.random.key_data(batch["key"])}, extra

  update = make_update(
    Spy(), {"main": optax.identity()}, {"main": lambda step: 0.0}, seed=3, ema={}, accumulation=1
  )
  transform_state = {"main": optax.identity().init(jnp.float32(0))}
  state = TrainState(jnp.int32(0), {"main": jnp.float32(0)}, transform_state, {}, {})
  _, metrics = update(state, {}, {"image": jnp.zeros((8, 16, 16, 3))})
  keys = jax.random.wrap_key_data(metrics["keys"])
  np.testing.assert_array_equal(shown, objective.predict_fns()["mask"]({}, {"key": keys}, None)[:5])

  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), objective.pretrained_shapes())
  parts = jax.jit(objective.init)(jax.random.key(0), zeros)
  batch = {"tokens": jnp.zeros((5, tiny.TOKENS), jnp.int32), "key": keys[:5]}
  losses = jax.jit(functools.partial(objective.losses, train=False))
  _, metrics, _ = losses(
    *(parts[name] for name in ("params", "frozen", "extra")), batch, jax.random.key(0), 0
  )
  assert float(metrics["mask_ratio"]) == pytest.approx(shown.mean())
  assert shown.shape == (5, 4, 4)


def test_folder_with_damaged_files(show, folder, tmp_path):
  words = tmp_path / "words.txt"
  words.write_text("the\ncat\nof\n")
  preprocess = f"two_views|decode|random_resized_crop(16)|tokenize('words:{words}', 8)"
  data = dict(source=f"folder:{folder}", preprocess=preprocess, eval_preprocess="decode|resize(16)")
  drawn: list = []
  draw = sheet.draw
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sheet, "draw", lambda sections: draw(drawn.append(sections) or sections))
    lines, picture = show(f"--config={write_config(tmp_path, data)}")

  damaged = {"dog/04.png": "not a picture", "cat/05.png": "truncated"}
  sides = {}
  for number in range(FILES):
    name = f"{'cat' if number % 4 else 'dog'}/{number:02d}.png"
    if name not in damaged:
      sides[name] = Image.open(folder / name).height
  start = 0
  for split, use in (("train", "training"), ("test", "evaluation")):
    source = open_source(f"folder:{folder}", split)
    names = [source.describe(i).removeprefix(f"{folder}/") for i in range(source.size)]
    decodable = [name for name in names if name in sides]
    end = next((i for i, line in enumerate(lines[start + 1 :], start + 1) if ": folder" in line), len(lines))
    part, start = lines[start:end], end
    assert part[0] == f"{use}: folder '{folder}', split '{split}', {source.size} records"
    for kind in ("cat", "dog"):
      count = sum(name.startswith(kind) for name in decodable)
      assert any(line.split() == [str(count), kind] for line in part)
    heights = [sides[name] for name in decodable]
    assert (
      f"pictures: height {min(heights)} / {round(np.median(heights))} / {max(heights)}, width 30 / 30 / 30 "
      "(min / median / max)"
    ) in part
    hurt = [name for name in names if name in damaged]
    assert f"damaged: {len(hurt) or 'none'}" in part
    for name in hurt:
      (line,) = [line for line in part if line.startswith(f"{folder}/{name}: ")]
      assert damaged[name] in line

  (sections,) = drawn
  assert list(sections) == ["training, step 0: view 1 | view 2 | mask", "evaluation"]
  reader = Data(**data, batch_size=8)
  batch = next(reader.train_batches())
  source = open_source(f"folder:{folder}", "train")
  assert len(sections["training, step 0: view 1 | view 2 | mask"]) == 8
  for row, card in enumerate(sections["training, step 0: view 1 | view 2 | mask"]):
    one, two = (find(picture, enlarge(batch[key][row], 128)) for key in ("image", "image2"))
    assert one is not None and two == (one[0], one[1] + 132)
    name = source.describe(int(batch["record"][row]))
    kind, number = name.split("/")[-2], int(name[-6:-4])
    other = "<unknown>"
    assert card.name == name
    assert card.texts == [
      kind,
      f"the {kind} of {number}",
      f"tokens: the {kind if kind == 'cat' else other} of {other}",
    ]


def test_a_folder_of_nothing_but_damage(tmp_path):
  for number in range(100):
    (tmp_path / f"{number}.jpg").write_bytes(b"\xff\xd8\xff" + bytes(number))
  good = io.BytesIO()
  Image.new("RGB", (5, 7)).save(good, "JPEG")
  source = open_source(f"folder:{tmp_path}", "train")
  (epath.Path(source.describe(50))).write_bytes(good.getvalue())
  findings = list(inspect.scan(source, range(source.size)))
  assert [finding.index for finding in findings] == list(range(source.size))
  assert [finding.index for finding in findings if finding.damage is None] == [50]
  assert findings[50].sides == (7, 5)


def test_scan_is_spread_over_the_split():
  assert inspect.spread(10, 5) == [0, 2, 4, 6, 8]
  assert inspect.spread(3, 5) == [0, 1, 2]
  assert inspect.spread(3, 0) == []
  indices = inspect.spread(1_281_167, 2000)
  assert len(set(indices)) == 2000 and set(np.diff(indices)) == {640, 641}


def test_many_classes_are_shortened():
  counts = [(f"c{i}", (i * 7) % 30) for i in range(30)]
  lines = list(show_data._describe_classes(counts))
  assert lines[0] == "30 classes, 1 of them without a scanned record"
  assert len(lines) == 3 and lines[1].startswith("  smallest: c0 0,") and lines[2].endswith("29")


def test_token_cache(show, tmp_path):
  manifest = Manifest(
    tokenizer="x",
    image_shape=(16, 16, 3),
    codebook_size=tiny.CODES,
    tokens=tiny.TOKENS,
    crops=2,
    source="synthetic",
    split="train",
    fingerprint="x",
    preprocess="decode",
    seed=0,
    records=20,
    class_names=open_source("synthetic", "train").class_names,
    shard_records=20,
  )
  codes = np.random.default_rng(0).integers(0, tiny.CODES, (20, 2, tiny.TOKENS))
  Cache.create(epath.Path(tmp_path / "cache"), manifest).write(0, codes, np.arange(20) % 10)
  data = dict(
    source=f"tokens:{tmp_path / 'cache'}",
    preprocess="take_crop",
    eval_source="synthetic",
    eval_preprocess="decode(3)|resize(16)",
  )
  lines, picture = show(f"--config={write_config(tmp_path, data)}")
  assert f"token cache '{tmp_path / 'cache'}' has no pictures: codes are shown instead" in lines
  for image in next(Data(**data, batch_size=8).eval_batches("eval", 8))["image"]:
    assert find(picture, enlarge(image, 128)) is not None
  (mask, *_) = show_data._draw_masks(objectives.build(MAGE), 0, 8, 1)
  shown = np.where(np.repeat(np.repeat(mask, 32, 0), 32, 1)[..., None], GREY, 255).astype(np.uint8)
  assert find(picture, shown) is not None


def test_nothing_is_written_beside_a_card():
  picture = np.zeros((64, 64, 3), np.uint8)
  for text in ("word " * 100, "w" * 500, "", "w" * 30 + " and more " + "w" * 30):
    cards = [sheet.Card([picture], [text, text], f"/a/long/path/of/{text}.jpg")]
    drawn = sheet.draw({"title": cards})
    assert drawn.shape[1] == 64 + 2 * 16
    assert (drawn[:, :16] == 255).all() and (drawn[:, -15:] == 255).all() and (drawn[-4:] == 255).all()
    assert find(drawn, picture) == (50, 16)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--out=a.jpg"], "--out=a.jpg: give the name of a .png file"),
    (["--out=/does/not/exist/a.png"], "the folder /does/not/exist does not exist, create it first"),
    (["--stage=magee"], "--stage=magee does not exist; did you mean 'mage'?"),
    (["--count=0"], "--count=0: give at least 1"),
    (["--scan=-1"], "--scan=-1: give at least 0"),
    (["--config.mage.data.sorce=digits"], "config.data has no key 'sorce'; did you mean 'source'?"),
    (["--what"], "argument '--what' is not understood"),
    (
      ["--config.mage.objective.image_size=(32, 32)"],
      r"images of shape \(16, 16, 3\), but config.objective takes",
    ),
  ],
)
def test_wrong_arguments(arguments, message, tmp_path, monkeypatch):
  monkeypatch.setattr(inspect, "scan", None)  # all is said before long work
  with pytest.raises(UserError, match=message):
    show_data.main([f"--config={QUICKSTART}", f"--out={tmp_path / 'a.png'}", *arguments])


def test_a_config_without_stages_has_none_to_choose(tmp_path):
  with pytest.raises(UserError, match="--stage=mage: this config has no stages, leave it out"):
    show_data.main([f"--config={tiny.FILE}:only=mage", f"--out={tmp_path / 'a.png'}", "--stage=mage"])
