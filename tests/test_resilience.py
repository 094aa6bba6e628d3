"""Faults of a run: preemption, damaged checkpoints, full disk, exhausted memory, a second run beside it."""

import errno
import functools
import json
import logging
import os
import pathlib
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorflow as tf
import tiny
from etils import epath

import maskgen
from maskgen import cli, main, storage, tree
from maskgen.config import Checkpointing
from maskgen.errors import TransientError, UserError
from maskgen.training import lock, metrics, preemption, train
from maskgen.training.experiment import Experiment
from maskgen.training.workdir import only_run_in

trained = tiny.trained
STEPS = 9  # saves at 4, 8 and 9


@pytest.fixture(scope="module")
def experiment(trained):
  return Experiment(tiny.stage("mage", f"steps={STEPS}", pretrained__tokenizer=str(trained / "tokenizer")))


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory):
  """A run's workdir, results and last state."""
  workdir = new_workdir(tmp_path_factory.mktemp("finished"), experiment)
  results = train.train(experiment, workdir)
  return workdir, results, newest(experiment, workdir)


def new_workdir(folder, experiment):
  workdir = epath.Path(folder) / "mage"
  workdir.mkdir()
  (workdir / "config.json").write_text(json.dumps({"objective": dict(experiment.config.objective)}))
  return workdir


def newest(experiment, workdir):
  return storage.Checkpoints(workdir, Checkpointing()).restore(experiment.targets["state"])


# Preemption


@pytest.mark.parametrize("at", [1, 4, 6, 9])
def test_a_preempted_run_saves_stops_and_continues(at, experiment, finished, tmp_path, monkeypatch):
  workdir, compiled = new_workdir(tmp_path, experiment), experiment.update

  def update(state, frozen, batch):
    if int(state.step) + 1 == at:
      signal.raise_signal(signal.SIGTERM)
    return compiled(state, frozen, batch)

  before = signal.getsignal(signal.SIGTERM)
  with monkeypatch.context() as patch, pytest.raises(train.PreemptedError):
    patch.setattr(experiment, "update", update)
    train.train(experiment, workdir)
  assert signal.getsignal(signal.SIGTERM) is before
  assert storage.Checkpoints(workdir, Checkpointing()).latest() == at
  assert train.train(experiment, workdir) == finished[1]
  tiny.assert_same_bits(newest(experiment, workdir), finished[2])
  evaluated = [line["step"] for line in metrics.read(workdir) if "validation/loss" in line]
  assert evaluated == [4, 8, 9]


@pytest.fixture
def attended():
  """SIGINT as in a terminal: in the background it is ignored."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
  ("times", "at", "saved"), [(1, 7, 7), (2, 7, 4), (2, 2, None)], ids=["once", "twice", "too early"]
)
def test_an_interrupted_run_saves_unless_it_is_interrupted_again(
  times, at, saved, experiment, finished, tmp_path, monkeypatch, caplog, capfd, attended
):
  workdir, compiled = new_workdir(tmp_path, experiment), experiment.update

  def update(state, frozen, batch):
    if int(state.step) + 1 == at:
      for _ in range(times):
        signal.raise_signal(signal.SIGINT)
    return compiled(state, frozen, batch)

  with (
    caplog.at_level(logging.INFO, "maskgen"),
    monkeypatch.context() as patch,
    pytest.raises(KeyboardInterrupt),
  ):
    patch.setattr(experiment, "update", update)
    train.train(experiment, workdir)
  assert capfd.readouterr().err.count("interrupted: saves and stops") == 1
  says = "starts over, as nothing was saved yet" if saved is None else f"continues from step {saved}"
  assert f"interrupted; the same command {says}" in caplog.text
  assert storage.Checkpoints(workdir, Checkpointing()).latest() == saved
  assert train.train(experiment, workdir) == finished[1]
  tiny.assert_same_bits(newest(experiment, workdir), finished[2])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_evaluation_counts(
  number, experiment, finished, tmp_path, monkeypatch, attended
):
  workdir, evaluate = new_workdir(tmp_path, experiment), train.evaluate

  def signalled(experiment, variables, step, best):
    if step == 9:
      signal.raise_signal(number)
    return evaluate(experiment, variables, step, best)

  with (
    monkeypatch.context() as patch,
    pytest.raises(KeyboardInterrupt if number == signal.SIGINT else train.PreemptedError),
  ):
    patch.setattr(train, "evaluate", signalled)
    train.train(experiment, workdir)
  assert train.train(experiment, workdir) == finished[1]
  evaluated = [line["step"] for line in metrics.read(workdir) if "validation/loss" in line]
  assert evaluated == [4, 8, 9]


def test_an_interrupt_is_kept_if_nobody_reads_of_it(monkeypatch, attended):
  monkeypatch.setattr(os, "write", mock.Mock(side_effect=BrokenPipeError))
  listening = preemption.Preemption()
  signal.raise_signal(signal.SIGINT)
  assert listening.noticed and listening.interrupted
  listening.close()


def test_an_ignored_interrupt_stays_ignored(attended):
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  listening = preemption.Preemption()
  signal.raise_signal(signal.SIGINT)
  listening.close()
  assert not listening.noticed
  signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_run_continues_on_another_mesh_with_other_operational_keys(
  experiment, finished, trained, tmp_path, monkeypatch
):
  workdir, compiled = new_workdir(tmp_path, experiment), experiment.update

  def update(state, frozen, batch):
    if int(state.step) + 1 == 5:
      signal.raise_signal(signal.SIGTERM)
    return compiled(state, frozen, batch)

  with monkeypatch.context() as patch, pytest.raises(train.PreemptedError):
    patch.setattr(experiment, "update", update)
    train.train(experiment, workdir)
  changed = dict(mesh__fsdp="2", mesh__tensor="2", objective__remat="full", objective__scan="True")
  config = tiny.stage("mage", f"steps={STEPS}", pretrained__tokenizer=str(trained / "tokenizer"), **changed)
  config["sharding"] = (
    ("/(query|key|value|up)/kernel$", ("fsdp", "tensor")),
    ("/(out|down)/kernel$", ("tensor", "fsdp")),
  )
  other = Experiment(config)
  results = train.train(other, workdir)
  assert results == pytest.approx(finished[1], rel=1e-5)
  here, there = newest(other, workdir), finished[2]
  for name, value in tree.flatten(here.params).items():
    np.testing.assert_allclose(value, tree.flatten(there.params)[name], atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_preempted_command_ends_well(tmp_path):
  arguments = [f"--config={tiny.FILE}:steps=100000,log_every_steps=5", f"--workdir={tmp_path / 'run'}"]
  process = tiny.python("-m", "maskgen.main", *arguments)
  for line in process.stderr:
    if "step 5/" in line:
      process.send_signal(signal.SIGTERM)
      break
  _, rest = process.communicate()
  assert process.returncode == 0, rest
  assert "preempted" in rest.splitlines()[-1]
  assert not (tmp_path / "run" / "results.json").exists()
  assert list((tmp_path / "run" / "tokenizer" / "checkpoints").glob("*"))


# Damage


def data_files(workdir, step):
  """Some contain arrays and indices, some nothing that is still read; which ones is up to Orbax."""
  return [file for file in pathlib.Path(workdir / "checkpoints" / str(step)).rglob("d/*") if file.is_file()]


def flip(files, place):
  for file in files:
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 16
    file.write_bytes(bytes(content))


DAMAGES = {
  "flipped bytes": lambda w: flip(data_files(w, 9), 0.5),
  "flipped bytes near the end": lambda w: flip(data_files(w, 9), 0.9),
  "truncated files": lambda w: [file.write_bytes(file.read_bytes()[:100]) for file in data_files(w, 9)],
  "missing files": lambda w: [file.unlink() for file in data_files(w, 9)],
  "no checksums": lambda w: (w / "checkpoints" / "9" / "checksums").rmtree(),
  "no state": lambda w: (w / "checkpoints" / "9" / "state").rmtree(),
  "an empty folder": lambda w: [
    p.rmtree() if p.is_dir() else p.unlink() for p in (w / "checkpoints" / "9").iterdir()
  ],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
  damage, experiment, finished, tmp_path, caplog
):
  workdir = epath.Path(tmp_path) / "mage"
  shutil.copytree(finished[0], workdir)
  DAMAGES[damage](workdir)
  assert maskgen.load(workdir) is not None  # reads the one before, and changes nothing
  assert (workdir / "checkpoints" / "9").exists()
  assert "step 9 is damaged" in caplog.text
  assert train.train(experiment, workdir) == finished[1]
  tiny.assert_same_bits(newest(experiment, workdir), finished[2])
  assert [p.name.split("-")[0] for p in (workdir / "damaged").iterdir()] == ["9"]


def copy_of(finished, folder):
  workdir = epath.Path(folder) / "mage"
  shutil.copytree(finished[0], workdir)
  return workdir


def steps_of(workdir):
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_nothing_intact_is_an_error_and_moves_nothing(experiment, finished, tmp_path):
  workdir = copy_of(finished, tmp_path)
  for step in (before := steps_of(workdir)):
    flip(data_files(workdir, step), 0.5)
  for _ in range(2):
    with pytest.raises(
      UserError, match=r"holds no intact checkpoint \(step 9: .*; step 8: .*restore one from a copy"
    ):
      train.train(experiment, workdir)
  assert steps_of(workdir) == before and not (workdir / "damaged").exists()


@pytest.mark.parametrize(
  "error",
  [
    PermissionError(13, "Permission denied"),
    OSError(5, "Input/output error"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes."),
    ValueError("UNAVAILABLE: Error reading from the store"),
    ValueError('PERMISSION_DENIED: Error opening local file "x"'),
  ],
  ids=str,
)
def test_a_checkpoint_that_cannot_be_read_is_not_damaged(error, experiment, finished, tmp_path, monkeypatch):
  workdir = copy_of(finished, tmp_path)
  before = steps_of(workdir)

  def fail(*_, **__):
    raise error

  for method in ("restore", "metadata"):
    with monkeypatch.context() as patch, pytest.raises(TransientError) as caught:
      patch.setattr(ocp.PyTreeCheckpointHandler, method, fail)
      train.train(experiment, workdir)
    assert str(error) in str(caught.value) and "step 9 of " in str(caught.value)
    assert steps_of(workdir) == before and not (workdir / "damaged").exists()
  assert train.train(experiment, workdir) == finished[1]


@pytest.mark.parametrize("change", ["swapped", "copied"])
def test_a_checkpoint_in_the_folder_of_another_step_is_not_used(change, experiment, finished, tmp_path):
  workdir = copy_of(finished, tmp_path)
  folder = workdir / "checkpoints"
  (folder / "9").rename(folder / "other")
  if change == "swapped":
    (folder / "8").rename(folder / "9")
    (folder / "other").rename(folder / "8")
  else:
    shutil.copytree(folder / "8", folder / "9")
    shutil.rmtree(folder / "other")
  assert train.train(experiment, workdir) == finished[1]
  tiny.assert_same_bits(newest(experiment, workdir), finished[2])
  put_aside = {path.name.split("-")[0] for path in (workdir / "damaged").iterdir()}
  assert put_aside == ({"8", "9"} if change == "swapped" else {"9"})


def test_a_run_that_lost_its_checkpoints_does_not_silently_start_over(experiment, finished, tmp_path):
  workdir = copy_of(finished, tmp_path)
  (workdir / "checkpoints").rmtree()
  (workdir / "damaged" / "9").mkdir(parents=True)
  lines = (workdir / "metrics.jsonl").read_text()
  with pytest.raises(UserError, match=r"no checkpoint, but its metrics.jsonl reaches step 9: restore"):
    train.train(experiment, workdir)
  assert (workdir / "metrics.jsonl").read_text() == lines
  (workdir / "metrics.jsonl").unlink()
  with pytest.raises(UserError, match=r"has only damaged checkpoints: .* or rename .*/damaged"):
    train.train(experiment, workdir)
  (workdir / "damaged").rename(workdir / "kept")
  assert train.train(experiment, workdir) == finished[1]


TWO = """
import sys
import jax, numpy as np
from etils import epath
from maskgen import cli, processes, sharding, storage
from maskgen.config import Checkpointing, Mesh
def main(argv):
  workdir, address, index, save = epath.Path(argv[0]), argv[1], int(argv[2]), argv[3] == "save"
  processes.start(address, 2, index)
  mesh = sharding.make_mesh(Mesh(fsdp=2))
  split = jax.NamedSharding(mesh, jax.P("fsdp"))
  checkpoints = storage.Checkpoints(workdir, Checkpointing())
  if save:
    value = np.random.default_rng(0).normal(size=(2, 2**18)).astype(np.float32)
    for step in (1, 2):
      array = jax.make_array_from_callback(value.shape, split, lambda at: step * value[at])
      number = jax.device_put(np.int32(step), sharding.replicated(mesh))
      checkpoints.save(step, {"step": number, "kernel": array})
  else:
    targets = {"kernel": jax.ShapeDtypeStruct((2, 2**18), np.float32, sharding=split)}
    checkpoints.read(lambda stored: targets)
    print(f"continues from {checkpoints.latest()}")
  checkpoints.close()
cli.run(main)
"""


def two_processes(workdir, action):
  """Saves or reads an array sharded over two processes; returns statuses, output and errors."""
  address = f"127.0.0.1:{tiny.free_port()}"
  both = [
    tiny.python("-c", TWO, str(workdir), address, str(index), action, env={"XLA_FLAGS": ""})
    for index in range(2)
  ]
  ends = [process.communicate(timeout=200) for process in both]
  return [process.returncode for process in both], [out for out, _ in ends], [err for _, err in ends]


@pytest.mark.slow
def test_what_one_of_two_processes_cannot_read_neither_uses(tmp_path):
  statuses, _, errors = two_processes(tmp_path, "save")
  assert statuses == [0, 0], errors
  files = (tmp_path / "checkpoints" / "2" / "state" / "ocdbt.process_1" / "d").iterdir()
  file = max(files, key=lambda path: path.stat().st_size)  # half of the kernel
  content = file.read_bytes()
  file.unlink()
  file.mkdir()  # which is no damage: it cannot be read
  statuses, _, errors = two_processes(tmp_path, "read")
  assert statuses == [75, 75], errors
  assert all("step 2 of " in error and "cannot be read" in error for error in errors)
  file.rmdir()
  file.write_bytes(content)
  flip([file], 0.5)
  statuses, outputs, errors = two_processes(tmp_path, "read")
  assert statuses == [0, 0], errors
  assert [output.splitlines()[-1] for output in outputs] == ["continues from 1"] * 2
  assert [path.name.split("-")[0] for path in (tmp_path / "damaged").iterdir()] == ["2"]


def test_checksums_see_every_bit_and_no_sharding(monkeypatch):
  rng = np.random.default_rng(0)
  arrays = {
    "float": rng.normal(size=(16, 6)).astype(np.float32),
    "half": jax.numpy.asarray(rng.normal(size=(8,)), "bfloat16"),
    "flags": rng.integers(0, 2, (8,)).astype(bool),
    "bytes": rng.integers(0, 256, (8, 3)).astype(np.uint8),
    "scalar": np.int32(7),
    "empty": np.zeros((0, 3), np.float32),
  }
  arrays = {name: jax.numpy.asarray(value) for name, value in arrays.items()}
  expected = tree.checksums(arrays)
  mesh = jax.make_mesh((8,), ("x",))
  sharded = {
    name: jax.device_put(arrays[name], jax.NamedSharding(mesh, jax.P("x")))
    for name in ("float", "half", "flags", "bytes")
  }
  assert tree.checksums(sharded) == {name: expected[name] for name in sharded}
  # As devices compute them that are no CPUs, or belong to several processes.
  monkeypatch.setattr(tree, "_is_on_host", lambda array: False)
  assert tree.checksums(arrays) == expected
  assert tree.checksums(sharded) == {name: expected[name] for name in sharded}
  monkeypatch.undo()
  for name in ("float", "half", "bytes", "scalar"):
    raw = np.array(arrays[name])
    flat = raw.reshape(-1).view(np.uint8)
    for place in range(0, flat.size, 5):
      flat[place] ^= 1 << (place % 8)
      assert tree.checksums({name: jax.numpy.asarray(raw)})[name] != expected[name]
      flat[place] ^= 1 << (place % 8)
  swapped = arrays["float"][::-1]
  assert tree.checksums({"float": swapped})["float"] != expected["float"]


def test_checksums_of_many_sharded_arrays_do_not_wait_for_each_other(monkeypatch):
  """XLA would abort the process if they did."""
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
  axes = (jax.P("fsdp", "tensor"), jax.P(None, "data"), jax.P("tensor"))
  plain = {str(i): np.full((64, 32), i, np.float32) for i in range(150)}
  sharded = {i: jax.device_put(plain[i], jax.NamedSharding(mesh, axes[int(i) % 3])) for i in plain}
  monkeypatch.setattr(tree, "_is_on_host", lambda array: len(array.devices()) == 1)
  assert tree.checksums(sharded) == tree.checksums({i: jax.numpy.asarray(plain[i]) for i in plain})


# Evaluations, and a workdir that moves


@pytest.mark.parametrize(
  ("error", "kind", "message"),
  [
    (UserError("no network"), UserError, "^config.evals.validation: no network$"),
    (KeyError("a fault"), KeyError, "a fault"),
    (
      jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
      UserError,
      "^config.evals.validation: the memory of the dev",
    ),
  ],
)
def test_an_evaluation_that_fails_is_named_and_costs_no_steps(
  error, kind, message, experiment, finished, tmp_path, monkeypatch
):
  class Failing:
    def run(self, variables, rng):
      raise error

  workdir = new_workdir(tmp_path, experiment)
  with monkeypatch.context() as patch, pytest.raises(kind, match=message) as caught:
    patch.setitem(experiment.evaluators, "validation", (4, Failing()))
    train.train(experiment, workdir)
  assert kind is UserError or caught.value.__notes__ == ["in config.evals.validation"]
  assert steps_of(workdir) == [4]
  assert train.train(experiment, workdir) == finished[1]
  assert [line["step"] for line in metrics.read(workdir) if "validation/loss" in line] == [4, 8, 9]


def test_a_workdir_that_is_moved_ends_the_run_and_continues_where_it_is(
  experiment, finished, tmp_path, monkeypatch
):
  workdir, compiled = new_workdir(tmp_path, experiment), experiment.update

  def update(state, frozen, batch):
    if int(state.step) == 6:
      while not (workdir / "checkpoints" / "4").exists():
        time.sleep(0.01)  # it is written in the background
      workdir.rename(tmp_path / "moved")
    return compiled(state, frozen, batch)

  with monkeypatch.context() as patch, pytest.raises(UserError, match=r"mage/metrics.jsonl was moved, "):
    patch.setattr(experiment, "update", update)
    train.train(experiment, workdir)
  assert [path.name for path in tmp_path.iterdir()] == ["moved"]
  moved = epath.Path(tmp_path / "moved")
  assert steps_of(moved) == [4]
  assert train.train(experiment, moved) == finished[1]
  tiny.assert_same_bits(newest(experiment, moved), finished[2])


# What is full


def test_a_full_disk_keeps_what_is_saved(experiment, tmp_path, monkeypatch):
  workdir = new_workdir(tmp_path, experiment)
  save = ocp.CheckpointManager.save

  def no_space(manager, step, **options):
    if step == 8:
      raise OSError(28, "No space left on device")
    return save(manager, step, **options)

  with (
    monkeypatch.context() as patch,
    pytest.raises(UserError, match=r"No space left.*free space.*; step 4 is saved"),
  ):
    patch.setattr(ocp.CheckpointManager, "save", no_space)
    train.train(experiment, workdir)
  assert int(newest(experiment, workdir).step) == 4


def test_a_disk_that_is_full_at_a_metric_line_is_named_and_the_run_continues(
  experiment, finished, tmp_path, monkeypatch
):
  workdir, numbers = new_workdir(tmp_path, experiment), metrics.Writer.numbers

  def no_space(writer, step, values):
    if step == 6:
      writer._file.write('{"step": 6, "tr')  # what fits
      raise OSError(28, "No space left on device")
    numbers(writer, step, values)

  with (
    monkeypatch.context() as patch,
    pytest.raises(TransientError, match=r"mage cannot be read or written \(No space left .*: free space"),
  ):
    patch.setattr(metrics.Writer, "numbers", no_space)
    train.train(experiment, workdir)
  assert train.train(experiment, workdir) == finished[1]
  assert [line["step"] for line in metrics.read(workdir)] == [3, 4, 4, 6, 8, 8, 9, 9]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits files of a running process")
def test_a_save_in_the_background_that_fails_ends_the_run_with_one_error(tmp_path):
  workdir = tmp_path / "run"
  config = f"{tiny.FILE}:only=tokenizer,steps=100000,save_steps=50,log_every_steps=50"
  arguments = [
    f"--config={config}",
    f"--workdir={workdir}",
    "--config.evals.reconstruction.every_steps=90000",
  ]
  process = tiny.python("-m", "maskgen.main", *arguments)
  while not (workdir / "checkpoints" / "50").exists():
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.01)
  # As on a full disk, no larger file can be written from now on.
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
  _, rest = process.communicate()
  assert process.returncode == TransientError.status, rest
  # Orbax may leave a warning of its own behind it.
  (error,) = (line for line in rest.splitlines() if line.startswith("error: "))
  saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
  assert "could not be written" in error and "File too large" in error
  assert error.endswith(f"; step {saved} is saved")
  process = tiny.python("-m", "maskgen.main", *arguments)
  assert any(f"starts from step {saved} of" in line for line in process.stderr)
  assert any("compiling the training step, then progress every 50 steps" in line for line in process.stderr)
  process.kill()
  process.communicate()


def test_exhausted_memory_has_remedies(experiment, tmp_path, monkeypatch):
  def update(state, frozen, batch):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

  monkeypatch.setattr(experiment, "update", update)
  with pytest.raises(
    UserError, match=r"memory of the devices is exhausted .*: raise config.accumulation or config.mesh.fsdp"
  ):
    train.train(experiment, new_workdir(tmp_path, experiment))


def test_a_loss_that_is_not_finite_names_its_records(experiment, tmp_path, monkeypatch):
  workdir, compiled = new_workdir(tmp_path, experiment), experiment.update

  def update(state, frozen, batch):
    at = int(state.step) + 1
    state, values = compiled(state, frozen, batch)
    return state, values | ({"loss/main": np.float32(np.nan)} if at == 5 else {})

  monkeypatch.setattr(experiment, "update", update)
  with pytest.raises(UserError, match=r"^step 5: loss/main is nan; .* not_finite.json names its records"):
    train.train(experiment, workdir)
  batches = experiment.data.train_batches(4)
  report = json.loads((workdir / "not_finite.json").read_text())
  assert report == {"step": 5, "records": [f"record {i}" for i in next(batches)["record"]]}


# Two runs


def test_the_second_run_in_a_workdir_is_refused(tmp_path):
  folder = epath.Path(tmp_path) / "run"
  with only_run_in(folder):
    with pytest.raises(
      TransientError, match=rf"run is active in .*run \(process {os.getpid()} on .*\): wait until it ends"
    ):
      main.main([f"--config={tiny.FILE}:only=tokenizer", f"--workdir={folder}"])
    with only_run_in(folder / "other"):
      pass
  with only_run_in(folder):
    pass


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, None])
def test_a_folder_without_locks_is_signed(code, tmp_path, monkeypatch):
  def flock(*_):
    raise OSError(code, os.strerror(code))

  if code is None:
    monkeypatch.setattr(lock, "fcntl", None)  # as on Windows
  else:
    monkeypatch.setattr(lock.fcntl, "flock", flock)
  sign = lock.Signature
  monkeypatch.setattr(lock, "Signature", functools.partial(sign, seconds=0.2))
  folder = epath.Path(tmp_path)
  with lock.hold(folder):
    # Watches long enough for the owner to sign once, however busy the machine.
    monkeypatch.setattr(lock, "Signature", functools.partial(sign, seconds=10.0))
    with pytest.raises(TransientError, match="another run is active in"), lock.hold(folder):
      pass
  monkeypatch.setattr(lock, "Signature", functools.partial(sign, seconds=0.2))
  with lock.hold(folder):
    pass


def test_a_signature_keeps_others_away_while_its_owner_lives(tmp_path):
  file, lost = epath.Path(tmp_path) / ".lock", threading.Event()
  mine = lock.Signature(file, lost.set, 0.2)
  with pytest.raises(TransientError, match=rf"another run is active in .*process {os.getpid()} on "):
    lock.Signature(file, print, 10.0)
  mine.close()
  assert not lost.is_set() and not file.exists()
  lock.Signature(file, print, 0.2).close()


def test_who_reads_a_signature_never_sees_half_of_one(tmp_path):
  file = epath.Path(tmp_path) / ".lock"
  mine = lock.Signature(file, print, 0.0005)
  seen = {bool(file.read_text()) for _ in range(3000)}
  mine.close()
  assert seen == {True}


def test_the_signature_of_a_killed_process_is_taken_over(tmp_path):
  file, lost = epath.Path(tmp_path) / ".lock", threading.Event()
  code = "import os, sys; from etils import epath; from maskgen.training import lock; "
  code += "lock.Signature(epath.Path(sys.argv[1]), print, 0.2); os.kill(os.getpid(), 9)"
  tiny.python("-c", code, str(file)).communicate()
  assert file.exists()
  mine = lock.Signature(file, lost.set, 0.2)
  assert f"process {os.getpid()} on " in file.read_text()
  # And from this one, as if it had stood still: somebody else has it now.
  file.write_text("process 1 on another\nfirst\n")
  assert lost.wait(30)
  mine.close()
  assert file.read_text() == "process 1 on another\nfirst\n"


def test_of_many_who_want_a_signature_at_most_one_has_it(tmp_path):
  file, held, refused = epath.Path(tmp_path) / ".lock", [], []

  def want():
    try:
      held.append(lock.Signature(file, print, 5.0))
    except TransientError:
      refused.append(1)

  threads = [threading.Thread(target=want) for _ in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (len(held), len(refused)) == (1, 5)
  held[0].close()


# Exit statuses


@pytest.mark.parametrize(
  "error, status", [(UserError("wrong"), 2), (TransientError("later"), 75), (KeyError("a fault"), 1)]
)
def test_the_exit_status_says_whether_to_start_again(error, status, monkeypatch, capsys):
  monkeypatch.setattr(cli, "_end", lambda status: sys.exit(status))

  def fail(_):
    raise error

  with pytest.raises(SystemExit) as exit_:
    cli.run(fail)
  assert exit_.value.code == status
  last = capsys.readouterr().err.splitlines()[-1]
  assert last == (f"error: {error}" if isinstance(error, UserError) else "KeyError: 'a fault'")


def test_what_a_process_says_after_another_has_ended_is_one_sentence(monkeypatch, capsys):
  monkeypatch.setattr(cli, "_end", lambda status: sys.exit(status))
  said = "Gloo all-reduce failed: [external/gloo/pair.cc:5] Connection closed by peer [127.0.0.1]:39"

  def fail(_):
    try:
      raise jax.errors.JaxRuntimeError(f"INTERNAL: {said}\nand more")
    except jax.errors.JaxRuntimeError as error:
      raise ValueError("of a library") from error

  with pytest.raises(SystemExit) as exit_:
    cli.run(fail)
  assert exit_.value.code == TransientError.status
  assert capsys.readouterr().err == f"error: another process of this run has ended ({said}): see its log\n"


@pytest.mark.parametrize(
  ("error", "status", "message"),
  [
    (
      OSError(28, "No space left on device", "/x/y"),
      75,
      "/x/y cannot be read or written (No space left on device",
    ),
    (OSError(5, "Input/output error"), 75, "a file or store cannot be read or written (Input/output error)"),
    (
      PermissionError(13, "Permission denied", "/x/y"),
      2,
      "/x/y cannot be read or written (Permission denied)",
    ),
    (
      tf.errors.FailedPreconditionError(None, None, "Could not resolve host: googleapis.com"),
      75,
      "resolve host",
    ),
    (
      tf.errors.PermissionDeniedError(None, None, "403 for gs://bucket/run"),
      2,
      "(403 for gs://bucket/run): check",
    ),
    (
      tf.errors.UnimplementedError(None, None, "File system scheme 's3' not implemented"),
      2,
      "scheme 's3' not",
    ),
  ],
  ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_file_systems_and_stores_say_is_one_sentence(error, status, message, monkeypatch, capsys):
  monkeypatch.setattr(cli, "_end", lambda status: sys.exit(status))

  def fail(_):
    raise error

  with pytest.raises(SystemExit) as exit_:
    cli.run(fail)
  assert exit_.value.code == status
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ") and message in line


ALONE = """
import sys
from maskgen import cli, errors, processes
def main(argv):
  processes.start(argv[0], 2, int(argv[1]))
  processes.any_of(False)
  if argv[1] == "1":
    raise errors.UserError("wrong here alone")
  processes.any_of(False)
cli.run(main)
"""


@pytest.mark.slow
def test_a_process_that_fails_alone_does_not_wait_for_the_others(tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  both = [tiny.python("-c", ALONE, address, str(index)) for index in range(2)]
  _, err = both[1].communicate(timeout=150)  # JAX alone would wait for 300 seconds
  assert both[1].returncode == 2 and "error: wrong here alone" in err
  both[0].kill()
  both[0].communicate()
