"""Tar archives in the layout of WebDataset."""

import io
import json
import logging
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from maskgen.data.cpu_tf import tf
from maskgen.data.sources import Source, open_source
from maskgen.data.tar_index import json_captions, scan
from maskgen.errors import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def _tar(path, members: dict[str, bytes] | list[tuple[str, bytes]], form: str = "pax") -> str:
  """Writes an archive of members with these contents."""
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[form]) as archive:
    for name, content in members.items() if isinstance(members, dict) else members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  tf.io.gfile.makedirs(os.path.dirname(str(path)))
  with tf.io.gfile.GFile(str(path), "wb") as file:
    file.write(buffer.getvalue())
  return str(path)


def _records(spec, split: str = "train") -> dict[str, dict]:
  """All records of a source as a `tf.data` map gives them, by name."""
  opened = open_source(f"tar:{spec}", split)
  found = tf.data.Dataset.range(opened.size).map(opened.fetch, 2).as_numpy_iterator()
  return {opened.describe(i): record for i, record in enumerate(found)}


def _both(spec) -> dict[str, dict]:
  train, test = _records(spec), _records(spec, "test")
  assert not train.keys() & test.keys()
  return train | test


def _open(path, split: str = "train") -> Source:
  return open_source(f"tar:{path}", split)


@pytest.mark.parametrize("form", FORMATS)
def test_records_are_the_members(tmp_path, form):
  rng = np.random.default_rng(0)
  long = "long " * 18 if form == "ustar" else "long " * 60
  keys = ["1", "a/1", "a/b 猫,ü", f"{'d' * 90}/{long}", "new\nline", "x"]
  contents = {key: rng.bytes(size) for key, size in zip(keys, (0, 1, 511, 512, 513, 5000), strict=True)}
  members = [("a", b"")]
  for label, (key, content) in enumerate(contents.items()):
    members += [(f"{key}.PNG", content), (f"{key}.cls", f" {label}\n".encode())]
    members += [(f"{key}.txt", f"{label}\n\nzwei ü \r\n".encode()), (f"{key}.other.jpg", b"mask")]
  path = _tar(tmp_path / "x.tar", members, form)
  assert _open(path).class_names == tuple("012345")
  for _ in range(2):  # the second time from the index file
    found = _both(path)
    assert found.keys() == {f"{key} in x.tar" for key in keys}
    for label, (key, content) in enumerate(contents.items()):
      record = found[f"{key} in x.tar"]
      assert record["image"] == content and record["label"] == label
      assert record["caption"].tolist() == [f"{label}".encode(), "zwei ü".encode()]
  assert sorted(os.listdir(tmp_path)) == ["x.tar", "x.tar.index.npz"]


def test_what_is_no_member_of_a_record(tmp_path, caplog):
  path = _tar(
    tmp_path / "x.tar",
    {"./1.jpg": b"1", "._1.jpg": b"mac", "__MACOSX/2.jpg": b"mac", ".git/3.jpg": b"hidden", "4.txt": b"alone",
     "readme": b"5", "d.ir/6.jpg": b"6"},
  )  # fmt: skip
  with tarfile.open(path, "a") as archive:
    for name, kind in (("7.jpg", tarfile.SYMTYPE), ("8.jpg", tarfile.LNKTYPE), ("9.jpg", tarfile.DIRTYPE)):
      info = tarfile.TarInfo(name)
      info.type, info.linkname = kind, "1.jpg"
      archive.addfile(info)
  with caplog.at_level(logging.INFO, "maskgen"):
    found = _both(path)
  assert found == {
    "1 in x.tar": {"image": b"1"},
    "d.ir/6 in x.tar": {"image": b"6"},
  }
  assert "ignored 2 records without a picture, such as 4" in caplog.text


def test_shards_splits_and_class_names(tmp_path):
  for split, shards in (("train", 3), ("val", 2)):
    for shard in range(shards):
      members = {}
      for i in range(4):
        members |= {f"{split}{shard}{i}.jpg": b"%d" % i, f"{split}{shard}{i}.cls": b"%d" % i}
      _tar(tmp_path / f"{split}-{shard:02}.tar", members)
  (tmp_path / "classes.txt").write_text("\ufeffcat\ncrane\ncrane\nzebra fish\nno picture\n\n", "utf-8")
  opened = _open(f"{tmp_path}/{{split}}-{{00..01}}.tar", "val")
  assert opened.size == 8
  assert opened.class_names == ("cat", "crane", "crane", "zebra fish", "no picture")
  assert opened.describe(5) == "val11 in val-01.tar"
  assert list(_records(f"{tmp_path}/{{split}}-*.tar")) == [
    f"train{shard}{i} in train-{shard:02}.tar" for shard in range(3) for i in range(4)
  ]
  assert len(_both(f"{tmp_path}/train-{{00,02}}.tar")) == 8
  (tmp_path / "classes.txt").write_text("cat\ncrane\n")
  with pytest.raises(UserError, match="names 2 classes, but there is label 3"):
    _open(f"{tmp_path}/train-00.tar")


def test_a_split_without_the_last_classes_has_those_of_training(tmp_path):
  for split, labels in (("train", "02"), ("test", "01"), ("other", "0")):
    members = {f"{label}.{kind}": label.encode() for label in labels for kind in ("jpg", "cls")}
    _tar(tmp_path / f"{split}.tar", members)
  for split in ("train", "test", "other"):
    assert _open(f"{tmp_path}/{{split}}.tar", split).class_names == ("0", "1", "2")
  (tmp_path / "train.tar").unlink()
  assert _open(f"{tmp_path}/{{split}}.tar", "test").class_names == ("0", "1")


def test_the_tenth_depends_on_keys_alone(tmp_path):
  members = [(f"{i}.jpg", b"%d" % i) for i in range(95)]
  _tar(tmp_path / "all.tar", members)
  _tar(tmp_path / "part0.tar", members[50:])
  _tar(tmp_path / "part1.tar", members[:50])
  held_out = [
    {name.split()[0] for name in _records(f"{tmp_path}/{name}", "test")} for name in ("all.tar", "part*.tar")
  ]
  assert held_out[0] == held_out[1] and len(held_out[0]) == 10
  assert _open(tmp_path / "all.tar").size == 85
  with pytest.raises(UserError, match=r"split 'tset' of tar .* is unknown; did you mean 'test'"):
    _open(tmp_path / "all.tar", "tset")


class TestJson:
  @pytest.mark.parametrize(
    ("value", "label", "captions"),
    [
      ({"label": 3, "caption": "a\n cat", "id": 7}, 3, ["a cat"]),
      ({"cls": 1, "label": 3, "caption": ["a cat", " ", "ü猫"]}, 1, ["a cat", "ü猫"]),
      ({"label": 0}, 0, None),
      ({"label": "cat", "caption": None}, None, None),
      ({"label": True, "caption": "x"}, None, ["x"]),
      ({}, None, None),
    ],
  )
  def test_values(self, tmp_path, value, label, captions):
    members = {}
    for i in range(2):
      members |= {f"{i}.json": json.dumps(value).encode(), f"{i}.jpg": b"x"}
    for record in _both(_tar(tmp_path / "x.tar", members)).values():
      assert record.get("label") == label
      assert ("caption" in record) == (captions is not None)
      if captions:
        assert [caption.decode() for caption in record["caption"]] == captions

  def test_members_of_their_own_come_first(self, tmp_path):
    value = b'{"label": 1, "caption": "from json"}'
    members = {}
    for i in range(2):
      members |= {f"{i}.jpg": b"", f"{i}.cls": b"0", f"{i}.json": value, f"{i}.txt": b"from txt"}
    for record in _both(_tar(tmp_path / "x.tar", members)).values():
      assert record["label"] == 0 and record["caption"].tolist() == [b"from txt"]

  @pytest.mark.parametrize(
    "value",
    [b"", b"[]", b"{", b'{"caption": 3}', b'{"caption": ["a", 3]}', b"\xff", b'{"a":' + b"[" * 200_000],
  )
  def test_malformed(self, value):
    with pytest.raises(ValueError):
      json_captions(value)


class TestErrors:
  @pytest.mark.parametrize(
    ("members", "message"),
    [
      ({"1.jpg": b"", "1.cls": b"cat"}, "'1.cls' in '.*x.tar' is malformed .'cat' is not a label"),
      ({"1.jpg": b"", "1.cls": b""}, "'1.cls' in .* is malformed"),
      ({"1.jpg": b"", "1.cls": b"-1"}, "'1.cls' in .* is malformed"),
      ({"1.jpg": b"", "1.cls": b"9999999"}, "'1.cls' in .*label 9999999 is too large"),
      ({"1.jpg": b"", "1.json": b'{"label": -1}'}, "'1.json' in .*-1 is not a label"),
      ({"1.jpg": b"", "1.json": b"{"}, "'1.json' in '.*x.tar' is malformed"),
      ({"1.jpg": b"", "1.json": b"[1]"}, "'1.json' in .* is not a JSON object"),
      ({"1.jpg": b"", "1.json": b"[" * 200_000}, "'1.json' in .* is nested too deeply"),
      ({"1.jpg": b"", "1.PNG": b""}, "'1.PNG' in .* is the second picture of '1'"),
      ([("1.jpg", b""), ("./1.jpg", b"")], "'1.jpg' in .* is the second picture of '1'"),
      ({"1.heic": b"", "2.txt": b""}, "has no pictures"),
      ({}, "has no pictures"),
    ],
  )
  def test_members(self, tmp_path, members, message):
    with pytest.raises(UserError, match=message):
      _open(_tar(tmp_path / "x.tar", members))

  @pytest.mark.parametrize(
    ("members", "key", "reason"),
    [
      ({"2.cls": b"0"}, "label", "1 of the 2 records of .* no label, the first being 1 in x.tar"),
      ({"1.txt": b"a"}, "caption", "1 of the 2 records of .* no caption, the first being 2 in x.tar"),
      ({"1.txt": b"a", "2.txt": b""}, "caption", "no caption, the first being 2 in x.tar"),
    ],
  )
  def test_what_only_some_records_have_is_not_used(self, tmp_path, members, key, reason):
    path = _tar(tmp_path / "x.tar", {"1.jpg": b"", "2.jpg": b""} | members)
    assert all(key not in record for record in _both(path).values())
    assert re.search(reason, _open(path).lacks[key])

  @pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
  def test_compressed(self, tmp_path, mode):
    with tarfile.open(tmp_path / f"x.tar.{mode}", f"w:{mode}"):
      pass
    with pytest.raises(UserError, match=f"x.tar.{mode}' is compressed with .*: unpack it"):
      _open(tmp_path / f"x.tar.{mode}")

  def test_every_cut_is_noticed(self, tmp_path):
    path = Path(_tar(tmp_path / "x.tar", {"1.jpg": bytes(700), "2.jpg": bytes(100)}))
    whole = path.read_bytes()
    # Header and two blocks, header and one block, the first block of the end mark.
    for cut in (*range(0, 6 * 512, 64), 511, 513, 1511, 2560, 3 * 512 - 1, 5 * 512 - 1):
      path.write_bytes(whole[:cut])
      with pytest.raises(UserError, match=r"x.tar' is not a tar archive, or is damaged or truncated"):
        scan(str(path))
    path.write_bytes(whole[: 6 * 512])
    assert len(scan(str(path))["key"]) == 2

  def test_a_damaged_header_is_noticed(self, tmp_path):
    path = Path(_tar(tmp_path / "x.tar", {"1.jpg": bytes(700), "2.jpg": bytes(100)}))
    content = bytearray(path.read_bytes())
    content[3 * 512 + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x.tar' is not a tar archive, or is damaged"):
      _open(path)

  def test_no_archive(self, tmp_path):
    (tmp_path / "x.tar").write_bytes(b"not a tar file" * 1000)
    with pytest.raises(UserError, match=r"x.tar' is not a tar archive"):
      _open(tmp_path / "x.tar")

  def test_missing(self, tmp_path):
    _tar(tmp_path / "000.tar", {"1.jpg": b""})
    with pytest.raises(UserError, match=r"/001.tar' and 98 more of the 100 files .* cannot be found"):
      _open(f"{tmp_path}/{{000..099}}.tar")

  @pytest.mark.parametrize(
    ("field", "value", "message"),
    [
      (156, tarfile.GNUTYPE_SPARSE, r"'1.jpg' in .* is a sparse file"),
      (124, tarfile.itn(-1024, 12, tarfile.GNU_FORMAT), r"x.tar' .* damaged .*'1.jpg' has a negative size"),
      (124, tarfile.itn(-(2**60), 12, tarfile.GNU_FORMAT), r"'1.jpg' has a negative size"),
    ],
  )
  def test_wrong_headers(self, tmp_path, field, value, message):
    path = _tar(tmp_path / "x.tar", {"1.jpg": bytes(512)})
    content = bytearray(Path(path).read_bytes())
    content[field : field + len(value)] = value
    content[148:156] = b"%06o\0 " % tarfile.calc_chksums(_blank(content[:512]))[0]
    Path(path).write_bytes(content)
    with pytest.raises(UserError, match=message):
      _open(path)

  @pytest.mark.parametrize("pattern", ["x.tar", "*.tar"])
  def test_a_named_pipe(self, tmp_path, pattern):
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(UserError, match="cannot be found"):
      _open(tmp_path / pattern)

  def test_an_archive_cut_after_it_was_indexed_has_damaged_records(self, tmp_path):
    path = Path(_tar(tmp_path / "x.tar", {f"{i}.jpg": bytes(2000) for i in range(10)}))
    opened = _open(path)
    path.write_bytes(path.read_bytes()[:5000])
    assert opened.fetch(tf.constant(0, tf.int64))["image"] == bytes(2000)
    with pytest.raises(
      tf.errors.InvalidArgumentError, match=r"x.tar' ends before byte .*, the end of a record"
    ):
      list(tf.data.Dataset.range(opened.size).map(opened.fetch).as_numpy_iterator())


def _blank(header: bytes) -> bytes:
  """A header as its checksum is taken: with spaces in place of the checksum."""
  return bytes(header[:148]) + b" " * 8 + bytes(header[156:])


def test_contents_are_skipped_and_not_read(tmp_path):
  path, size = tmp_path / "x.tar", 1 << 36  # 64 GiB that are one hole on the disk
  with open(path, "wb") as file:
    for i in range(3):
      info = tarfile.TarInfo(f"{i}.jpg")
      info.size = size
      file.write(info.tobuf(tarfile.GNU_FORMAT))
      file.seek(size, os.SEEK_CUR)
    file.write(bytes(1024))
  index = scan(str(path))
  assert index["image_length"].tolist() == [size] * 3
  assert index["image_offset"].tolist() == [512 + i * (size + 512) for i in range(3)]


def test_another_store(tmp_path):
  root = f"ram:/{tmp_path}"
  members = {f"{i}.{kind}": b"%d" % (i % 2) for i in range(20) for kind in ("jpg", "cls", "txt")}
  _tar(f"{root}/x-0.tar", dict(list(members.items())[:30]))
  _tar(f"{root}/x-1.tar", dict(list(members.items())[30:]))
  _tar(tmp_path / "x-0.tar", dict(list(members.items())[:30]))
  _tar(tmp_path / "x-1.tar", dict(list(members.items())[30:]))
  for pattern in ("x-{0..1}.tar", "*.tar"):
    np.testing.assert_equal(_both(f"{root}/{pattern}"), _both(f"{tmp_path}/{pattern}"))
  assert tf.io.gfile.exists(f"{root}/x-1.tar.index.npz")


def test_fingerprint_tells_changes(tmp_path):
  base = {"1.jpg": b"x", "1.cls": b"0", "1.txt": b"ab", "2.jpg": b"x", "2.cls": b"1", "2.txt": b"cd"}
  changes = [
    {},
    {"1.jpg": b"xy"},
    {"1.cls": b"1"},
    {"2.txt": b"c"},
    {"3.jpg": b"", "3.cls": b"1", "3.txt": b"x"},
  ]
  fingerprints = []
  for i, change in enumerate(changes):
    for copy in ("one", "two"):
      path = _tar(tmp_path / copy / f"{i}.tar", {**base, **change})
      fingerprints.append(_open(path).fingerprint)
  assert fingerprints[::2] == fingerprints[1::2] and len(set(fingerprints)) == len(changes)
  assert _open(path).fingerprint != _open(path, "test").fingerprint


@pytest.mark.parametrize(("name", "count"), [("clothing256", 600), ("flickr8k_500", 500)])
def test_plain_archives_of_photos(tmp_path, name, count):
  if not SHARED.is_dir():
    pytest.skip(f"there are no photos at {SHARED}")
  path = tmp_path / f"{name}.tar"
  path.symlink_to(SHARED / f"{name}.tar")
  with tarfile.open(path) as archive:
    photos = {
      f"{os.path.splitext(member.name)[0]} in {name}.tar": archive.extractfile(member).read()
      for member in archive
      if member.name.endswith(".jpg")
    }
  found = _both(path)
  assert len(found) == count and found == {key: {"image": content} for key, content in photos.items()}
