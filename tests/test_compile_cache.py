"""Compiled programs that outlive their process: which folder, what is removed, and that no bit changes."""

import json
import os
import pathlib
import re
import shutil
import zlib

import jax
import pytest
import tiny
from jax.experimental.compilation_cache import compilation_cache as jax_cache

import maskgen
from maskgen import compile_cache, main

DIR = "jax_compilation_cache_dir"
SECONDS = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def unconfigured(tmp_path, monkeypatch):
  """JAX as a user has it who never heard of its cache; the folder that maskgen may use."""
  before = {name: jax.config.values[name] for name in (DIR, SECONDS, "jax_enable_compilation_cache")}
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  jax.config.update(DIR, None)
  yield tmp_path / "maskgen" / "compiled"
  for name, value in before.items():
    jax.config.update(name, value)


def test_programs_are_kept_where_only_their_user_can_write(unconfigured):
  compile_cache.use()
  folder = pathlib.Path(jax.config.values[DIR])
  assert folder.parent == unconfigured
  assert {path.stat().st_mode & 0o777 for path in (folder, unconfigured)} == {0o700}
  assert jax.config.values[SECONDS] < 0.1


def test_each_kind_of_cpu_has_its_folder(unconfigured, monkeypatch):
  here = compile_cache.machine()
  read = pathlib.Path.read_text

  def read_with(pattern, replacement):
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self: re.sub(pattern, replacement, read(self)))

  read_with("(?m)^flags.*", r"\g<0> avx9")
  assert compile_cache.machine() != here
  read_with("MHz.*", "MHz\t: 1")
  assert compile_cache.machine() == here
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(77), raising=False)
  assert compile_cache.machine() != here


@pytest.mark.parametrize("name, value", [(DIR, "/mine"), (DIR, ""), ("jax_enable_compilation_cache", False)])
def test_what_a_user_has_configured_stays(name, value, unconfigured):
  jax.config.update(name, value)
  compile_cache.use()
  assert jax.config.values[DIR] == (value if name == DIR else None)
  assert not unconfigured.exists()


def test_a_run_of_several_processes_is_left_alone(unconfigured, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  compile_cache.use()
  assert jax.config.values[DIR] is None


@pytest.mark.parametrize("case", ["others can write", "a file is there"])
def test_a_folder_that_cannot_be_trusted_or_made_is_not_used(case, unconfigured, caplog):
  unconfigured.parent.mkdir()
  if case == "others can write":
    unconfigured.mkdir()
    unconfigured.chmod(0o777)
  else:
    unconfigured.write_text("")
  with caplog.at_level("INFO", "maskgen"):
    compile_cache.use()
  assert jax.config.values[DIR] is None
  assert "compiled programs are not kept" in caplog.text and str(unconfigured) in caplog.text


def test_the_folder_is_bounded_and_heals(tmp_path):
  folder = tmp_path / "jaxlib"
  folder.mkdir()
  for number in range(4):
    path = folder / f"{number}-cache"
    path.write_bytes(zlib.compress(os.urandom(1000)))
    os.utime(path, (number, number))
  cut = folder / "cut-cache"
  cut.write_bytes(zlib.compress(os.urandom(1000))[:-1])
  compile_cache.prune(tmp_path, 10**6)
  assert sorted(path.name for path in folder.iterdir()) == [f"{number}-cache" for number in range(4)]
  for number in range(4):
    os.utime(folder / f"{number}-cache", (9 if number == 0 else number, number))  # the first was read last
  compile_cache.prune(tmp_path, 2500)
  assert sorted(path.name for path in folder.iterdir()) == ["0-cache", "3-cache"]


def test_a_killed_run_that_loads_its_programs_ends_with_the_same_bits(unconfigured, tmp_path, monkeypatch):
  monkeypatch.setattr(compile_cache, "_SECONDS", 0.0)  # however fast this machine compiles
  section = tiny.stage("tokenizer")
  section["objective"]["adversarial_weight"] = 0.0  # a discriminator would double what is compiled
  del section["objective"]["discriminator"], section["optimizer"]["discriminator"]
  config = tmp_path / "config.py"
  config.write_text(
    f"import ml_collections\ndef get_config(arg=None):\n  return ml_collections.ConfigDict({section!r})\n"
  )
  events = []

  def count(event, **_):
    events.append(event.split("/")[-1])

  def train(name):
    events.clear()
    main.main([f"--config={config}", f"--workdir={tmp_path / name}"])
    lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    clock = re.compile("timing/|input_wait")
    numbers = [{key: value for key, value in line.items() if not clock.match(key)} for line in lines]
    return numbers, maskgen.load(tmp_path / name).variables

  jax.monitoring.register_event_listener(count)
  jax_cache.reset_cache()
  try:
    numbers, variables = train("whole")
    assert events.count("cache_misses") >= 2  # at least the first state and the step
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "6")
    (tmp_path / "killed" / "results.json").unlink()
    numbers_of_killed, variables_of_killed = train("killed")
    assert events.count("cache_hits") > events.count("cache_misses")
  finally:
    jax.monitoring.unregister_event_listener(count)
    jax_cache.reset_cache()
  assert numbers_of_killed == numbers
  tiny.assert_same_bits(variables_of_killed, variables)
