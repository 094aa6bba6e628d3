"""Damaged records: their substitutes, the limit on their number, and what is logged."""

import itertools
import json
import tarfile

import numpy as np
import pytest
from etils import epath
from PIL import Image

from maskgen.data import reader
from maskgen.data.pipeline import Data
from maskgen.data.skipped import FILE
from maskgen.errors import UserError

PLAIN = "decode|resize(8)"
CUT = "decode|random_crop(8)"
SIZE = 60
DAMAGED = (3, 4, 17, 40, 41)


def pictures(root, size=SIZE, damaged=DAMAGED):
  """A folder with splits; picture i has the grey level i."""
  for split, count in (("train", size), ("test", 12)):
    (root / split).mkdir()
    for i in range(count):
      file = root / split / f"{i:03d}.png"
      Image.new("RGB", (12, 12), (i, i, i)).save(file)
      if split == "train" and i in damaged:
        file.write_bytes(file.read_bytes()[:50])
  (root / "test" / "005.png").write_text("no picture")
  return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return pictures(tmp_path_factory.mktemp("pictures"))


def data(folder, preprocess=CUT, **options):
  return Data(f"folder:{folder}", preprocess, PLAIN, 8, **options)


@pytest.fixture(scope="module")
def whole(folder):
  """Data whose damage in training is known, and their first 20 batches."""
  opened = data(folder)
  return opened, take(opened.train_batches(), 20)


def take(batches, count):
  return list(itertools.islice(batches, count))


def assert_equal(one, two):
  for a, b in zip(one, two, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def test_batches_are_full_and_hold_no_damaged_record(folder):
  batches = take(data(folder, PLAIN).train_batches(), 16)  # two epochs and a bit
  records = np.concatenate([batch["record"] for batch in batches])
  assert len(records) == 128 and not set(records) & set(DAMAGED)
  assert set(range(SIZE)) - set(records) == set(DAMAGED)
  levels = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])
  np.testing.assert_array_equal(levels, records)


def test_batches_do_not_depend_on_when_damage_was_found(folder, whole):
  veteran, batches = whole
  for start in (1, 13):
    assert_equal(take(data(folder).train_batches(start), 20 - start), batches[start:])
  assert_equal(take(veteran.train_batches(), 20), batches)


def test_batches_are_the_same_for_any_number_of_processes(folder, whole):
  parts = [take(data(folder, process_index=i, process_count=2).train_batches(), 16) for i in range(2)]
  joined = [
    {key: np.concatenate([part[key] for part in step]) for key in step[0]}
    for step in zip(*parts, strict=True)
  ]
  assert_equal(joined, whole[1][:16])


def test_evaluation_masks_what_takes_another_place(whole):
  opened, _ = whole
  batches = list(opened.eval_batches("eval", 8))
  valid = np.concatenate([batch["valid"] for batch in batches])
  records = np.concatenate([batch["record"] for batch in batches])
  assert len(valid) == 16
  assert sorted(records[valid]) == [i for i in range(12) if i != 5]
  train = list(opened.eval_batches("train", 8))
  assert sum(int(batch["valid"].sum()) for batch in train) == SIZE - len(DAMAGED)


def test_skipped_records_are_named(folder, whole, tmp_path):
  opened = data(folder)
  opened.skipped.attach(epath.Path(tmp_path), 0)
  take(opened.train_batches(), 8)
  list(opened.eval_batches("eval", 8))
  list(opened.eval_batches("train", 8))
  assert opened.skipped.flush(3) < len(DAMAGED) and opened.skipped.flush(8) == len(DAMAGED) + 1
  lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
  assert len(lines) == len(DAMAGED) + 1
  assert {line["record"] for line in lines} == {str(folder / "test" / "005.png")} | {
    str(folder / "train" / f"{i:03d}.png") for i in DAMAGED
  }
  assert {line["step"] for line in lines} == {3, 8} and all(line["reason"] for line in lines)
  # Found again by a run that continues from before, and not written twice.
  again = data(folder)
  again.skipped.attach(epath.Path(tmp_path), 2)
  assert len(again.skipped) == 0 and not (tmp_path / FILE).read_text()
  take(again.train_batches(), 8)
  assert again.skipped.flush(8) == again.skipped.flush(9) == len(DAMAGED)
  # Known to one that continues from after.
  known = data(folder)
  known.skipped.attach(epath.Path(tmp_path), 8)
  assert len(known.skipped) == len(DAMAGED)
  assert_equal(take(known.train_batches(), 8), whole[1][:8])
  assert len((tmp_path / FILE).read_text().splitlines()) == len(DAMAGED)


def test_too_many_stop_the_run_with_their_list(tmp_path):
  folder = pictures(tmp_path, damaged=range(21))
  opened = data(folder)
  opened.skipped.attach(epath.Path(tmp_path), 0)
  with pytest.raises(
    UserError, match=r"^21 of the 60 records .*folder.* cannot be used; repair or remove them: /"
  ):
    take(opened.train_batches(), 8)
  assert len((tmp_path / FILE).read_text().splitlines()) == 21


def test_nothing_left_stops_the_run(tmp_path):
  folder = pictures(tmp_path, size=3, damaged=range(3))
  with pytest.raises(UserError, match=r"^3 of the 3 records"):
    take(data(folder).train_batches(), 1)


def test_a_picture_too_small_for_a_crop_is_skipped(tmp_path):
  folder = pictures(tmp_path, damaged=())
  Image.new("RGB", (6, 6)).save(folder / "train" / "007.png")
  opened = data(folder, "decode|random_crop(8)")
  take(opened.train_batches(), 8)
  assert opened.skipped.flush(8) == len(opened.skipped) == 1


def test_a_file_that_vanished_is_skipped(tmp_path):
  folder = pictures(tmp_path)
  opened = data(folder)
  (folder / "train" / "020.png").unlink()
  records = np.concatenate([batch["record"] for batch in take(opened.train_batches(), 8)])
  assert len(opened.skipped) == len(DAMAGED) + 1 and 20 not in records


def many(root, split, size, damaged):
  (root / split).mkdir(parents=True, exist_ok=True)
  for i in range(size):
    file = root / split / f"{i:03d}.png"
    Image.new("RGB", (12, 12), (i, i, i)).save(file)
    if i in damaged:
      file.write_text("<html>Not found</html>")


@pytest.mark.parametrize(("cores", "kind"), [(8, "folder"), (32, "tar")])  # 16 and 64 threads
def test_a_damaged_record_that_stands_several_times_in_a_batch_is_skipped_alone(
  tmp_path, monkeypatch, cores, kind
):
  monkeypatch.setattr(reader, "_cores", lambda: cores)
  many(tmp_path, "train", 130, {4, 129})
  many(tmp_path, "test", 10, {4})
  source = f"folder:{tmp_path}"
  if kind == "tar":
    for split in ("train", "test"):
      with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
        archive.add(tmp_path / split, split)
    source = f"tar:{tmp_path}/{{split}}.tar"
  found = []
  for _ in range(2):
    opened = Data(source, PLAIN, PLAIN, 400, eval_split="test")
    (batch,) = opened.eval_batches("eval", 32)
    assert sorted(batch["record"][batch["valid"]]) == [i for i in range(10) if i != 4]
    assert opened.skipped.flush(0) == 1
    train = take(opened.train_batches(), 1)[0]["record"]
    assert set(train) == set(range(130)) - {4, 129}
    assert opened.skipped.flush(9) == 3
    found.append(train)
  np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(("quota", "cores"), [("250000 100000", 2), ("50000 100000", 1), ("max 100000", 5)])
def test_threads_follow_affinity_and_quota(tmp_path, monkeypatch, quota, cores):
  (tmp_path / "cpu.max").write_text(quota)
  monkeypatch.setattr(reader, "_QUOTA", str(tmp_path / "cpu.max"))
  monkeypatch.setattr(reader.os, "sched_getaffinity", lambda _: set(range(5)), raising=False)
  assert reader._cores() == cores
