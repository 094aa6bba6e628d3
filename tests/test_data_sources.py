"""Sources: digits, synthetic, the registry."""

import subprocess
import sys

import numpy as np
import pytest

from maskgen.data.cpu_tf import tf
from maskgen.data.sources import SOURCES, Source, digits, open_source, source
from maskgen.errors import UserError


def _fetch(opened: Source, index: int) -> dict[str, np.ndarray]:
  return {key: value.numpy() for key, value in opened.fetch(tf.constant(index, tf.int64)).items()}


def test_importing_the_package_leaves_tensorflow_alone():
  code = "import sys, maskgen.data; assert 'tensorflow' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True)


class TestDigits:
  def test_splits_are_all_of_scikit_learn(self):
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    expected = sorted(
      (int(label), np.rint(row * 255 / 16).astype(np.uint8).tobytes())
      for row, label in zip(pixels, labels, strict=True)
    )
    found = []
    for split, size in (("train", 1437), ("test", 360)):
      opened = open_source("digits", split)
      assert opened.size == size and opened.class_names == tuple("0123456789")
      counts = np.zeros(10, int)
      for index in range(size):
        record = _fetch(opened, index)
        image = tf.io.decode_png(record["image"]).numpy()
        assert image.shape == (8, 8, 1)
        counts[record["label"]] += 1
        found.append((int(record["label"]), image.tobytes()))
      assert np.ptp(counts) <= 0.1 * size / 10  # as balanced as the whole
    assert sorted(found) == expected

  def test_the_loser_of_a_race_reads_what_the_winner_wrote(self, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    first = digits.Digits.download_and_prepare

    def lose(builder):
      first(digits.Digits(data_dir=str(tmp_path)))
      with digits.tfds.core.utils.incomplete_dir(builder.data_dir) as folder:
        (digits.tfds.core.Path(folder) / "file").touch()

    monkeypatch.setattr(digits.Digits, "download_and_prepare", lose)
    assert digits.load("test")[0].shape == (360,)
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]

  def test_unwritable_folder(self, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match=f"written to '{tmp_path}/file'.*TFDS_DATA_DIR"):
      open_source("digits", "train")

  def test_unknown_split(self):
    with pytest.raises(UserError, match="split 'tset' of digits is unknown; did you mean 'test'"):
      open_source("digits", "tset")


class TestSynthetic:
  def test_records(self):
    train, test = (open_source("synthetic", "train"), open_source("synthetic", "test"))
    assert (train.size, test.size, len(train.class_names)) == (256, 64, 10)
    records = [_fetch(opened, i) for opened in (train, test) for i in range(0, opened.size, 5)]
    images = np.stack([record["image"] for record in records])
    assert images.shape[1:] == (64, 64, 3) and images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == len(images)

  def test_labels_name_what_is_drawn(self):
    opened = open_source("synthetic", "train")
    for index in range(30):
      record = _fetch(opened, index)
      colour, shape = opened.class_names[record["label"]].split()
      image = record["image"].astype(int)
      if colour in ("red", "green", "blue"):
        assert np.ptp(image, axis=-1).max() > 100
        centre = image[np.ptp(image, axis=-1) > 60].mean(0)
        assert centre.argmax() == ("red", "green", "blue").index(colour)
        inside = np.ptp(image, axis=-1) > 90
        rows, columns = (np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0)))
        filled = inside.sum() / (np.ptp(rows) + 1) / (np.ptp(columns) + 1)
        assert (filled > 0.9) == (shape == "square")


class TestRegistry:
  @pytest.mark.parametrize(
    ("spec", "message"),
    [
      ("digit", "data source 'digit' does not exist; did you mean 'digits'"),
      ("folder", "write it as 'folder:/path'"),
      ("digits:8", "write it as 'digits'"),
    ],
  )
  def test_errors(self, spec, message):
    with pytest.raises(UserError, match=message):
      open_source(spec, "train")

  def test_adding_a_source(self, monkeypatch):
    monkeypatch.setattr("maskgen.data.sources.SOURCES", dict(SOURCES))

    @source("black:size")
    def black(argument: str, split: str) -> Source:
      image = tf.zeros((8, 8, 3), tf.uint8)
      return Source(f"black {split}", int(argument), None, lambda index: {"image": image}, split)

    assert open_source("black:5", "train").size == 5
    with pytest.raises(UserError, match="split 'test' of data source 'black:0' is empty"):
      open_source("black:0", "test")
