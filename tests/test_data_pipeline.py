"""The pipeline: determinism, resuming, coverage, evaluation, devices."""

import itertools
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from maskgen.data import sources
from maskgen.data.cpu_tf import tf
from maskgen.data.pipeline import Data, to_device
from maskgen.errors import UserError

RANDOM = "decode(3)|pad(4)|random_resized_crop(16)|flip_lr"
PLAIN = "decode(3)|resize(16)"


@pytest.fixture(autouse=True)
def numbered():
  """A source `numbered:n` whose labels are the indices, to identify records."""

  @sources.source("numbered:size")
  def _(argument, split):
    size = int(argument) if split == "train" else 10
    image = tf.zeros((2, 2, 1), tf.uint8)
    return sources.Source(
      "numbers", size, None, lambda index: {"image": image, "label": tf.identity(index)}, split
    )


def _data(source="synthetic", preprocess=RANDOM, eval_preprocess=PLAIN, batch_size=8, **kwargs):
  return Data(source, preprocess, eval_preprocess, batch_size, **kwargs)


def _numbered(size, **kwargs):
  return _data(f"numbered:{size}", "decode(1)", "decode(1)", **kwargs)


def _take(batches, count):
  return list(itertools.islice(batches, count))


def _assert_equal(one, two):
  assert len(one) == len(two)
  for a, b in zip(one, two, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def _join(parts):
  """Batches of several processes to global ones."""
  return [
    {key: np.concatenate([part[key] for part in step]) for key in step[0]}
    for step in zip(*parts, strict=True)
  ]


@pytest.mark.parametrize("count", [2, 4])
def test_batches_are_the_same_for_any_number_of_processes(count):
  whole = _data(process_index=0, process_count=1)
  parts = [_data(process_index=index, process_count=count) for index in range(count)]
  _assert_equal(_take(whole.train_batches(0), 5), _join([_take(part.train_batches(0), 5) for part in parts]))
  _assert_equal(
    list(whole.eval_batches("eval", 24)), _join([list(p.eval_batches("eval", 24)) for p in parts])
  )


def test_resuming_continues_at_the_next_record():
  data = _data("digits", RANDOM, batch_size=32)
  whole = _take(data.train_batches(), 73)
  for step in (1, 33, 70):
    _assert_equal(whole[step : step + 3], _take(data.train_batches(step), 3))


def test_resuming_late_is_immediate_and_right():
  size, batch_size, step = 100, 10, 10**12
  labels = [batch["label"] for batch in _take(_numbered(size, batch_size=10).train_batches(step), 10)]
  assert step * batch_size % size == 0
  np.testing.assert_array_equal(np.sort(np.concatenate(labels)), np.arange(size))


@pytest.mark.parametrize(("size", "batch_size"), [(100, 8), (5, 8), (1, 8), (1000, 64)])
def test_every_epoch_covers_every_record_once(size, batch_size):
  epochs = 7
  batches = _numbered(size, batch_size=batch_size).train_batches()
  labels = np.concatenate([b["label"] for b in _take(batches, -(-size * epochs // batch_size))])
  epochs = labels[: size * epochs].reshape(epochs, size)
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
  if size >= 100:
    assert len({epoch.tobytes() for epoch in epochs}) == len(epochs)


def test_orders_of_many_epochs_differ():
  labels = [b["label"] for b in _take(_numbered(64, batch_size=64).train_batches(), 400)]
  assert len({label.tobytes() for label in labels}) > 395


def test_the_first_records_are_a_fair_sample():
  labels = [b["label"] for b in _take(_numbered(50_000, batch_size=500).train_batches(), 20)]
  counts = np.bincount(np.concatenate(labels) // 5_000, minlength=10)
  assert (np.abs(counts - 1_000) < 150).all()
  steps = np.diff(np.concatenate(labels).astype(float))
  assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1] + 0.5) < 0.05  # as independent draws have


def test_seeds_change_order_and_augmentation():
  data, other = (_data(seed=seed) for seed in (1, 2))
  one, two = (_take(drawn.train_batches(), 1)[0] for drawn in (data, other))
  assert not np.array_equal(one["label"], two["label"])
  again = _take(_data(seed=1).train_batches(), 1)[0]
  _assert_equal([one], [again])
  # A record looks different in another epoch: 256 records are 32 batches of 8.
  epochs = _take(data.train_batches(), 64)
  images = [np.concatenate([b["image"] for b in epochs[i : i + 32]]) for i in (0, 32)]
  assert len({image.tobytes() for image in np.concatenate(images)}) > 500


@pytest.mark.parametrize(("split", "size"), [("train", 23), ("eval", 10)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_evaluation_takes_each_record_once(split, size, count):
  labels, batches = [], set()
  for index in range(count):
    data = _numbered(23, process_index=index, process_count=count)
    parts = list(data.eval_batches(split, 8))
    batches.add(len(parts))
    for part in parts:
      assert part["image"].shape == (8 // count, 2, 2, 1) and part["valid"].dtype == bool
      labels.extend(part["label"][part["valid"]])
  assert sorted(labels) == list(range(size))
  assert batches == {-(-size // 8)}


def test_evaluation_of_the_training_split_uses_evaluation_preprocessing():
  data = _data("digits")
  images = {b.tobytes() for batch in data.eval_batches("train", 479) for b in batch["image"]}
  source = sources.open_source("digits", "train")
  record = source.fetch(tf.constant(0, tf.int64))
  image = tf.image.resize(tf.io.decode_png(record["image"], 3), (16, 16), antialias=True)
  assert tf.cast(tf.round(image), tf.uint8).numpy().tobytes() in images


def test_specification_describes_global_batches():
  data = _data(process_index=1, process_count=4)
  assert data.image_shape == (16, 16, 3)
  assert (data.num_train, data.num_eval, len(data.class_names)) == (256, 64, 10)
  assert data.spec == {
    "image": jax.ShapeDtypeStruct((8, 16, 16, 3), np.uint8),
    "label": jax.ShapeDtypeStruct((8,), np.int32),
    "record": jax.ShapeDtypeStruct((8,), np.int32),
  }
  batch = next(data.train_batches())
  assert {key: (value.shape[0], value.dtype) for key, value in batch.items()} == {
    key: (value.shape[0] // 4, value.dtype) for key, value in data.spec.items()
  }


def test_pictures_of_a_folder(tmp_path):
  for i in range(20):
    Image.new("RGB", (30 + i, 40), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
  data = _data(f"folder:{tmp_path}", "decode|resize_small(20)|random_crop(16)")
  batch = next(data.train_batches())
  assert batch.keys() == {"image", "record"} == data.spec.keys() and data.class_names is None


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"eval_preprocess": f"{PLAIN}|second_crop(8)"}, "second views of shape .8, 8, 3.: make them equal"),
    ({"preprocess": "decode|random_crop(8)"}, "shape .8, 8, 3.* eval_preprocess .*make them equal"),
    ({"batch_size": 9, "process_index": 0, "process_count": 2}, "9 cannot be divided among 2"),
    ({"batch_size": 0}, "batch size 0"),
    ({"eval_split": "none"}, "split 'none' of synthetic is unknown"),
    ({"num_classes": 2}, "synthetic has 10 classes, but data.num_classes is 2: change one"),
    (
      {"preprocess": "decode|resize(16)|tokenize('words:w.txt', 8)"},
      "tokenize .* needs 'caption', but .* captions",
    ),
    (
      {"preprocess": "decode|resize(16)|value_range(-1, 1)"},
      r"leaves the range \[0, 1\] of pixels",
    ),
    ({"eval_source": "digits"}, "the classes of synthetic and digits differ in '.*': make them the same"),
    ({"source": "digits", "preprocess": "decode"}, r"varying shape .*such as resize\(256\)"),
    ({"preprocess": "decode|random_crop(65)"}, "65x65 pixels don't fit into 64x64"),
  ],
)
def test_errors(kwargs, message):
  with pytest.raises(UserError, match=message):
    _data(**kwargs)


def test_two_views_are_drawn_apart():
  one = next(_data(preprocess=RANDOM).train_batches())
  two = next(_data(preprocess=f"two_views|{RANDOM}").train_batches())
  assert two.keys() == one.keys() | {"image2"}
  np.testing.assert_array_equal(one["record"], two["record"])
  np.testing.assert_array_equal(one["image"], two["image"])  # of the first epoch
  assert (two["image"] != two["image2"]).any(axis=(1, 2, 3)).all()


def test_floats_between_0_and_1_are_what_bytes_are():
  batch = next(_data(preprocess=f"{PLAIN}|value_range").train_batches())
  plain = next(_data(preprocess=PLAIN).train_batches())
  assert batch["image"].dtype == np.float32
  np.testing.assert_allclose(batch["image"], plain["image"] / np.float32(255), atol=1e-6)


def test_an_augmentation_belongs_to_the_record_and_the_draw():
  """However the records are shuffled."""
  seen = [{}, {}]
  for data, drawn in zip((_data(seed=3, batch_size=8), _data(seed=3, batch_size=32)), seen, strict=True):
    for batch in _take(data.train_batches(), 256 // data.batch_size):
      drawn |= {int(r): image.tobytes() for r, image in zip(batch["record"], batch["image"], strict=True)}
  assert seen[0] == seen[1] and len(seen[0]) == 256


def test_an_empty_split_for_evaluation():
  @sources.source("half")
  def _(argument, split):
    image = tf.zeros((2, 2, 1), tf.uint8)
    size = 3 if split == "train" else 0
    return sources.Source("half", size, None, lambda index: {"image": image}, split)

  with pytest.raises(UserError, match="split 'test' of data source 'half' is empty"):
    _data("half", "decode", "decode")


def test_to_device_shards_and_keeps_the_order():
  mesh = Mesh(np.array(jax.devices()), ("data",))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  data = _data(batch_size=2 * len(jax.devices()))
  on_host = _take(data.train_batches(), 5)
  on_device = list(to_device(iter(on_host), sharding))
  assert all(value.sharding == sharding for value in on_device[0].values())
  _assert_equal(on_host, [{k: np.asarray(v) for k, v in batch.items()} for batch in on_device])


def test_to_device_runs_ahead_but_not_away():
  taken = []

  def batches():
    for i in range(100):
      taken.append(i)
      yield {"label": np.full(8, i, np.int32)}

  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  iterator = to_device(batches(), device, ahead=3)
  assert [int(next(iterator)["label"][0]) for _ in range(2)] == [0, 1]
  deadline = time.monotonic() + 10
  while len(taken) < 6 and time.monotonic() < deadline:
    time.sleep(0.01)
  time.sleep(0.2)
  assert taken == list(range(6))  # two used, three on the device, one in hand
  iterator.close()
  time.sleep(0.2)
  assert len(taken) == 6


def test_errors_of_batches_reach_their_user():
  def batches():
    yield {"label": np.zeros(8, np.int32)}
    raise UserError("no more")

  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  iterator = to_device(batches(), device)
  next(iterator)
  with pytest.raises(UserError, match="no more"):
    next(iterator)
