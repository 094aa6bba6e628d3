"""Token caches: training sees the same as live, however the cache was made."""

import dataclasses
import itertools
import json
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import tiny
from etils import epath
from PIL import Image

import maskgen
from maskgen import config
from maskgen.data import sources
from maskgen.data.cache import Cache
from maskgen.data.pipeline import Data
from maskgen.errors import UserError
from maskgen.tools import tokenize
from maskgen.training.experiment import Experiment

trained = tiny.trained

CUT = "decode(3)|resize(20)|random_crop(16)|flip_lr"
PLAIN = "decode(3)|resize(16)"
CROPS = 3


def flags(model, out, **options):
  options = dict(source="synthetic", preprocess=CUT, crops=CROPS, shard_records=60) | options
  return [f"--model={model}", f"--out={out}", *(f"--{key}={value}" for key, value in options.items())]


@pytest.fixture(scope="module")
def cache(trained, tmp_path_factory):
  folder = tmp_path_factory.mktemp("cache") / "tokens"
  tokenize.main(flags(trained / "tokenizer", folder))
  return folder


def cached(cache, **options):
  defaults = dict(
    source=f"tokens:{cache}",
    preprocess="take_crop",
    eval_preprocess=PLAIN,
    batch_size=32,
    eval_source="synthetic",
  )
  return Data(**defaults | options)


def mage(trained, **overrides):
  given = {"pretrained__tokenizer": str(trained / "tokenizer"), "data__preprocess": CUT} | overrides
  return tiny.stage("mage", "steps=70,log_every_steps=10", **given)


def test_cached_codes_are_those_of_the_live_crops(cache, trained):
  model = maskgen.load(trained / "tokenizer")
  live = Data("synthetic", CUT, PLAIN, 32)
  for a, b in itertools.islice(
    zip(live.train_batches(), cached(cache).train_batches(), strict=True), 8 * CROPS
  ):
    np.testing.assert_array_equal(model.encode(a["image"]), b["tokens"])
    assert a.keys() - b.keys() == {"image"} and b["tokens"].dtype == np.uint8
    for key in ("record", "label"):
      np.testing.assert_array_equal(a[key], b[key])


def test_two_views_are_two_crops(cache, trained):
  model = maskgen.load(trained / "tokenizer")
  live = Data("synthetic", f"two_views|{CUT}", PLAIN, 32)
  data = cached(cache, preprocess="two_views|take_crop")
  assert data.spec["tokens"] == data.spec["tokens2"] == jax.ShapeDtypeStruct((32, tiny.TOKENS), np.uint8)
  a, b = next(live.train_batches()), next(data.train_batches())
  np.testing.assert_array_equal(model.encode(a["image"]), b["tokens"])
  np.testing.assert_array_equal(model.encode(a["image2"]), b["tokens2"])
  assert (b["tokens"] != b["tokens2"]).any()


def test_losses_on_cached_codes_equal_live_losses(cache, trained, tmp_path):
  codes = {
    "data__source": f"tokens:{cache}",
    "data__preprocess": "take_crop",
    "data__eval_source": "synthetic",
  }
  losses = []
  for overrides in ({}, codes):
    experiment = Experiment(mage(trained, **overrides))
    state, frozen = experiment.init(epath.Path(tmp_path))
    batches = experiment.train_batches(0)
    losses.append([])
    for _ in range(6):
      state, metrics = experiment.update(state, frozen, next(batches))
      losses[-1].append(float(metrics["loss/main"]))
  assert len(set(losses[0])) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_manifest_says_what_is_there(cache):
  manifest = json.loads((cache / "manifest.json").read_text())
  assert manifest["records"] == 256 and manifest["crops"] == CROPS and manifest["tokens"] == tiny.TOKENS
  assert (
    manifest["preprocess"] == CUT and len(manifest["tokenizer"]) == 64 and len(manifest["class_names"]) == 10
  )
  codes = [np.load(cache / f"codes_{i:05d}.npy", mmap_mode="r") for i in range(5)]
  assert [len(shard) for shard in codes] == [60, 60, 60, 60, 16] and codes[0].shape[1:] == (
    CROPS,
    tiny.TOKENS,
  )
  assert codes[0].dtype == np.uint8 and max(shard.max() for shard in codes) < tiny.CODES


def same_files(a, b):
  assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
  for file in a.iterdir():
    assert file.read_bytes() == (b / file.name).read_bytes(), file.name


def test_processes_share_the_shards(cache, trained, tmp_path, capsys):
  for index in (1, 0):
    tokenize.main(flags(trained / "tokenizer", tmp_path / "out", process_index=index, process_count=2))
    if index:
      assert "3 shards" in capsys.readouterr().out
      with pytest.raises(
        UserError, match=r"incomplete \(3 of 5 shards are missing\): run maskgen.tools.tokenize again"
      ):
        sources.open_source(f"tokens:{tmp_path}/out", "train")
  same_files(tmp_path / "out", cache)


def test_a_killed_run_continues(cache, trained, tmp_path):
  out = tmp_path / "out"
  arguments = ["-m", "maskgen.tools.tokenize", *flags(trained / "tokenizer", out)]
  process = tiny.python(*arguments)
  while process.poll() is None and not (out / "codes_00001.npy").exists():
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  before = {file.name: file.stat().st_mtime_ns for file in out.glob("codes_*.npy")}
  tokenize.main(flags(trained / "tokenizer", out))
  for name, modified in before.items():
    assert (out / name).stat().st_mtime_ns == modified  # not made again
  for file in out.glob("*.tmp"):
    file.unlink()  # what was being written
  same_files(out, cache)


def test_a_cache_of_another_tokenizer_is_refused(cache, trained, tmp_path):
  shutil.copytree(cache, tmp_path / "other")
  manifest = json.loads((cache / "manifest.json").read_text())
  (tmp_path / "other" / "manifest.json").write_text(json.dumps(manifest | {"tokenizer": "0" * 64}))
  overrides = {"data__preprocess": "take_crop", "data__eval_source": "synthetic"}
  experiment = Experiment(mage(trained, data__source=f"tokens:{tmp_path}/other", **overrides))
  with pytest.raises(
    UserError, match=r"other was made with another tokenizer than that of config.pretrained.tokenizer=.*"
  ):
    experiment.check_pretrained(epath.Path(tmp_path))
  Experiment(mage(trained, data__source=f"tokens:{cache}", **overrides)).check_pretrained(
    epath.Path(tmp_path)
  )


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(eval_source=None), "holds split 'train', not 'test'.*data.eval_source"),
    (dict(preprocess=PLAIN), "decode in preprocessing .* needs 'image', but the data has only label, tokens"),
    (dict(eval_preprocess="decode|resize(8)"), r"images of shape \(16, 16, 3\), but eval_preprocess"),
    (
      dict(source="tokens:/nowhere"),
      "/nowhere is not a token cache .* create one with maskgen.tools.tokenize",
    ),
    (
      dict(source="synthetic"),
      "take_crop in preprocessing 'take_crop' needs 'tokens', but the data has only image",
    ),
  ],
)
def test_wrong_data_sections(cache, options, message):
  with pytest.raises(UserError, match=message):
    cached(cache, **options)


def test_a_tokenizer_does_not_learn_from_codes(cache):
  overrides = {
    "data__source": f"tokens:{cache}",
    "data__preprocess": "take_crop",
    "data__eval_source": "synthetic",
  }
  with pytest.raises(UserError, match="objective 'tokenizer' needs image"):
    Experiment(tiny.stage("tokenizer", **overrides))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(crops=0), "--crops=0"),
    (dict(preprocess=f"two_views|{CUT}"), "makes two views: remove two_views"),
    (dict(preprocess="decode|resize(8)"), r"shape \(8, 8, 3\), but the tokenizer takes \(16, 16, 3\)"),
    (dict(source="synthetc"), "did you mean 'synthetic'"),
    (dict(split="tain"), "split 'tain' of synthetic is unknown"),
    (dict(process_index=2, process_count=2), "--process_index=2: give a number from 0 to 1"),
    (dict(crops=5), "has a cache with crops=3, not 5: give another folder, or delete it"),
  ],
)
def test_wrong_flags(cache, trained, options, message):
  with pytest.raises(UserError, match=message):
    tokenize.main(flags(trained / "tokenizer", cache, **options))


def test_a_model_of_codes_brings_its_tokenizer(cache, trained, tmp_path):
  tokenize.main(flags(trained / "mage", tmp_path / "out"))
  same_files(tmp_path / "out", cache)


def test_models_without_codes_are_refused(tmp_path):
  section = config.to_dict(config.load("vilex_digits.py:debug"))["vilex"]["objective"]
  (tmp_path / "config.json").write_text(json.dumps({"objective": section}))
  with pytest.raises(UserError, match="is of objective 'vilex', which has no tokenizer: give a tokenizer"):
    tokenize.main(flags(tmp_path, tmp_path / "out"))


def test_other_folders_are_left_alone(trained, tmp_path):
  (tmp_path / "letter.txt").touch()
  with pytest.raises(UserError, match="is not empty: give a new folder"):
    tokenize.main(flags(trained / "tokenizer", tmp_path))


def swap(a, b):
  first = a.read_bytes()
  a.write_bytes(b.read_bytes())
  b.write_bytes(first)


def change(file, index, value):
  array = np.load(file)
  array[index] = value
  np.save(file, array)


DAMAGES = {
  "another code": ("codes_00003", lambda c: change(c / "codes_00003.npy", (5, 1, 2), 7)),
  "another label": ("labels_00003", lambda c: change(c / "labels_00003.npy", 5, 3)),
  "swapped codes": ("codes_00001", lambda c: swap(c / "codes_00001.npy", c / "codes_00002.npy")),
  "swapped shards": (
    "manifest_00001",
    lambda c: [
      swap(c / name.format(1), c / name.format(2))
      for name in ("codes_{:05d}.npy", "labels_{:05d}.npy", "manifest_{:05d}.json")
    ],
  ),
  "empty labels": ("labels_00003", lambda c: (c / "labels_00003.npy").write_bytes(b"")),
  "empty checksums": ("manifest_00003", lambda c: (c / "manifest_00003.json").write_bytes(b"")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_regenerated_as_the_error_says(damage, cache, trained, tmp_path):
  shutil.copytree(cache, out := tmp_path / "cache")
  name, make = DAMAGES[damage]
  make(out)
  for _ in range(2 if "swapped" in damage else 1):
    with pytest.raises(
      UserError, match=r"(\S+) is damaged .*: delete (\S+) and run \S+tokenize again"
    ) as error:
      sources.open_source(f"tokens:{out}", "train")
    assert name in str(error.value) or "swapped" in damage
    (out / re.search(r"delete (\S+)", str(error.value))[1]).unlink()
    tokenize.main(flags(trained / "tokenizer", out))
  same_files(out, cache)


def test_a_cache_without_checksums_is_read_with_a_warning_and_its_values_are_checked(cache, tmp_path, caplog):
  shutil.copytree(cache, out := tmp_path / "cache")
  for file in out.glob("manifest_*"):
    file.unlink()
  sources.open_source(f"tokens:{out}", "train")
  (record,) = caplog.records
  assert "5 of the 5 shards of the token cache" in record.getMessage()
  for kind, value in (("codes", 159), ("labels", 999)):
    shutil.copy(out / f"{kind}_00001.npy", tmp_path)
    change(out / f"{kind}_00001.npy", 0, value)
    with pytest.raises(UserError, match=rf"{kind}_00001.npy is damaged \(values from \d+ to {value} for "):
      sources.open_source(f"tokens:{out}", "train")
    shutil.copy(tmp_path / f"{kind}_00001.npy", out)


def test_a_cache_of_an_older_version_is_read_with_a_warning(cache, tmp_path, caplog):
  shutil.copytree(cache, out := tmp_path / "cache")
  manifest = json.loads((out / "manifest.json").read_text())
  assert manifest.pop("jpeg_decoding") == ""  # synthetic pictures are arrays
  (out / "manifest.json").write_text(json.dumps(manifest))
  old, new = (sources.open_source(f"tokens:{folder}", "train") for folder in (out, cache))
  (record,) = caplog.records
  assert "was made by an older version, which decoded JPEGs" in record.getMessage()
  assert old.fingerprint == new.fingerprint  # runs on the cache continue
  today = Cache.open(epath.Path(cache)).manifest
  Cache.create(epath.Path(out), today)
  with pytest.raises(UserError, match="jpeg_decoding=None, not INTEGER_ACCURATE: give another folder"):
    Cache.create(epath.Path(out), dataclasses.replace(today, jpeg_decoding="INTEGER_ACCURATE"))


def test_a_run_on_jpegs_of_an_older_version_continues_with_a_warning(tmp_path, caplog):
  for number in range(8):
    picture = Image.fromarray(np.full((16, 16, 3), 30 * number, np.uint8))
    (tmp_path / "train" / str(number % 2)).mkdir(parents=True, exist_ok=True)
    picture.save(tmp_path / "train" / str(number % 2) / f"{number}.jpg")
  data = {"data__source": f"folder:{tmp_path}/train", "data__split": "train", "data__eval_split": "train"}
  experiment = Experiment(tiny.stage("tokenizer", "", data__preprocess=PLAIN, **data))
  workdir = epath.Path(tmp_path)
  experiment.write_data(workdir)
  experiment.check_data(workdir)
  before = json.loads((tmp_path / "data.json").read_text())
  for use in before.values():
    assert use.pop("jpeg_decoding") == "INTEGER_ACCURATE"
  (tmp_path / "data.json").write_text(json.dumps(before))
  assert not caplog.records
  experiment.check_data(workdir)
  assert all("decoded the JPEGs of" in record.getMessage() for record in caplog.records)
  assert len(caplog.records) == 2
  experiment.write_data(workdir)
  experiment.check_data(workdir)
  assert len(caplog.records) == 2


def test_a_damaged_shard_is_named(cache, tmp_path):
  shutil.copytree(cache, tmp_path / "cache")
  file = tmp_path / "cache" / "codes_00003.npy"
  file.write_bytes(file.read_bytes()[:200])
  with pytest.raises(
    UserError,
    match=r"codes_00003.npy is damaged .*: delete codes_00003.npy and run maskgen.tools.tokenize again",
  ):
    sources.open_source(f"tokens:{tmp_path}/cache", "train")
  assert Cache.open(epath.Path(cache)).missing() == []
