"""The source `tfds:NAME`: against the source `digits`, in both file formats, without a network."""

import shutil
import socket

import numpy as np
import pytest
import tensorflow_datasets as tfds

from maskgen.data.cpu_tf import tf
from maskgen.data.sources import Source, open_source
from maskgen.data.sources.digits import Digits
from maskgen.data.sources.tfds import scan_tf_record
from maskgen.errors import UserError

FORMATS = ("array_record", "tfrecord")


class Photos(tfds.core.GeneratorBasedBuilder):
  """Typical data sets of others: unneeded features, other names, several captions."""

  VERSION = tfds.core.Version("1.2.0")
  BUILDER_CONFIGS = [  # noqa: RUF012
    tfds.core.BuilderConfig(name=name)
    for name in ("lists", "nested", "single", "two_pictures", "none", "float32")
  ]

  def _info(self):
    image, text = tfds.features.Image(shape=(None, None, 3)), tfds.features.Text()
    features = {
      "lists": {
        "photo": image,
        "text": tfds.features.Sequence(text),
        "kind": tfds.features.ClassLabel(names=["a", "b"]),
      },
      "nested": {
        "image": image,
        "mask": tfds.features.Image(shape=(None, None, 1)),
        "captions": tfds.features.Sequence({"id": np.int64, "text": np.object_}),
        "label": np.int64,
      },
      "single": {
        "image": image,
        "caption": text,
        "boxes": tfds.features.Sequence(tfds.features.BBoxFeature()),
      },
      "two_pictures": {"left": image, "right": image},
      "none": {"text": text},
      "float32": {"image": tfds.features.Image(shape=(None, None, 1), dtype=np.float32)},
    }[self.builder_config.name]
    supervised = ("photo", "kind") if "kind" in features else None
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=supervised
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(7), "validation": self._generate_examples(2)}

  def _generate_examples(self, count):
    for i in range(count):
      picture, texts = np.full((4, 5, 3), i, np.uint8), [f"{i} {k}" for k in range(i % 3)]
      yield (
        i,
        {
          "lists": {"photo": picture, "text": texts, "kind": i % 2},
          "nested": {
            "image": picture,
            "mask": picture[..., :1],
            "captions": [{"id": 3, "text": text} for text in texts],
            "label": i,
          },
          "single": {"image": picture, "caption": f"é {i}", "boxes": []},
          "two_pictures": {"left": picture, "right": picture},
          "none": {"text": ""},
          "float32": {"image": picture[..., :1].astype(np.float32)},
        }[self.builder_config.name],
      )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A data folder for each format, with digits in several files, and the configs of Photos."""
  tfds.disable_progress_bar()
  folders = {}
  for file_format in FORMATS:
    folders[file_format] = tmp_path_factory.mktemp(file_format)
    options = {"data_dir": folders[file_format], "file_format": file_format}
    config = tfds.download.DownloadConfig(num_shards=3)
    Digits(**options).download_and_prepare(download_config=config)
    for name in Photos.builder_configs if file_format == "array_record" else ["lists"]:
      Photos(config=name, **options).download_and_prepare()
  return folders


@pytest.fixture(params=FORMATS)
def folder(request, folders, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(folders[request.param]))
  return folders[request.param]


@pytest.fixture
def array_records(folders, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(folders["array_record"]))
  return folders["array_record"]


def records(source: Source) -> list[dict]:
  return list(tf.data.Dataset.range(source.size).map(source.fetch).as_numpy_iterator())


def pairs(source: Source) -> list[tuple[bytes, int]]:
  return [(record["image"], int(record["label"])) for record in records(source)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits(folder, tmp_path, monkeypatch, split):
  source = open_source("tfds:digits", split)
  assert source.class_names == tuple("0123456789")
  ours = pairs(source)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))  # where the digits lie in one file, in the same order
  assert ours == pairs(open_source("digits", split))


def test_access_is_random_and_eager_too(folder):
  source = open_source("tfds:digits", "test")
  ours = pairs(source)
  for index in (359, 0, 121, 0):
    record = source.fetch(tf.constant(index, tf.int64))
    assert (record["image"].numpy(), int(record["label"])) == ours[index]


def test_digits_themselves_can_be_kept_in_either_format(folder):
  key = lambda pair: pair[0] + bytes([pair[1]])  # noqa: E731
  assert sorted(pairs(open_source("digits", "test")), key=key) == sorted(
    pairs(open_source("tfds:digits", "test")), key=key
  )


def test_parts_of_splits(folder):
  whole = pairs(open_source("tfds:digits", "train"))
  assert pairs(open_source("tfds:digits", "train[:90%]")) == whole[:1293]
  assert pairs(open_source("tfds:digits", "train[90%:]")) == whole[1293:]
  assert pairs(open_source("tfds:digits", "train[470:490]")) == whole[470:490]  # from two files
  both = open_source("tfds:digits", "test+train[-5:]")
  assert pairs(both) == pairs(open_source("tfds:digits", "test")) + whole[-5:]
  assert "digits-train" in both.describe(364) and "digits-test" in both.describe(0)


def test_fingerprint(folders, monkeypatch):
  prints = set()
  for file_format in FORMATS:
    monkeypatch.setenv("TFDS_DATA_DIR", str(folders[file_format]))
    prints |= {open_source("tfds:digits", split).fingerprint for split in ("train", "test", "train[:9]")}
  assert len(prints) == 3  # the records are the same in both formats


def test_record_is_named_by_its_file(folder):
  name = open_source("tfds:digits", "train").describe(480)
  assert name.startswith("record 1 in ") and "00001-of-00003" in name


def test_lists_of_captions_and_a_label_of_another_name(folder):
  for spec in ("tfds:photos/lists", "tfds:photos:lists"):
    source = open_source(spec, "train")
    assert source.class_names == ("a", "b") and source.size == 7
    for record in records(source):
      assert set(record) == {"image", "label", "caption"}
      number = int(tf.io.decode_image(record["image"])[0, 0, 0])
      assert record["label"] == number % 2
      texts = [f"{number} {k}".encode() for k in range(number % 3)]
      assert list(record["caption"]) == (texts or [b""])  # one at least
  assert tf.data.Dataset.range(1).map(source.fetch).element_spec["caption"] == tf.TensorSpec(
    [None], tf.string
  )


def test_nested_captions_and_numbers_that_are_not_labels(array_records):
  source = open_source("tfds:photos/nested", "train")
  assert source.class_names is None
  for record in records(source):
    assert set(record) == {"image", "caption"}
    number = int(tf.io.decode_image(record["image"])[0, 0, 0])
    assert list(record["caption"]) == ([f"{number} {k}".encode() for k in range(number % 3)] or [b""])


def test_single_caption(array_records):
  found = [record["caption"].tolist() for record in records(open_source("tfds:photos/single", "validation"))]
  assert sorted(found) == [["é 0".encode()], ["é 1".encode()]]


@pytest.mark.parametrize(
  ("name", "split", "message"),
  [
    ("photos/two_pictures", "train", "has several pictures, left, right"),
    ("photos/none", "train", "has no pictures, only text"),
    ("photos/float32", "train", "'image' of .* is float32: choose a data set of 8-bit"),
    ("photos/lists", "test", "no split 'test', only train, validation: set config.data.eval_split to 'valid"),
    ("digits", "train+val", "no split 'val', only test, train: choose one of these, or a part"),
    ("digits", "test[:999]", r"'test\[:999\]' of TFDS data set 'digits' is malformed \(Requested slice"),
    ("digits", "test[:x]", r"'test\[:x\]' of TFDS data set 'digits' is malformed"),
    ("digits", "test[5:3]", "is empty"),
    ("photos", "train", "has configs: write photos/float32 or photos/lists or "),
    ("photos/list", "train", "'photos/list' is not prepared in .* or use photos/float32 or photos/lists"),
    ("a b", "train", "'a b' is not the name"),
  ],
)
def test_what_cannot_be_opened(array_records, name, split, message):
  with pytest.raises(UserError, match=message):
    open_source(f"tfds:{name}", split)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    (
      "cifar10",
      r"'cifar10' is not prepared in '.*' \(TFDS_DATA_DIR\): run python -m .*prepare_data --name=cifar10$",
    ),
    ("coco/2014", "--name=coco/2014$"),
    (
      "imagenet2012",
      "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into '.*/downloads/manual' and run",
    ),
    ("cifar-10", "'cifar-10' is unknown.*did you mean 'cifar10'"),
    ("digist", "did you mean 'digits'"),
  ],
)
def test_data_that_is_not_prepared_is_named_at_once(tmp_path, monkeypatch, name, message):
  def refuse(*args, **kwargs):
    raise AssertionError("a connection")

  for call in ("connect", "connect_ex"):
    monkeypatch.setattr(socket.socket, call, refuse)
  monkeypatch.setattr(socket, "getaddrinfo", refuse)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  with pytest.raises(UserError, match=message):
    open_source(f"tfds:{name}", "train")


def test_highest_complete_version_is_taken(array_records, tmp_path, monkeypatch):
  for version in ("1.0.0", "1.10.0", "1.9.0", "2.0.0", "incomplete.X_3.0.0"):
    shutil.copytree(array_records / "digits" / "1.0.0", tmp_path / "digits" / version)
  (tmp_path / "digits" / "2.0.0" / "dataset_info.json").unlink()
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  assert "/digits/1.10.0/" in open_source("tfds:digits", "train").describe(0)


def test_damaged_files(folders, tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  shutil.copytree(folders["tfrecord"] / "digits", tmp_path / "digits")
  path = next((tmp_path / "digits" / "1.0.0").glob("digits-test.*-00000-of-00003"))
  content = path.read_bytes()
  path.write_bytes(content[:-1])
  with pytest.raises(UserError, match=f"'{path}' ends within a record"):
    open_source("tfds:digits", "test")
  first = int.from_bytes(content[:8], "little") + 16
  path.write_bytes(content[first:])
  with pytest.raises(UserError, match=f"'{path}' has 119 records instead of 120"):
    open_source("tfds:digits", "test")
  path.unlink()
  with pytest.raises(UserError, match=f"'{path}' cannot be read"):
    open_source("tfds:digits", "test")

  shutil.rmtree(tmp_path / "digits")
  shutil.copytree(folders["array_record"] / "digits", tmp_path / "digits")
  path = next((tmp_path / "digits" / "1.0.0").glob("digits-test.*-00000-of-00003"))
  path.write_bytes(path.read_bytes()[:1000])
  source = open_source("tfds:digits", "test")
  with pytest.raises(UserError, match=f"'{path}' cannot be read"):
    source.fetch(tf.constant(0, tf.int64))
  assert source.fetch(tf.constant(200, tf.int64))["image"].dtype == tf.string  # from another file


def test_remote_files_are_scanned_alike(folders):
  for path in (folders["tfrecord"] / "digits" / "1.0.0").glob("*.tfrecord-*-of-00003"):
    tf.io.gfile.copy(str(path), f"ram://{path.name}", overwrite=True)
    here, there = scan_tf_record(str(path)), scan_tf_record(f"ram://{path.name}")
    np.testing.assert_array_equal(here["offset"], there["offset"])
    np.testing.assert_array_equal(here["length"], there["length"])
    content = [path.read_bytes()[o : o + n] for o, n in zip(here["offset"], here["length"], strict=True)]
    assert content == list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())


def test_other_formats_are_refused(array_records, tmp_path, monkeypatch):
  shutil.copytree(array_records / "digits", tmp_path / "digits")
  path = tmp_path / "digits" / "1.0.0" / "dataset_info.json"
  path.write_text(path.read_text().replace("array_record", "riegeli"))
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  with pytest.raises(UserError, match="is stored in riegeli files: prepare it as array_record instead"):
    open_source("tfds:digits", "train")
