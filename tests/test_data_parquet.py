"""Parquet files in the layout of the Hugging Face Hub."""

import io
import json
import logging
import sys

import numpy as np
import pytest
import tiny
from etils import epath
from PIL import Image
from test_errors import assert_clear

from maskgen.data import pipeline
from maskgen.data.cpu_tf import tf
from maskgen.data.sources import open_source, parquet
from maskgen.errors import UserError
from maskgen.tools import show_data

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: the source parquet is not tested")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ["cat", "dog", "fox"]
ROWS, GROUP = 40, 7


def picture(number: int) -> bytes:
  buffer = io.BytesIO()
  Image.new("RGB", (9, 8), (number * 5 % 256, 100, 200)).save(buffer, "PNG")
  return buffer.getvalue()


def write(path, numbers=range(ROWS), *, names=NAMES, group=GROUP, **columns):
  """Writes records as `datasets` does; `columns` replace those of this name, or remove it by None."""
  numbers = list(numbers)
  content = {
    "image": [{"bytes": picture(number), "path": f"{number}.png"} for number in numbers],
    "label": [number % 3 for number in numbers],
    "text": [f"picture {number}" for number in numbers],
    "id": numbers,
  }
  content = {key: value for key, value in {**content, **columns}.items() if value is not None}
  features = {"image": {"_type": "Image"}, "id": {"_type": "Value"}}
  if names:
    features["label"] = {"_type": "ClassLabel", "names": names}
  table = pa.table(content)
  table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
  pq.write_table(table, path, row_group_size=group)
  return f"parquet:{path}"


def records(source, split="train"):
  """All records of a split as a `tf.data` map gives them, by name."""
  opened = open_source(source, split)
  found = tf.data.Dataset.range(opened.size).map(opened.fetch, 4).as_numpy_iterator()
  return {opened.describe(number): record for number, record in enumerate(found)}


def numbers_of(found):
  return sorted(int(record["caption"][0].split()[-1]) for record in found.values())


def test_records_are_the_rows(tmp_path):
  source = write(tmp_path / "a.parquet")
  train, test = records(source), records(source, "test")
  assert len(test) == ROWS // 10 and not train.keys() & test.keys()
  found = train | test
  for number in range(ROWS):
    record = found[f"row {number} of a.parquet"]
    assert record["image"] == picture(number)
    assert record["label"] == number % 3
    assert record["caption"].tolist() == [f"picture {number}".encode()]
  assert open_source(source, "train").class_names == tuple(NAMES)
  assert (tmp_path / "a.parquet.index.npz").exists()


def test_files_of_the_hub_are_splits(tmp_path):
  for shard in range(2):
    write(tmp_path / f"train-0000{shard}-of-00002.parquet", range(shard * 10, shard * 10 + 10))
  write(tmp_path / "validation-00000-of-00001.parquet", range(20, 25))
  for source in (f"parquet:{tmp_path}/*.parquet", f"parquet:{tmp_path}/{{split}}-*.parquet"):
    assert numbers_of(records(source)) == list(range(20))
    assert numbers_of(records(source, "validation")) == list(range(20, 25))
  assert numbers_of(records(f"parquet:{tmp_path}/*.parquet", "test")) == list(range(20, 25))
  with pytest.raises(UserError, match=r"split 'tran' of .* is unknown; did you mean 'train'"):
    open_source(f"parquet:{tmp_path}/*.parquet", "tran")


def test_columns_are_chosen_by_name(tmp_path):
  write(
    tmp_path / "a.parquet",
    names=None,
    image=None,
    photo=[picture(number) for number in range(ROWS)],
    label=None,
    species=[f"s{11 - number % 2}" for number in range(ROWS)],
    text=None,
    alt=[[f"picture {number}", " ", "b\nc"] for number in range(ROWS)],
  )
  source = f"parquet:{tmp_path}/a.parquet#label=species,caption=alt"
  assert open_source(source, "train").class_names == ("s10", "s11")
  for name, record in records(source).items():
    number = int(name.split()[1])
    assert record["image"] == picture(number)
    assert record["label"] == 1 - number % 2
    assert record["caption"].tolist() == [f"picture {number}".encode(), b"b c"]
  plain = open_source(f"parquet:{tmp_path}/a.parquet", "train")
  assert plain.class_names is None and plain.fetch(tf.constant(0, tf.int64)).keys() == {"image"}


def test_labels_and_captions_that_some_lack_are_not_used(tmp_path, caplog):
  labels = [None if number == 3 else number % 3 for number in range(ROWS)]
  source = write(tmp_path / "a.parquet", label=labels, text=["", *["x"] * (ROWS - 1)])
  opened = open_source(source, "train")
  assert opened.class_names is None
  assert "1 of the 40 records of parquet" in opened.lacks["label"] and "row 3 of" in opened.lacks["label"]
  assert "row 0 of a.parquet: give one to all" in opened.lacks["caption"]
  assert opened.fetch(tf.constant(0, tf.int64)).keys() == {"image"}


def data(source):
  return pipeline.Data(source, "decode|resize(8)|flip_lr", "decode|resize(8)", 4, seed=3)


def test_a_run_continues_at_the_next_record(tmp_path, monkeypatch):
  source = write(tmp_path / "a.parquet")
  monkeypatch.setattr(parquet, "_CACHE_BYTES", 2000)  # groups are dropped and read again
  whole = data(source).train_batches()
  expected = [next(whole) for _ in range(12)]
  later = data(source).train_batches(9)
  for before in expected[9:]:
    batch = next(later)
    for key in ("image", "label", "record"):
      np.testing.assert_array_equal(batch[key], before[key])
  seen = np.concatenate([batch["record"] for batch in expected[:9]])
  assert sorted(seen.tolist()) == list(range(36))  # every epoch is a full shuffle


def test_other_records_are_noticed(tmp_path):
  def fingerprint(**options):
    return open_source(write(tmp_path / "a.parquet", **options), "train").fingerprint

  first = fingerprint()
  assert fingerprint() == first
  changed = [fingerprint(numbers=range(1, ROWS + 1)), fingerprint(names=["cat", "dog", "wolf"])]
  changed.append(fingerprint(text=["other"] * ROWS))
  assert len({first, *changed}) == 4


def test_damaged_records_are_replaced(tmp_path, caplog):
  images = [{"bytes": picture(number), "path": None} for number in range(ROWS)]
  images[5]["bytes"], images[6]["bytes"], images[7] = None, picture(6)[:40], None
  source = write(tmp_path / "a.parquet", image=images)
  read = data(source)
  read.skipped.attach(epath.Path(tmp_path), 0)
  batches = read.train_batches()
  for _ in range(9):
    next(batches)
  read.skipped.flush(9)
  named = [json.loads(line)["record"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
  train = {read.describe([index])[0] for index in range(read.num_train)}
  assert set(named) == {f"row {number} of a.parquet" for number in (5, 6, 7)} & train


def test_a_damaged_group_damages_its_records_alone(tmp_path):
  path = tmp_path / "a.parquet"
  source = write(path, image=[{"bytes": picture(n) + bytes(3000), "path": None} for n in range(ROWS)])
  chunk = pq.ParquetFile(path).metadata.row_group(2).column(0)
  content = bytearray(path.read_bytes())
  start = chunk.data_page_offset
  content[start : start + 400] = bytes(range(200)) * 2
  path.write_bytes(content)
  opened = open_source(source, "train")
  failed = set()
  for number in range(opened.size):
    try:
      opened.fetch(tf.constant(number, tf.int64))
    except tf.errors.InvalidArgumentError as error:
      assert "row group 2 of" in str(error)
      failed.add(int(opened.describe(number).split()[1]))
  assert failed and failed <= set(range(14, 21))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("cut", "a.parquet' is not a Parquet file, or is damaged or truncated"),
    ("#image=x", "has no column 'x' for its images; known: "),
    ("#image=label", "has no column of pictures, .* among image, label, text, id: name one by"),
    ("#label=image", "the column 'image' has no labels but struct"),
    ("#picture=image", "has 'picture=image' after '#': write image=COLUMN"),
    ("names", "has the label 2, but it names 2 classes: name another column by '#label='"),
    ("none", "cannot be found"),
    ("absent", "needs pyarrow .*: pip install 'maskgen.parquet.'"),
  ],
)
def test_wrong_files_and_columns(change, message, tmp_path, monkeypatch):
  source = write(tmp_path / "a.parquet", names=NAMES[:2] if change == "names" else NAMES)
  if change == "cut":
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
  elif change == "absent":
    monkeypatch.setitem(sys.modules, "pyarrow", None)
  elif change == "none":
    source = f"parquet:{tmp_path}/b.parquet"
  elif change.startswith("#"):
    source += change
  with pytest.raises(UserError, match=message) as error:
    open_source(source, "train")
  assert_clear(error)


def test_large_groups_are_said(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(parquet, "_CACHE_BYTES", 100)
  images = [{"bytes": bytes(10**7), "path": None}, {"bytes": b"x", "path": None}]
  with caplog.at_level(logging.INFO, "maskgen"):
    open_source(write(tmp_path / "a.parquet", range(2), image=images), "train")
  assert "has row groups of up to 10 MB" in caplog.text


def test_show_data_draws_them(tmp_path, capsys):
  source = write(tmp_path / "a.parquet")
  out = tmp_path / "look.png"
  show_data.main([f"--config={tiny.FILE}:only=tokenizer", f"--config.data.source={source}", f"--out={out}"])
  printed = capsys.readouterr().out
  assert out.exists() and f"training: parquet '{tmp_path}/a.parquet', split 'train', 36 records" in printed
