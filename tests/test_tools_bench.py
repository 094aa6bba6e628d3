"""The benchmarks: what they report, and that they measure the same work. Never how fast it was."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image

from maskgen.data.handwritten import Handwritten
from maskgen.data.pipeline import Data
from maskgen.errors import UserError
from maskgen.tools.bench import main

TINY = f"--config={tiny.FILE}"


@pytest.fixture
def photos(tmp_path):
  """Forty JPEG photos of various sizes."""
  rng = np.random.default_rng(0)
  for number in range(40):
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    small.resize((40 + number, 60 - number // 2)).save(tmp_path / f"{number}.jpg")
  return tmp_path


def _numbers(capsys):
  """The one line that a benchmark prints."""
  (line,) = capsys.readouterr().out.splitlines()
  return json.loads(line)


def _data(source, preprocess, size, batch_size=6):
  return Data(source, preprocess, f"decode|resize({size})", batch_size, process_index=0, process_count=1)


def test_input(capsys, photos):
  preprocess = "decode(3)|random_resized_crop(16, (0.2, 1.0))|flip_lr"
  main(
    [
      *("input", TINY, "--stage=mage", "--seconds=0.05", "--rounds=3"),
      f"--config.mage.data.source=folder:{photos}",
      f"--config.mage.data.preprocess={preprocess}",
    ]
  )
  numbers = _numbers(capsys)
  rates = [numbers.pop(f"{name}_images_per_second") for name in ("pipeline", "handwritten", "decode")]
  assert all(isinstance(rate, float) and rate > 0 for rate in rates)
  ratio, low, high = (numbers.pop(name) for name in ("ratio", "ratio_min", "ratio_max"))
  assert ratio == pytest.approx(rates[0] / rates[1])
  assert 0 < low <= ratio <= high
  assert isinstance(numbers.pop("cores"), int)
  assert numbers == {"source": f"folder:{photos}", "preprocess": preprocess, "batch_size": 8}


def test_one_round_has_one_ratio(capsys):
  main(["input", "--config=configs/quickstart.py", "--seconds=0.05", "--rounds=1"])
  numbers = _numbers(capsys)
  assert numbers["source"] == "digits"
  assert numbers["ratio"] == numbers["ratio_min"] == numbers["ratio_max"]


@pytest.mark.parametrize("source", ["digits", "folder", "mixed"])
@pytest.mark.parametrize(
  ("preprocess", "size"),
  [
    ("decode|resize(16)", 16),
    ("decode|resize((16, 16), 'bicubic', False)", 16),
    ("decode|resize_small(20)|center_crop(16)", 16),
    ("decode|resize(14)|pad(1, 'reflect')", 16),
  ],
)
def test_the_loop_makes_the_images_of_the_pipeline(photos, source, preprocess, size):
  if source == "mixed":
    Image.new("RGB", (30, 50), (10, 200, 30)).save(photos / "other.png")
  source = "digits" if source == "digits" else f"folder:{photos}"
  data = _data(source, preprocess, size)
  ours, theirs = data.train_batches(), Handwritten(source, "train", preprocess).batches(6)
  # Whole epochs, several if a batch has rows of two.
  batches = data.num_train // np.gcd(data.num_train, 6)
  ours = sorted(image.tobytes() for _ in range(batches) for image in next(ours)["image"])
  theirs = sorted(image.tobytes() for _ in range(batches) for image in next(theirs))
  assert ours == theirs


@pytest.mark.parametrize("source", ["digits", "folder"])
@pytest.mark.parametrize(
  "preprocess",
  [
    "decode|random_resized_crop(16)|flip_lr",
    "decode|pad(20)|random_resized_crop((16, 16), (0.5, 1.0))",
    "decode(1)|pad(6)|random_crop(16)",
  ],
)
def test_random_images_have_the_same_shape(photos, source, preprocess):
  source = "digits" if source == "digits" else f"folder:{photos}"
  channels = 1 if "(1)" in preprocess else 3
  data = Data(source, preprocess, f"decode({channels})|resize(16)", 6, process_index=0, process_count=1)
  ours = next(data.train_batches())["image"]
  loop = Handwritten(source, "train", preprocess)
  batches = loop.batches(6)
  theirs = [next(batches) for _ in range(3)]
  for images in theirs:
    assert (images.shape, images.dtype) == (ours.shape, ours.dtype)
  assert len({image.tobytes() for images in theirs for image in images}) > 12


def test_decoding_is_of_whole_pictures(photos):
  sizes = sorted(np.asarray(Image.open(path)).size for path in photos.iterdir())
  counted = {int(size) for size in next(Handwritten(f"folder:{photos}", "train", "decode").decodings(30))}
  assert counted <= set(sizes) and len(counted) > 10


def test_tokens(capsys):
  main(
    ["tokens", TINY, "--steps=2", "--batch_size=16", "--config.mage.objective.tokenizer.codebook_size=300"]
  )
  numbers = _numbers(capsys)
  live, cached = (numbers.pop(f"{name}_seconds_per_step") for name in ("live", "cached"))
  assert numbers.pop("ratio") == pytest.approx(live / cached)
  assert 0 < numbers.pop("ratio_min") <= numbers.pop("ratio_max")
  assert numbers.pop("live_flops_per_step") > numbers.pop("cached_flops_per_step") > 0
  assert isinstance(numbers.pop("device"), str)
  bytes_per_crop = tiny.TOKENS * 2 * 1_000_000  # of uint16
  assert numbers == {
    "batch_size": 16,
    "tokens": tiny.TOKENS,
    "code_dtype": "uint16",
    "bytes_per_million_images_per_crop": bytes_per_crop,
    "bytes_per_million_images_10_crops": 10 * bytes_per_crop,
  }


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "benchmark"),
    (["inputs", TINY], "invalid choice: 'inputs'"),
    (["input"], "--config"),
    (["input", TINY, "--stage=maeg"], "--stage=maeg: .* no such stage; did you mean 'mage'"),
    (["input", f"{TINY}:only=mage", "--stage=mage"], "has no stages, remove the flag"),
    (["input", TINY, "--rounds=0"], "--rounds=0: give at least 1"),
    (["input", TINY, "--seconds=nan"], "--seconds=nan: give at least 0"),
    (["input", TINY], "synthetic has no encoded pictures"),
    (["input", TINY, "--steps=3"], "'--steps=3' is not understood"),
    (
      ["input", TINY, "--config.mage.data.preprocess=decode|random_crop(16)|grayscale"],
      "grayscale in .* has no counterpart .*decode, random_resized_crop, resize",
    ),
    (
      ["input", TINY, "--config.mage.data.preprocess=two_views|decode|random_crop(16)"],
      "two_views in .* has no counterpart",
    ),
    (["tokens", TINY, "--stage=tokenizer"], "'tokenizer' is not trained on codes"),
    (["tokens", TINY, "--steps=0"], "--steps=0: give at least 1"),
    (["tokens", TINY, "--batch_size=0"], "--batch_size=0: give at least 1"),
    (["tokens", TINY, "--batch_size=9"], "9"),
  ],
)
def test_errors(arguments, message):
  with pytest.raises(UserError, match=message):
    main(arguments)


def test_a_damaged_picture_is_named_as_such(photos):
  for path in photos.iterdir():
    path.write_bytes(path.read_bytes()[:60])
  batches = Handwritten(f"folder:{photos}", "train", "decode|resize(16)").batches(6)
  with pytest.raises(UserError, match=r"the hand-written loop cannot read .*folder"):
    next(batches)
