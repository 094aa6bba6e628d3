"""Ranges of bytes in large files, their index files, and patterns of names."""

import os
import threading

import numpy as np
import pytest

from maskgen.data import ranges
from maskgen.data.cpu_tf import tf
from maskgen.data.ranges import Ranges, cached_index, cached_indices
from maskgen.data.shards import expand_braces, shard_paths
from maskgen.errors import UserError


@pytest.fixture(params=["local", "ram"])
def root(request, tmp_path) -> str:
  """A folder on the local disk, and one in another store."""
  if request.param == "local":
    return str(tmp_path)
  folder = f"ram:/{tmp_path}"
  tf.io.gfile.makedirs(folder)
  return folder


def _write(path: str, content: bytes) -> str:
  if tf.io.gfile.exists(path):
    tf.io.gfile.remove(path)  # ram:// would append
  with tf.io.gfile.GFile(path, "wb") as file:
    file.write(content)
  return path


class TestRanges:
  def test_bytes_are_those_of_the_files(self, root):
    rng = np.random.default_rng(0)
    contents = [rng.integers(0, 256, size, np.uint8).tobytes() for size in (1000, 5000, 1)]
    paths = [_write(f"{root}/{i}", content) for i, content in enumerate(contents)]
    offsets = [np.array([0, 999, 17]), np.arange(0, 5000, 50), np.zeros(0, np.int64)]
    lengths = [np.array([1000, 1, 0]), np.full(100, 50), np.zeros(0, np.int64)]
    every = Ranges.of_shards(paths, offsets, lengths)
    expected = [
      contents[i][offset : offset + length]
      for i in range(3)
      for offset, length in zip(offsets[i], lengths[i], strict=True)
    ]
    assert len(every) == 103 and every.path(2) == paths[0] and every.path(3) == paths[1]
    assert [every.read_bytes(i) for i in range(103)] == expected
    chosen = np.arange(102, -1, -3)
    part = every.take(chosen)
    found = tf.data.Dataset.range(len(part)).map(part.read, 8).as_numpy_iterator()
    assert list(found) == [expected[i] for i in chosen]

  def test_zeros_at_the_end_are_kept(self, root):
    part = Ranges.of_shards([_write(f"{root}/file", b"a\0\0")], [np.array([0])], [np.array([3])])
    assert part.read(tf.constant(0, tf.int64)).numpy() == b"a\0\0"
    assert next(tf.data.Dataset.range(1).map(part.read).as_numpy_iterator()) == b"a\0\0"

  def test_a_file_cut_short_or_removed_is_a_damaged_record(self, root):
    path = _write(f"{root}/file", bytes(100))
    part = Ranges.of_shards([path, f"{root}/none"], [np.array([0, 90]), [0]], [np.array([90, 11]), [1]])
    assert part.read_bytes(0) == bytes(90)
    for index, message in (
      (1, "file' ends before byte 101, the end of a record"),
      (2, "none' cannot be read"),
    ):
      with pytest.raises(UserError, match=message):
        part.read_bytes(index)
      with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        next(tf.data.Dataset.range(index, index + 1).map(part.read).as_numpy_iterator())

  def test_no_more_files_are_open_than_allowed(self, tmp_path):
    paths = [_write(f"{tmp_path}/{i}", b"%d" % i) for i in range(ranges._OPEN_FILES + 100)]
    part = Ranges.of_shards(paths, [np.array([0])] * len(paths), [np.array([1])] * len(paths))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(2):
      read = tf.data.Dataset.range(len(paths)).map(part.read, 16).as_numpy_iterator()
      assert list(read) == [str(i)[:1].encode() for i in range(len(paths))]
    if before:
      assert len(os.listdir("/proc/self/fd")) <= before + ranges._OPEN_FILES + 30


class TestCachedIndex:
  @pytest.fixture
  def build(self):
    def build(path: str) -> dict[str, np.ndarray]:
      build.calls += 1
      with tf.io.gfile.GFile(path, "rb") as file:
        return {"sum": np.array([sum(file.read())]), "name": np.array(["ä".encode()])}

    build.calls = 0
    return build

  def test_is_kept_until_the_file_changes(self, root, build):
    path = _write(f"{root}/file", b"\1\2")
    for _ in range(3):
      index = cached_index(path, build, "a")
      assert index.keys() == {"sum", "name"} and index["sum"] == 3 and index["name"][0].decode() == "ä"
    assert build.calls == 1
    assert sorted(tf.io.gfile.listdir(root)) == ["file", "file.index.npz"]
    assert cached_index(_write(path, b"\1\2\3"), build, "a")["sum"] == 6 and build.calls == 2
    cached_index(path, build, "b")
    assert build.calls == 3

  def test_same_size_and_another_time(self, tmp_path, build):
    path = _write(f"{tmp_path}/file", b"\1\2")
    cached_index(path, build, "a")
    _write(path, b"\2\2")
    os.utime(path, ns=(0, 123_456_789))
    assert cached_index(path, build, "a")["sum"] == 4

  def test_damaged_index_files(self, tmp_path, build):
    path = _write(f"{tmp_path}/file", b"\1\2")
    cached_index(path, build, "a")
    kept = (tmp_path / "file.index.npz").read_bytes()
    flipped = bytearray(kept)
    flipped[len(kept) // 3] ^= 0xFF
    for damage in (b"", b"junk", kept[: len(kept) // 2], kept[:-1], bytes(len(kept)), bytes(flipped)):
      (tmp_path / "file.index.npz").write_bytes(damage)
      before = build.calls
      assert cached_index(path, build, "a")["sum"] == 3 and build.calls == before + 1
      assert cached_index(path, build, "a")["sum"] == 3 and build.calls == before + 1

  def test_where_nothing_can_be_written(self, tmp_path, build):
    path = _write(f"{tmp_path}/file", b"\1\2")
    (tmp_path / "file.index.npz").mkdir()  # root may write into any folder
    for calls in (1, 2):
      assert cached_index(path, build, "a")["sum"] == 3 and build.calls == calls
    assert sorted(os.listdir(tmp_path)) == ["file", "file.index.npz"]

  def test_missing(self, root, build):
    with pytest.raises(UserError, match="none' cannot be read"):
      cached_index(f"{root}/none", build, "a")

  def test_many_are_built_side_by_side_and_returned_in_order(self, tmp_path):
    paths = [_write(f"{tmp_path}/{i}", b"") for i in range(6)]
    together = threading.Barrier(3, timeout=20)

    def build(path):
      together.wait()
      return {"number": np.array([int(os.path.basename(path))])}

    assert [int(index["number"][0]) for index in cached_indices(paths, build, "a")] == list(range(6))

  def test_the_first_of_several_errors(self, tmp_path):
    paths = [_write(f"{tmp_path}/{i}", b"") for i in range(40)]

    def build(path):
      if int(os.path.basename(path)) >= 3:
        raise UserError(f"{path} is bad")
      return {}

    with pytest.raises(UserError, match="/3 is bad"):
      cached_indices(paths, build, "a")


class TestShardPaths:
  @pytest.mark.parametrize(
    ("pattern", "expected"),
    [
      ("plain", ["plain"]),
      ("x{8..11}", ["x8", "x9", "x10", "x11"]),
      ("{008..010}.tar", ["008.tar", "009.tar", "010.tar"]),
      ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
      ("x{,y}", ["x", "xy"]),
    ],
  )
  def test_braces(self, pattern, expected):
    assert expand_braces(pattern) == expected

  @pytest.mark.parametrize("pattern", ["{spilt}-1", "{3..1}", "{}", "{a..c}", "{a,{1..2}b}"])
  def test_malformed(self, pattern):
    with pytest.raises(UserError, match=r"is malformed: write \{000..099\}"):
      expand_braces(pattern)

  @pytest.mark.parametrize("pattern", ["{0..99999999}", "{0..999}{0..999}", "{0..99999999999999999999}{a,b}"])
  def test_too_many(self, pattern):
    with pytest.raises(UserError, match=r"names 1[\d,]+ files: name at most 250,000"):
      expand_braces(pattern)

  def test_files(self, root):
    for name in ("test-1", "test-0", "train-0", "we[i]rd", "ü"):
      _write(f"{root}/{name}", b"x")
    for pattern, names in (
      ("{split}-{0..1}", ["test-0", "test-1"]),
      ("t*-0", ["test-0", "train-0"]),
      ("t*-{1,0}", ["test-1", "test-0", "train-0"]),
      ("we[i]rd", ["we[i]rd"]),
      ("ü", ["ü"]),
    ):
      assert shard_paths(f"{root}/{pattern}", "test") == [f"{root}/{name}" for name in names]

  @pytest.mark.parametrize(
    ("pattern", "message"),
    [
      ("{0..9}", "/1' and 7 more of the 10 files of .* cannot be found"),
      ("none*", r"none\*' of .* cannot be found"),
      ("none", "none' of .* cannot be found"),
      ("", "' of .* cannot be found"),
      ("{0,?}", "names '.*/0' twice"),
    ],
  )
  def test_errors(self, root, pattern, message):
    for name in "05":
      _write(f"{root}/{name}", b"x")
    with pytest.raises(UserError, match=message):
      shard_paths(f"{root}/{pattern}", "train")
