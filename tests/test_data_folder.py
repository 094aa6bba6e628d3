"""Folders of pictures: classes, tables, captions, splits, and other stores than the local disk."""

import os
import pathlib
import re
import time

import numpy as np
import pytest
from PIL import Image

from maskgen import images
from maskgen.data import listing, pipeline, subset, tables
from maskgen.data.cpu_tf import tf
from maskgen.data.listing import list_pictures
from maskgen.data.reader import reason_of
from maskgen.data.sources import Source, open_source
from maskgen.errors import UserError


def _fetch(opened: Source, index: int) -> dict[str, np.ndarray]:
  return {key: value.numpy() for key, value in opened.fetch(tf.constant(index, tf.int64)).items()}


def _records(path, split: str = "train") -> dict[str, dict]:
  """All records of a folder as a `tf.data` map gives them, by name."""
  opened = open_source(f"folder:{path}", split)
  found = tf.data.Dataset.range(opened.size).map(opened.fetch, 2).as_numpy_iterator()
  root = str(path)
  return {opened.describe(i).removeprefix(f"{root}/"): record for i, record in enumerate(found)}


def _picture(path, colour=(255, 0, 0)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (6, 5), colour).save(path)


def _write(root, files: dict[str, str | bytes]):
  """Writes files below a folder of any store; those of pictures hold their own names."""
  for name, content in files.items():
    path = f"{root}/{name}"
    tf.io.gfile.makedirs(os.path.dirname(path))
    with tf.io.gfile.GFile(path, "wb") as file:
      file.write(content)


def _named(*names: str) -> dict[str, str | bytes]:
  return {name: name for name in names}


class TestFolder:
  def test_classes_and_splits(self, tmp_path):
    for split, count in (("train", 3), ("val", 2)):
      for name in ("zebra", "ärger 猫"):
        for i in range(count):
          _picture(tmp_path / split / name / f"{i}.PNG", (10 * i, 0, len(split)))
    train = open_source(f"folder:{tmp_path}", "train")
    assert train.size == 6 and train.class_names == ("zebra", "ärger 猫")
    assert [int(_fetch(train, i)["label"]) for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert tf.io.decode_image(_fetch(train, 4)["image"])[0, 0].numpy().tolist() == [10, 0, 5]
    assert train.describe(4) == str(tmp_path / "train" / "ärger 猫" / "1.PNG")
    for split in ("val", "test", "validation"):
      assert open_source(f"folder:{tmp_path}", split).size == 4

  @pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "Test"), ("training", "testing"), ("TRAINING", "Validation"), ("train", "eval")],
  )
  def test_other_names_of_splits(self, tmp_path, train, test):
    names = [f"{split}/{name}/1.jpg" for split in (train, test) for name in ("a", "b")]
    _write(tmp_path, _named(*names))
    assert list(_records(tmp_path, "train")) == names[:2]
    assert list(_records(tmp_path, "test")) == names[2:]
    assert open_source(f"folder:{tmp_path}", "train").class_names == ("a", "b")

  def test_several_folders_of_a_split(self, tmp_path):
    _write(tmp_path, _named("train/1.jpg", "Test/1.jpg", "testing/1.jpg"))
    with pytest.raises(UserError, match="has the folders 'Test' and 'testing' for the same split: rename"):
      open_source(f"folder:{tmp_path}", "train")
    _write(tmp_path, _named("test/2.jpg"))
    assert list(_records(tmp_path, "test")) == ["test/2.jpg"]

  def test_classes_named_by_numbers_are_in_numeric_order(self, tmp_path):
    _write(
      tmp_path / "folders", _named(*(f"{split}/{i}/1.jpg" for split in ("train", "val") for i in range(12)))
    )
    rows = "".join(f"{i}.jpg,{i}\n" for i in range(12))
    _write(
      tmp_path / "table", _named(*(f"{i}.jpg" for i in range(12))) | {"labels.csv": f"file,label\n{rows}"}
    )
    for root in (tmp_path / "folders", tmp_path / "table"):
      opened = open_source(f"folder:{root}", "train")
      assert opened.class_names == tuple(map(str, range(12)))
      for name, record in _records(root).items():
        assert record["label"] == int(name.removeprefix("train/").split("/")[0].split(".")[0])
    assert tables.in_order(["10", "9", "x"]) == ["10", "9", "x"]

  def test_flat_folder_has_no_labels_and_holds_a_tenth_out(self, tmp_path):
    for i in range(41):
      _picture(tmp_path / f"{i}.jpg")
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden.png").touch()
    train, test = (list_pictures(str(tmp_path), split) for split in ("train", "test"))
    assert train.labels is None and train.class_names is None
    assert len(test.paths) == 5 and len(train.paths) == 36
    assert not set(train.paths) & set(test.paths)
    assert train.paths == sorted(train.paths)
    assert "label" not in _fetch(open_source(f"folder:{tmp_path}", "train"), 0)

  def test_the_tenth_depends_on_relative_paths_alone(self, tmp_path):
    for root in ("one", "two"):
      for i in range(20):
        _picture(tmp_path / root / "class" / f"{i}.png")
    held_out = [list_pictures(str(tmp_path / root), "test").paths for root in ("one", "two")]
    names = [[os.path.basename(path) for path in paths] for paths in held_out]
    assert names[0] == names[1] and len(names[0]) == 2

  def test_symlink_loops_are_harmless(self, tmp_path):
    for name in ("a", "b"):
      _picture(tmp_path / name / "deep" / "x.png")
      (tmp_path / name / "up").symlink_to(tmp_path)
      (tmp_path / name / "self").symlink_to("self")
    (tmp_path / "loop").symlink_to(tmp_path)
    listings = [list_pictures(str(tmp_path), split) for split in ("train", "test")]
    assert listings[0].class_names == ("a", "b")
    assert sorted(path for listing in listings for path in listing.paths) == [
      str(tmp_path / name / "deep" / "x.png") for name in ("a", "b")
    ]

  def test_names_that_are_not_unicode(self, tmp_path):
    _picture(tmp_path / "fine.png")
    os.link(os.fsencode(tmp_path / "fine.png"), os.fsencode(tmp_path) + b"/\xff\xfe.png")
    sizes = [open_source(f"folder:{tmp_path}", split).size for split in ("train", "test")]
    assert sizes == [1, 1]
    assert all(_fetch(open_source(f"folder:{tmp_path}", s), 0)["image"] for s in ("train", "test"))

  @pytest.mark.parametrize(
    ("files", "split", "message"),
    [
      ([], "train", "has no pictures: put .jpg"),
      (["1.png"], "train", "split 'train' of data source .* is empty"),
      (["1.png"], "trian", "split 'trian' .* is unknown; did you mean 'train'"),
    ],
  )
  def test_errors(self, tmp_path, files, split, message):
    for name in files:
      _picture(tmp_path / name)
    with pytest.raises(UserError, match=message):
      open_source(f"folder:{tmp_path}", split)

  @pytest.mark.parametrize(
    ("files", "reason"),
    [
      (["train/a/1.png", "test/b/1.png"], "classes of 'train' and 'test' in .* differ in 'a': give both"),
      (["train/a/1.png", "test/1.png"], "classes of 'train' and 'test' in .* differ in 'a': give both"),
      (["a/1.png", "b/2.png", "loose.png"], "'loose.png' is next to the folders .* move it into one"),
    ],
  )
  def test_folders_that_are_no_classes(self, tmp_path, caplog, files, reason):
    _write(tmp_path, _named(*files))
    caplog.set_level("INFO")
    opened = open_source(f"folder:{tmp_path}", "test")
    assert opened.class_names is None and "label" not in _fetch(opened, 0)
    assert re.search(reason, opened.lacks["label"]) and re.search(
      f"labels cannot be used: .*{reason}", caplog.text
    )
    with pytest.raises(UserError, match=f"has no labels to choose by: .*{reason}"):
      subset.take(opened, shots=1, share=None, seed=0)

  def test_missing(self, tmp_path):
    with pytest.raises(UserError, match="/nothing' is not a folder"):
      open_source(f"folder:{tmp_path}/nothing", "train")


class TestPictures:
  def test_every_suffix_is_one_that_pillow_reads(self):
    Image.init()
    formats = Image.registered_extensions()
    assert all(formats[suffix] in Image.OPEN for suffix in listing.SUFFIXES)

  def test_suffixes_in_any_case_and_strange_names(self, tmp_path):
    names = ["a b.jpg", "a,b.JPEG", "line\nbreak.Png", "猫.TIFF", "é.webp", "x.y.avif", "q\"'.gif"]
    ignored = [".hidden.jpg", ".git/x.jpg", "__MACOSX/x.jpg", "deep/__MACOSX/x.jpg", "notes", "x.jpg.part"]
    folders = ["@eaDir", "@Recycle", "lost+found", "$RECYCLE.BIN", "System Volume Information", "#recycle"]
    ignored += [f"{name}/x.jpg" for name in (*folders, ".ipynb_checkpoints", "__pycache__")]
    _write(tmp_path, _named(*names, *ignored))
    assert open_source(f"folder:{tmp_path}", "train").class_names is None
    found = _records(tmp_path) | _records(tmp_path, "test")
    assert {name: record["image"].decode() for name, record in found.items()} == {n: n for n in names}

  def test_a_folder_named_like_a_picture_is_a_folder(self, tmp_path):
    _write(tmp_path, _named("x.jpg/1.jpg", "x.jpg/2.jpg", "y/3.jpg"))
    (tmp_path / "y" / "empty.png").mkdir()
    found = _records(tmp_path) | _records(tmp_path, "test")
    assert {name: int(record["label"]) for name, record in found.items()} == {
      "x.jpg/1.jpg": 0,
      "x.jpg/2.jpg": 0,
      "y/3.jpg": 1,
    }

  def test_what_is_ignored_is_said_once(self, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(listing, "SUFFIXES", tuple(set(listing.SUFFIXES) - {*images.HEIF_SUFFIXES}))
    caplog.set_level("INFO")
    names = [f"{i}.jpg" for i in range(9)] + ["a/1.MOV", "a/2.mov", "3.Heic", "labels.xls", "README", "1.txt"]
    _write(tmp_path, _named(*names))
    _write(tmp_path / "split", _named("train/1.jpg", "test/1.jpg", "later/2.jpg", "3.jpg", "labels.txt"))
    for split in ("train", "test", "train"):
      open_source(f"folder:{tmp_path}/split", split)
    open_source(f"folder:{tmp_path}/split/later", "test")
    open_source(f"folder:{tmp_path}", "test")
    beside, ignored, *others = [record.message for record in caplog.records]
    assert beside == f"folder '{tmp_path}/split': ignored '3.jpg', 'labels.txt', 'later' beside train, test"
    assert ignored == (
      f"folder '{tmp_path}': ignored files that are no pictures, 2 .mov, 2 .txt, 1 without an extension, "
      "1 .heic, 1 .xls (to read .heic: pip install -e '.[heif]')"
    )
    assert [other.split(":")[0] for other in others] == ["labels cannot be used", "captions cannot be used"]

  def test_named_pipes_are_ignored(self, tmp_path):
    _write(tmp_path, _named("1.jpg", "2.jpg"))
    os.mkfifo(tmp_path / "3.jpg")
    (tmp_path / "4.jpg").symlink_to("3.jpg")
    found = _records(tmp_path) | _records(tmp_path, "test")
    assert found.keys() == {"1.jpg", "2.jpg"}

  def test_links(self, tmp_path):
    _write(tmp_path / "elsewhere", _named("1.jpg", "deep/2.jpg"))
    root = tmp_path / "root"
    root.mkdir()
    (root / "one.jpg").symlink_to(tmp_path / "elsewhere" / "1.jpg")
    (root / "dangling.jpg").symlink_to("nothing")
    opened = [open_source(f"folder:{root}", split) for split in ("train", "test")]
    assert sum(source.size for source in opened) == 2
    for source in opened:
      for index in range(source.size):
        if "dangling" in source.describe(index):
          with pytest.raises(tf.errors.NotFoundError):
            _fetch(source, index)
        else:
          assert _fetch(source, index)["image"] == b"1.jpg"
    os.remove(root / "one.jpg"), os.remove(root / "dangling.jpg")
    (root / "class").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deep" / "again").symlink_to(tmp_path / "elsewhere" / "deep")
    sources = [open_source(f"folder:{root}", split) for split in ("train", "test")]
    names = [source.describe(i) for source in sources for i in range(source.size)]
    assert sorted(names) == [f"{root}/class/1.jpg", f"{root}/class/deep/2.jpg"]

  def test_other_stores_are_as_local_folders(self, tmp_path):
    files = {
      **{f"{split}/{i}.jpg": f"{split}{i}" for split in ("train", "test") for i in range(3)},
      "labels.csv": "file,label\n"
      + "".join(f"{split}/{i}.jpg,{'ab'[i % 2]}\n" for split in ("train", "test") for i in range(3)),
      **{f"{split}/{i}.txt": f"caption {i}" for split in ("train", "test") for i in range(3)},
    }
    _write(tmp_path, files)
    _write("ram://folder_of_test", files)
    for split in ("train", "test"):
      local, other = (_records(root, split) for root in (tmp_path, "ram://folder_of_test"))
      assert list(local) == list(other) == [f"{split}/{i}.jpg" for i in range(3)]
      for name in local:
        np.testing.assert_equal(local[name], other[name])
    _write("ram://classes_of_test", _named("b/1.jpg", "a/deep/2.jpg", "a/3.png", "c/notes"))
    assert open_source("folder:ram://classes_of_test", "train").class_names == ("a", "b")
    for spec in ("folder:ram://nothing_of_test", "folder:nowhere://x"):
      with pytest.raises(UserError, match="is not a folder"):
        open_source(spec, "train")

  def test_many_files_are_listed_fast(self, tmp_path):
    for i in range(20_000):
      os.close(os.open(f"{tmp_path}/{i:05d}.jpg", os.O_CREAT))
    start = time.process_time()
    assert open_source(f"folder:{tmp_path}", "train").size == 18_000
    assert time.process_time() - start < 3  # takes 0.2 s


class TestLabels:
  def test_table(self, tmp_path):
    names = ["1.jpg", "a,b.jpg", "deep/2 3.png", "deep/new\nline.png", "ü.gif"]
    labels = ["zebra", "katze, müde", "0", "zebra", "0"]
    rows = [f'"{name}","{label}"' for name, label in zip(names, labels, strict=True)]
    _write(tmp_path, _named(*names))
    for content in (
      "file,label\n" + "\n".join(rows),
      "\ufefffile,label\r\n" + "\r\n".join(rows) + "\r\n\r\n",
    ):
      _write(tmp_path, {"labels.csv": content.encode()})
      found = {}
      for split in ("train", "test"):
        opened = open_source(f"folder:{tmp_path}", split)
        assert opened.class_names == ("0", "katze, müde", "zebra")
        for name, record in _records(tmp_path, split).items():
          assert record["image"].decode() == name
          found[name] = opened.class_names[record["label"]]
      assert found == dict(zip(names, labels, strict=True))

  def test_tables_and_splits(self, tmp_path):
    pictures = [f"{split}/{name}.jpg" for split in ("train", "val") for name in ("x", "y")]
    _write(tmp_path, _named(*pictures))
    table = "file,label\ntrain/x.jpg,b\ntrain/y.jpg,c\nval/x.jpg,a\n./val//y.jpg,c\n"
    _write(tmp_path, {"labels.csv": table})  # of both: the classes are those of both
    for split, expected in (("train", [1, 2]), ("test", [0, 2])):
      assert open_source(f"folder:{tmp_path}", split).class_names == ("a", "b", "c")
      found = list(_records(tmp_path, split).values())
      assert [record["label"] for record in found] == expected
    (tmp_path / "labels.csv").unlink()
    _write(tmp_path, {"train/labels.csv": "file,label\nx.jpg,b\ny.jpg,c\n"})
    _write(tmp_path, {"val/labels.csv": "file,label\nx.jpg,c\ny.jpg,b\n"})
    assert [record["label"] for record in _records(tmp_path, "val").values()] == [1, 0]
    _write(tmp_path, {"val/labels.csv": "file,label\nx.jpg,c\ny.jpg,d\n"})
    reason = open_source(f"folder:{tmp_path}", "val").lacks["label"]
    assert re.search("classes of 'train' and 'val' .* differ in 'b'.*labels.csv", reason)

  @pytest.mark.parametrize(
    ("content", "message"),
    [
      ("", "line 1: the header is '': write 'file,label'"),
      ("file;label\n1.jpg;a", "line 1: the header is 'file;label': write 'file,label'"),
      ("file,label\n", "line 1: the table is empty"),
      ("file,label\n1.jpg,a\n", "no row for 1 of 2 pictures.*'d/2.jpg'"),
      ("file,label\n1.jpg,a\nd/2.jpg,a\n3.jpg,b\n", "line 4: there is no picture '3.jpg'"),
      ("file,label\n1.jpg,a\nd/2.jpg,a\n1.jpg,b\n", "line 4: '1.jpg' is already listed in line 2"),
      ("file,label\n1.jpg,a\nd/2.jpg,a,b\n", "line 3: there is 3 columns .* quote texts"),
      ("file,label\n1.jpg,a\nd/2.jpg\n", "line 3: there is 1 columns"),
      ("file,label\n1.jpg, \nd/2.jpg,a\n", "line 2: there is an empty column"),
      (b"file,label\n1.jpg,a\nd/2.jpg,\xe4\n", "line 3: this is not UTF-8"),
      ('file,label\n1.jpg,a\nd/2.jpg,"a', "line 3: this is not a row"),
    ],
  )
  def test_errors(self, tmp_path, content, message):
    _write(tmp_path, _named("1.jpg", "d/2.jpg") | {"labels.csv": content})
    with pytest.raises(UserError, match=f"{tmp_path}/labels.csv'.*{message}"):
      open_source(f"folder:{tmp_path}", "train")

  def test_row_outside_the_splits(self, tmp_path):
    _write(tmp_path, _named("train/1.jpg", "test/1.jpg"))
    _write(tmp_path, {"labels.csv": "file,label\ntrain/1.jpg,a\n1.jpg,b\n"})
    with pytest.raises(UserError, match=r"line 3: '1.jpg' is in none of the folders train, test"):
      open_source(f"folder:{tmp_path}", "train")
    _write(tmp_path, {"labels.csv": "file,label\ntrain/1.jpg,a\ntest/2.jpg,b\n"})
    with pytest.raises(UserError, match=r"line 3: there is no picture 'test/2.jpg'"):
      open_source(f"folder:{tmp_path}", "test")


def _data(path, op: str = "", batch_size: int = 1) -> pipeline.Data:
  preprocess = f"decode(3)|resize(4){op}"
  return pipeline.Data(f"folder:{path}", preprocess, preprocess, batch_size, process_index=0, process_count=1)


class TestCaptions:
  def test_table(self, tmp_path):
    _write(tmp_path, _named(*(f"c/{i}.jpg" for i in range(12))))
    rows = [f'c/{i}.jpg,"{i}, no. {j}"\n' for j in range(3) for i in range(12) if j <= i % 3]
    _write(tmp_path, {"captions.csv": "file,caption\n" + "".join(rows)})
    found = _records(tmp_path) | _records(tmp_path, "test")
    assert len(found) == 12
    for i in range(12):
      expected = [f"{i}, no. {j}".encode() for j in range(i % 3 + 1)]
      assert found[f"c/{i}.jpg"]["caption"].tolist() == expected
      assert found[f"c/{i}.jpg"]["label"] == 0

  def test_text_files(self, tmp_path):
    texts = {"a.b.jpg": "one\n\n two \r\n\t\nthree", "d/ü.PNG": "\ufeffkatze 猫\n"}
    _write(tmp_path, _named(*texts) | {"other.txt": "", "labels.csv": "file,label\na.b.jpg,x\nd/ü.PNG,x\n"})
    _write(tmp_path, {f"{os.path.splitext(name)[0]}.txt": text for name, text in texts.items()})
    found = _records(tmp_path) | _records(tmp_path, "test")
    assert [text.decode() for text in found["a.b.jpg"]["caption"]] == ["one", "two", "three"]
    assert [text.decode() for text in found["d/ü.PNG"]["caption"]] == ["katze 猫"]

  @pytest.mark.parametrize(
    ("content", "reason"),
    [
      (b"", "its caption is empty"),
      (b" \n\n", "its caption is empty"),
      (b"\xff\xfe", "its caption is not UTF-8 text"),
      ("käse".encode("latin-1"), "its caption is not UTF-8 text"),
    ],
  )
  def test_a_damaged_text_file_is_a_damaged_record(self, tmp_path, content, reason):
    _write(tmp_path, {"train/1.jpg": "", "train/1.txt": content, "test/1.jpg": ""})
    opened = open_source(f"folder:{tmp_path}", "train")
    with pytest.raises(tf.errors.OpError):
      _fetch(opened, 0)
    with pytest.raises(tf.errors.OpError) as error:
      next(tf.data.Dataset.range(1).map(opened.fetch).as_numpy_iterator())
    assert reason_of(error.value) == reason

  @pytest.mark.parametrize("table", [False, True])
  def test_captions_of_some_pictures(self, tmp_path, table):
    beside = {"captions.csv": "file,caption\n2.jpg,two\n"} if table else {"2.txt": "two"}
    _write(tmp_path, _named(*(f"{i}.jpg" for i in range(8))) | beside)
    data = _data(tmp_path)
    assert data.num_train == 7 and data.captions is None
    with pytest.raises(
      UserError,
      match=r"tokenize in .* needs captions: 7 of the 8 pictures .* '0.jpg', '1.jpg', '3.jpg': write",
    ):
      _data(tmp_path, "|tokenize('list:a', 4)")

  def test_captions_are_read_where_they_are_used(self, tmp_path):
    names = [
      f"{split}/{i}.{kind}" for split in ("train", "test") for i in range(4) for kind in ("jpg", "txt")
    ]
    _write(tmp_path, _named(*names) | {"train/1.txt": b"\xff"})
    for name in names[::2]:
      _picture(tmp_path / name)
    for op, damaged in (("", 0), ("|tokenize('list:a', 4)", 1)):
      data = _data(tmp_path, op, batch_size=4)
      batch = next(data.train_batches())
      assert ("caption" in batch) == bool(damaged) and len(data.skipped) == damaged

  def test_none(self, tmp_path):
    _write(tmp_path, _named("1.jpg", "2.jpg", "notes.txt"))
    assert all(record.keys() == {"image"} for record in _records(tmp_path).values())


def test_fingerprint_tells_changes(tmp_path):
  files = _named("train/1.jpg", "train/2.jpg", "test/1.jpg") | {
    "labels.csv": "file,label\ntrain/1.jpg,a\ntrain/2.jpg,b\ntest/1.jpg,a\n",
    "captions.csv": "file,caption\ntrain/1.jpg,a\ntrain/2.jpg,b\ntest/1.jpg,a\n",
  }
  changes = [
    {},
    {"train/3.jpg": "", "labels.csv": None, "captions.csv": None},
    {"train/1.jpg": "larger than it was"},
    {"labels.csv": files["labels.csv"].replace("2.jpg,b", "2.jpg,a")},
    {"captions.csv": files["captions.csv"].replace("2.jpg,b", "2.jpg,a")},
    {"captions.csv": None},
  ]
  fingerprints = []
  for i, change in enumerate(changes):
    for copy in ("one", "two"):
      root: pathlib.Path = tmp_path / f"{i}{copy}"
      _write(root, {name: text for name, text in {**files, **change}.items() if text is not None})
      fingerprints.append(open_source(f"folder:{root}", "train").fingerprint)
  assert fingerprints[::2] == fingerprints[1::2]  # of the place it says nothing
  assert len(set(fingerprints)) == len(changes)


def test_text_lines_may_be_traced():
  lines = tf.function(tables.text_lines)(tf.constant("a\nb"))
  assert lines.numpy().tolist() == [b"a", b"b"]
