"""Records that are arrays: they are read without TensorFlow, and make the same batches as with it."""

import hashlib
import itertools
import re
import subprocess
import sys

import numpy as np
import pytest
import test_errors
from etils import epath

from maskgen.data import array_reader, shuffle, sources
from maskgen.data.array_reader import ArrayReader
from maskgen.data.cache import Cache, Manifest
from maskgen.data.cpu_tf import tf
from maskgen.data.pipeline import Data
from maskgen.errors import UserError
from maskgen.training import metrics


def pictures(count: int = 40) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, (count, 8, 8, 3), np.uint8),
    "label": rng.integers(0, 3, count),
    "classes": np.array(["ant", "bee", "cat"]),
    "caption": np.array([f"a {number}" for number in range(count)]),
  }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("arrays")
  for split, count in (("train", 40), ("test", 12)):
    np.savez(folder / f"small_{split}.npz", **pictures(count))
  return f"arrays:{folder}/small_{{split}}.npz"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  """The path of a token cache with three crops of each of 50 pictures, in three shards."""
  manifest = Manifest(
    **dict(tokenizer="t", image_shape=(8, 8, 3), codebook_size=300, tokens=16, crops=3, source="s"),
    **dict(
      split="train", fingerprint="f", preprocess="p", seed=0, records=50, class_names=("ant", "bee", "cat")
    ),
    shard_records=20,
  )
  made = Cache.create(epath.Path(tmp_path_factory.mktemp("cache") / "tokens"), manifest)
  rng = np.random.default_rng(1)
  for number in range(manifest.num_shards):
    count = len(manifest.shard(number))
    made.write(number, rng.integers(0, 300, (count, 3, 16)), rng.integers(0, 3, count))
  return made.folder


# A power of four and its neighbours, where the number of bits changes.
@pytest.mark.parametrize("size", [1, 2, 3, 360, 1437, 65536, 65537, 65538, 262145, 1281167])
def test_the_shuffle_is_tensorflows(size):
  positions = np.unique(np.r_[np.arange(min(size, 300)), size - 1])
  for seed, epoch in ((0, 0), (-5, 1), (2**63 - 1, 2**33)):
    expected = shuffle.tensors(tf.constant(positions), size, seed, epoch).numpy()
    np.testing.assert_array_equal(shuffle.arrays(positions, size, seed, epoch), expected)


@pytest.mark.parametrize("size", [1, 5, 1437, 70000])
def test_an_epoch_has_every_record_once(size):
  positions = np.arange(2 * size)
  records = shuffle.arrays(positions % size, size, 3, positions // size).reshape(2, size)
  np.testing.assert_array_equal(np.sort(records), np.tile(np.arange(size), (2, 1)))
  assert size < 5 or (records[0] != records[1]).any()


def batches(data: Data) -> list[dict[str, np.ndarray]]:
  """Two epochs of training, from the second step on, and all of evaluation."""
  steps = 2 * data.num_train // data.batch_size + 1
  return [
    *itertools.islice(data.train_batches(1), steps),
    *data.eval_batches("eval", 16),
    *data.eval_batches("train", 16),
  ]


def test_batches_are_those_of_tensorflow(cache, saved, monkeypatch):
  words = "decode(3)|tokenize('list:a 1 2 3 4 5', 8)"

  def cached(preprocess: str = "take_crop", **options) -> Data:
    return Data(f"tokens:{cache}", preprocess, "decode(3)", batch_size=32, eval_source=saved, **options)

  made = {
    "tokens": cached(seed=2),
    "two views": cached("two_views|take_crop"),
    "second process": cached(process_index=1, process_count=2),
    "arrays": Data(saved, words, words, batch_size=16),
    "subset": Data(saved, "decode(3)", "decode(3)", batch_size=4, shots=3),
  }
  readers = [each._train for each in made.values()] + [made["tokens"]._eval]
  assert all(type(reader) is ArrayReader for reader in readers)
  found = {name: (data.spec, batches(data)) for name, data in made.items()}
  monkeypatch.setattr(array_reader, "suits", lambda *_: False)
  for name, data in made.items():
    again = Data(**{field: getattr(data, field) for field in data.__dataclass_fields__})
    spec, expected = again.spec, batches(again)
    assert found[name][0] == spec, name
    for ours, theirs in zip(found[name][1], expected, strict=True):
      assert ours.keys() == theirs.keys()
      for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        np.testing.assert_array_equal(ours[key], value, err_msg=f"{name} {key}")


def test_what_changes_pixels_is_read_with_tensorflow(saved):
  for preprocess in ("decode(1)", "decode(3)|flip_lr"):
    assert type(Data(saved, preprocess, preprocess, batch_size=4)._train) is not ArrayReader


@pytest.mark.parametrize(
  "preprocess, message",
  [
    ("decode(3)|tokenize('list:a b', 1)", "tokenize in preprocessing .*: length is 1, not .*; the form is"),
    ("decode(3)|tokenize(5, 8)", "tokenize in preprocessing .*: tokenizer is 5, not a string"),
  ],
)
def test_ops_that_reject_their_arguments(saved, preprocess, message):
  with pytest.raises(UserError, match=message) as error:
    Data(saved, preprocess, preprocess, batch_size=4)
  test_errors.assert_clear(error)


def test_arrays_without_captions_say_so(tmp_path):
  for split in ("train", "test"):
    np.savez(tmp_path / f"{split}.npz", image=pictures()["image"])
  words = "decode(3)|tokenize('list:a b', 8)"
  with pytest.raises(UserError, match=r"needs captions: .*train.npz has none: save it by np.savez") as error:
    Data(f"arrays:{tmp_path}/{{split}}.npz", words, words, batch_size=4)
  test_errors.assert_clear(error)


def test_arrays_have_classes_and_captions(saved, tmp_path):
  opened = sources.open_source(saved, "test")
  assert (opened.size, opened.class_names) == (12, ("ant", "bee", "cat"))
  record = opened.fetch(tf.constant(5, tf.int64))
  expected = pictures(12)
  np.testing.assert_array_equal(record["image"], expected["image"][5])
  assert record["caption"].numpy().tolist() == [b"a 5"]
  assert record["label"] == expected["label"][5]
  assert sources.open_source(saved, "train").fingerprint != opened.fingerprint
  np.savez(tmp_path / "test.npz", **expected | {"classes": np.array(["bee", "ant", "cat"])})
  assert sources.open_source(f"arrays:{tmp_path}/{{split}}.npz", "test").fingerprint != opened.fingerprint
  np.savez(tmp_path / "test.npz", image=expected["image"])
  plain = sources.open_source(f"arrays:{tmp_path}/{{split}}.npz", "test")
  assert plain.class_names is None and "has none" in plain.lacks["label"]
  # The fingerprint of a file without classes stays: runs compare it with the one that they began with.
  image = expected["image"]
  digest = hashlib.sha256(f"image {image.shape}".encode() + image.tobytes())
  assert plain.fingerprint == digest.hexdigest()


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(image=None), "has images of no kind: save it by np.savez"),
    (dict(image=np.zeros((3, 8, 8), np.uint8)), r"has images uint8\[3, 8, 8\]: save"),
    (dict(image=np.uint8(3)), r"has images uint8\[\]: save"),
    (dict(image=np.zeros((0, 8, 8, 3), np.uint8)), r"has images uint8\[0, 8, 8, 3\]: save"),
    (dict(image=np.zeros((40, 8, 8, 3))), r"has images float64\[40, 8, 8, 3\]: save"),
    (dict(label=np.zeros(7, int)), r"has 40 images and labels int64\[7\]: save"),
    (dict(label=np.full(40, 3)), "has labels from 3 to 3 for 3 classes: save"),
    (dict(label=np.full(40, -1), classes=None), "has labels from -1 to -1: save"),
    (dict(label=None), r"has classes <U3\[3\] and no labels: save"),
    (dict(caption=np.zeros(40)), r"has 40 images and captions float64\[40\]: save"),
    (dict(caption=np.zeros((40, 0), "U3")), r"has 40 images and captions <U3\[40, 0\]: save"),
    (b"no arrays", "is damaged .*: save it by np.savez"),
    (np.zeros(3), "is damaged .*: save it by np.savez"),
    (None, "is not a file: give the path of the arrays of split 'train'"),
  ],
)
def test_wrong_arrays(tmp_path, change, message):
  file = tmp_path / "train.npz"
  if isinstance(change, dict):
    np.savez(file, **{key: value for key, value in (pictures() | change).items() if value is not None})
  elif isinstance(change, bytes):
    file.write_bytes(change)
  elif change is not None:
    with file.open("wb") as opened:
      np.save(opened, change)
  with pytest.raises(UserError, match=message) as error:
    sources.open_source(f"arrays:{tmp_path}/{{split}}.npz", "train")
  test_errors.assert_clear(error)


def test_one_file_for_all_splits_is_refused(tmp_path):
  with pytest.raises(UserError, match=re.escape("put {split} into its name")):
    sources.open_source(f"arrays:{tmp_path}/train.npz", "train")


def test_without_tensorflow(cache, saved):
  code = f"""
import sys
sys.modules |= dict.fromkeys(("tensorflow", "tensorflow_datasets", "clu"))  # as where they are not installed
from maskgen.data.pipeline import Data
from maskgen.errors import UserError
data = Data("tokens:{cache}", "take_crop", "decode(3)", batch_size=8, eval_source="{saved}")
assert next(data.train_batches())["tokens"].shape[0] == 8 and next(data.eval_batches("eval", 4))
for name, ops in (("emoji", "decode(3)|flip_lr"), ("digits", "decode(1)")):
  try:
    Data(name, ops, ops, batch_size=8)
  except UserError as error:
    print(error)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  lines = done.stdout.splitlines()
  assert len(lines) == 2 and all("which cannot be imported" in line for line in lines), (
    done.stdout + done.stderr
  )


def test_metrics_without_tensorboard(tmp_path, monkeypatch, caplog):
  monkeypatch.setitem(sys.modules, "clu", None)
  writer = metrics.Writer(tmp_path, 0)
  writer.numbers(1, {"train/loss": 0.5})
  assert "no files for TensorBoard" in caplog.text
  assert [line["train/loss"] for line in metrics.read(tmp_path)] == [0.5]
