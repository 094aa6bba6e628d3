"""Every kind of file, damaged in every way: the same result, or a sentence with its name and a remedy."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import test_checkpoint
import tiny
from etils import epath

import maskgen
from maskgen import errors, main
from maskgen.data import cache as cache_lib
from maskgen.data import sources
from maskgen.errors import UserError
from maskgen.tools import export
from maskgen.training import experiment as experiment_lib
from maskgen.training.experiment import Experiment

trained = tiny.trained


def flip(file, neighbour):
  content = bytearray(file.read_bytes())
  # JSON has no checksum: where a digit is flipped, nobody can know.
  content[0 if ".json" in file.name else len(content) // 2] ^= 16
  file.write_bytes(content)


def swap(file, neighbour):
  content = file.read_bytes()
  file.write_bytes(neighbour.read_bytes())
  neighbour.write_bytes(content)


DAMAGES = {
  "flipped": flip,
  "truncated": lambda file, neighbour: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
  "empty": lambda file, neighbour: file.write_bytes(b""),
  "deleted": lambda file, neighbour: file.unlink(),
  "swapped": swap,
}


def files_of(folder):
  """The contents of those files of a folder that are read, by name."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
    and not path.name.startswith((".lock", "events", "commit_success"))
    and path.suffix != ".png"
  }


def damage_all(folder, kind, names=None):
  """For each file of a folder: its name, its neighbour's, and a copy of the folder with this file damaged."""
  known = list(names or files_of(folder))
  for name, neighbour in zip(known, [*known[1:], known[0]], strict=True):
    with tempfile.TemporaryDirectory() as scratch:
      shutil.copytree(folder, copy := pathlib.Path(scratch) / folder.name)
      DAMAGES[kind](copy / name, copy / neighbour)
      yield name, neighbour, copy


def assert_names(error, *places):
  """One sentence with a remedy that names one of these."""
  text = str(error)
  assert any(str(place) in text for place in places), text
  assert ": " in text and "\n" not in text and len(text) < 800 and "tensorstore_spec" not in text, text


# Checkpoints


@pytest.mark.parametrize("kind", DAMAGES)
def test_checkpoints(kind, tmp_path):
  states = [test_checkpoint.make_state(seed, step) for seed, step in ((1, 4), (2, 8))]
  test_checkpoint.save(tmp_path / "run", *states)
  target = test_checkpoint.targets(states[0])
  newest = [name for name in files_of(tmp_path / "run") if name.startswith("checkpoints/8/")]
  assert len(newest) > 6
  for _, _, copy in damage_all(tmp_path / "run", kind, newest):
    before = files_of(copy)
    checkpoints = test_checkpoint.open_checkpoints(copy)
    tiny.assert_same_bits(restored := checkpoints.restore(target), states[checkpoints.latest() == 8])
    assert int(restored.step) == checkpoints.latest()
    checkpoints.close()
    # Nothing is lost: what is not where it was has been put aside, as it was.
    after = files_of(copy)
    assert all(after.get(name) == before[name] for name in before if name.startswith("checkpoints/4/"))
    assert sorted(after.values()) == sorted(before.values())


# A workdir


STEPS = 6


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
  """A finished run of one stage, and the experiment that continues it without recompiling."""
  workdir = tmp_path_factory.mktemp("damage") / "run"
  pretrained = f"--config.pretrained.tokenizer={trained / 'tokenizer'}"
  arguments = [f"--config={tiny.FILE}:only=mage,steps={STEPS}", pretrained]
  shared = Experiment(tiny.stage("mage", f"steps={STEPS}", pretrained__tokenizer=str(trained / "tokenizer")))

  def go_on(folder):
    with pytest.MonkeyPatch.context() as patch, errors.storage_errors():
      patch.setattr(experiment_lib, "Experiment", lambda config: shared)
      main.main([*arguments, f"--workdir={folder}"])
    return json.loads((folder / "results.json").read_text())

  go_on(workdir)
  return workdir, go_on


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_workdir(kind, run):
  workdir, go_on = run
  results = json.loads((workdir / "results.json").read_text())
  names = [name for name in files_of(workdir) if not name.startswith("checkpoints/")]
  assert names == [
    "config.json",
    "data.json",
    "frozen/manifest.json",
    "frozen/weights.safetensors",
    "metrics.jsonl",
    "receipts.json",
    "report.html",
    "results.json",
  ]
  survived = []
  for name, neighbour, copy in damage_all(workdir, kind, names):
    if name != "results.json":
      (copy / "results.json").unlink()  # the run is not finished, and continues
    before = files_of(copy)
    try:
      assert go_on(copy) == results
      survived.append(name)
    except UserError as error:
      assert error.status == 2
      assert_names(error, name, neighbour, f"workdir {copy} ")
      after = files_of(copy)
      assert all(after[key] == before[key] for key in before if key != "data.json")
    assert all(files_of(copy)[key] == before[key] for key in before if key.startswith("checkpoints/"))
  if kind != "swapped":
    assert "results.json" in survived


# An export and a token cache


@pytest.mark.parametrize("kind", DAMAGES)
def test_an_export(kind, trained, tmp_path):
  export.main([f"--model={trained / 'tokenizer'}", f"--out={tmp_path / 'export'}"])
  variables = maskgen.load(tmp_path / "export").variables
  for name, neighbour, copy in damage_all(tmp_path / "export", kind):
    try:
      tiny.assert_same_bits(maskgen.load(copy).variables, variables)
      assert (name, kind) == ("manifest.json", "deleted")
    except UserError as error:
      assert_names(error, name, neighbour)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_token_cache(kind, tmp_path):
  rng = np.random.default_rng(0)
  manifest = cache_lib.Manifest(
    **dict(tokenizer="0" * 64, image_shape=(16, 16, 3), codebook_size=32, tokens=4, crops=2),
    **dict(source="synthetic", split="train", fingerprint="1", preprocess="decode", seed=0, records=25),
    **dict(class_names=("a", "b"), shard_records=10),
  )
  cache = cache_lib.Cache.create(epath.Path(tmp_path / "cache"), manifest)
  for number in range(manifest.num_shards):
    records = len(manifest.shard(number))
    cache.write(number, rng.integers(0, 32, (records, 2, 4)), rng.integers(0, 2, records))
  whole = [np.concatenate(cache.read(kind)) for kind in ("codes", "labels")]
  for name, neighbour, copy in damage_all(tmp_path / "cache", kind):
    try:
      source = sources.open_source(f"tokens:{copy}", "train")
      for index in range(source.size):
        record = source.fetch(np.int64(index))
        np.testing.assert_array_equal(record["tokens"], whole[0][index])
        assert record["label"] == whole[1][index]
      assert name.startswith("manifest_") and kind == "deleted"
    except UserError as error:
      numbers = [name.rpartition("_")[2].partition(".")[0] for name in (name, neighbour)]
      assert_names(error, "manifest.json", *numbers, "token cache")  # a shard is named by one of its files


# What another user may not read


UNREADABLE = """
import json, os, pathlib, sys
import tiny
from maskgen import errors, main
from maskgen.errors import UserError
from maskgen.training import experiment as experiment_lib
root, tokenizer = pathlib.Path(sys.argv[1]), sys.argv[2]
shared = experiment_lib.Experiment(tiny.stage("mage", "steps=6", pretrained__tokenizer=tokenizer))
experiment_lib.Experiment = lambda config: shared
arguments = [f"--config={tiny.FILE}:only=mage,steps=6", f"--config.pretrained.tokenizer={tokenizer}"]
main.main([*arguments, f"--workdir={root / 'first'}"])  # imports all, also what the other user may not read
os.setgroups([])
os.setgid(int(sys.argv[3]))
os.setuid(int(sys.argv[3]))
for folder in sorted(root.glob("case_*")):
  try:
    with errors.storage_errors():
      main.main([*arguments, f"--workdir={folder / 'run'}"])
    end = [0, json.loads((folder / "run" / "results.json").read_text())]
  except UserError as error:
    end = [error.status, str(error)]
  print(json.dumps([folder.name, *end]), flush=True)
"""
NOBODY = 65534


@pytest.mark.slow
def test_what_another_user_may_not_read_is_named_and_left_alone(run, trained):
  if os.getuid() != 0:
    pytest.skip("only root can give files to another user, who is the one that may not read them")
  workdir, _ = run
  names = [name for name in files_of(workdir) if not name.startswith(("checkpoints/4/", "results"))]
  cases, root = {}, pathlib.Path(tempfile.mkdtemp())
  try:
    for name in names:
      for kind in ("not readable", "owner changed"):
        folder = root / f"case_{len(cases):03d}"
        cases[folder.name] = (name, kind, folder / "run")
        shutil.copytree(workdir, folder / "run")
        (folder / "run" / "results.json").unlink()
    subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", str(root)], check=True)
    for name, kind, copy in cases.values():
      os.chmod(copy / name, 0o000 if kind == "not readable" else 0o600)
      if kind == "owner changed":
        os.chown(copy / name, 0, 0)
    before = {case: files_of(copy) for case, (_, _, copy) in cases.items()}
    shutil.copytree(workdir, root / "first")
    (root / "first" / "results.json").unlink()
    process = tiny.python(
      "-c",
      UNREADABLE,
      *(str(root), str(trained / "tokenizer"), str(NOBODY)),
      env={"PYTHONPATH": os.pathsep.join(sys.path), "JAX_COMPILATION_CACHE_DIR": ""},
    )
    out, err = process.communicate()
    ends = [json.loads(line) for line in out.splitlines() if line.startswith("[")]
    assert len(ends) == len(cases), err[-3000:]
    results = json.loads((workdir / "results.json").read_text())
    for case, status, end in ends:
      name, kind, copy = cases[case]
      if status == 0:
        assert end == results, (name, kind)
        continue
      assert status == (75 if name.startswith("checkpoints/") else 2), (name, kind, end)
      assert_names(end, copy / name, "step 6 of ")
      after = files_of(copy)
      assert all(after[key] == value for key, value in before[case].items() if key != "data.json"), (
        name,
        kind,
      )
  finally:
    shutil.rmtree(root)
