"""Checkpoints and exports: restored bit for bit on any mesh, or an error that says what does not fit."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from tiny import assert_same_bits

import maskgen
from maskgen import sharding, storage
from maskgen.config import Checkpointing, Mesh
from maskgen.errors import UserError
from maskgen.tools import export
from maskgen.training import start as start_lib
from maskgen.training.state import TrainState

trained = tiny.trained


def make_state(seed: int, step: int = 3) -> TrainState:
  """A state with values that are easily lost: NaN, -0, subnormals, bfloat16, integers, scalars."""
  rng = np.random.default_rng(seed)
  params = {
    "main": {
      "layer": {"kernel": rng.normal(size=(16, 8)).astype(np.float32), "bias": np.float32([-0.0] * 8)},
      "half": jnp.asarray(rng.normal(size=(8,)), jnp.bfloat16),
    }
  }
  special = np.float32([np.nan, np.inf, -0.0, 1e-40, *rng.normal(size=4)])
  opt_state = {"main": ({"mu": special, "count": np.int32(step)}, ())}
  averages = {"main": jax.tree.map(lambda x: x + 1, params["main"])}
  state = TrainState(np.int32(step), params, opt_state, averages, {"usage": rng.uniform(size=8)})
  return jax.tree.map(lambda x: jnp.asarray(x), state)


def place(state, mesh, spec):
  """Splits every vector and matrix along its first axis over `spec`."""
  specs = jax.tree.map(lambda x: PartitionSpec(spec) if x.ndim else PartitionSpec(), state)
  return jax.device_put(state, jax.tree.map(lambda s: NamedSharding(mesh, s), specs))


def targets(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save(workdir, *states, keep=2):
  checkpoints = storage.Checkpoints(epath.Path(workdir), Checkpointing(keep=keep))
  for state in states:
    checkpoints.save(int(state.step), state)
  checkpoints.close()


def open_checkpoints(workdir):
  return storage.Checkpoints(epath.Path(workdir), Checkpointing())


def write_model(workdir, state, frozen=None):
  """Writes a workdir that `load_variables` accepts."""
  workdir.mkdir(exist_ok=True)
  (workdir / "config.json").write_text("{}")
  if frozen is not None:
    storage.write_frozen(epath.Path(workdir), frozen)
  save(workdir, state)


# Saving and restoring


@pytest.mark.parametrize("mesh", [Mesh(data=-1), Mesh(data=2, fsdp=4), Mesh(data=1, fsdp=2, tensor=4)])
def test_restore_gives_every_bit_back_on_any_mesh(mesh, tmp_path):
  state = make_state(0)
  save(tmp_path, place(state, sharding.make_mesh(Mesh(data=4, fsdp=2)), "fsdp"))
  target = targets(place(state, sharding.make_mesh(mesh), ("data", "fsdp")))
  restored = open_checkpoints(tmp_path).restore(target)
  assert_same_bits(restored, state)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, target)


def test_a_saved_state_may_be_overwritten_at_once(tmp_path):
  state, expected = make_state(0), jax.tree.map(np.array, make_state(0))
  checkpoints = open_checkpoints(tmp_path)
  checkpoints.save(3, state)
  jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
  checkpoints.close()
  assert_same_bits(open_checkpoints(tmp_path).restore(targets(make_state(0))), expected)


def test_the_newest_checkpoint_counts_and_old_ones_are_deleted(tmp_path):
  states = [make_state(step, step) for step in (1, 2, 10)]
  save(tmp_path, *states, keep=2)
  checkpoints = open_checkpoints(tmp_path)
  assert checkpoints.latest() == 10
  assert_same_bits(checkpoints.restore(targets(states[0])), states[-1])
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "2"]


def test_no_checkpoint_is_none(tmp_path):
  assert open_checkpoints(tmp_path).latest() is None


def test_a_checkpoint_of_other_shapes_gives_a_table_of_both(tmp_path):
  save(tmp_path, make_state(0))
  other = make_state(0)
  other.params["main"]["layer"]["kernel"] = jnp.zeros((16, 9))
  other.params["main"]["half"] = other.params["main"]["half"].astype(jnp.float32)
  other.params["main"]["added"] = jnp.zeros(2)
  del other.params["main"]["layer"]["bias"]
  with pytest.raises(UserError, match=r"a checkpoint in .* does not fit this config in 4 places") as error:
    open_checkpoints(tmp_path).restore(targets(other))
  rows = [line.split() for line in str(error.value).splitlines()[1:]]
  assert rows == [
    ["parameter", "found", "expected"],
    ["params/main/added", "-", "float32[2]"],
    ["params/main/half", "bfloat16[8]", "float32[8]"],
    ["params/main/layer/bias", "float32[8]", "-"],
    ["params/main/layer/kernel", "float32[16,", "8]", "float32[16,", "9]"],
  ]


# Reading a model's variables


def wanted(state, *, frozen=None):
  variables = state.variables(frozen or {})
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)


def test_averages_replace_parameters(tmp_path):
  state = make_state(0)
  write_model(tmp_path / "run", state)
  loaded = storage.load_variables(tmp_path / "run", wanted(state))
  assert_same_bits(loaded["params"], state.ema)
  assert_same_bits(loaded["extra"], state.model_state)


def test_groups_without_an_average_keep_their_parameters(tmp_path):
  state = make_state(0).replace(ema={})
  write_model(tmp_path / "run", state)
  assert_same_bits(storage.load_variables(tmp_path / "run", wanted(state))["params"], state.params)


def test_a_part_of_a_model_can_be_read_alone(tmp_path):
  state = make_state(0)
  write_model(tmp_path / "run", state, frozen={"tokenizer": {"kernel": np.ones(3, np.float32)}})
  part = storage.load_variables(
    tmp_path / "run", {"frozen": {"tokenizer": {"kernel": jax.ShapeDtypeStruct((3,), jnp.float32)}}}
  )
  assert_same_bits(part, {"frozen": {"tokenizer": {"kernel": np.ones(3, np.float32)}}})


def test_variables_land_where_the_target_says(tmp_path):
  state = make_state(0)
  write_model(tmp_path / "run", state)
  mesh = sharding.make_mesh(Mesh())
  target = targets(place(state.variables({}), mesh, "data"))
  loaded = storage.load_variables(tmp_path / "run", target)
  assert jax.tree.map(lambda x: x.sharding, loaded) == jax.tree.map(lambda x: x.sharding, target)


@pytest.mark.parametrize("exported", [False, True])
def test_variables_of_another_network_give_a_table(exported, tmp_path):
  state = make_state(0)
  del state.params["main"]["half"], state.ema["main"]["half"]
  if exported:
    storage.write_export(tmp_path / "run", {}, state.variables({}))
  else:
    write_model(tmp_path / "run", state)
  target = wanted(state)
  target["params"]["main"]["layer"]["kernel"] = jax.ShapeDtypeStruct((16, 9), jnp.float32)
  with pytest.raises(UserError, match="does not fit this config in 1 places") as error:
    storage.load_variables(tmp_path / "run", target)
  assert str(error.value).splitlines()[2].split() == [
    "params/main/layer/kernel", "float32[16,", "8]", "float32[16,", "9]",
  ]  # fmt: skip


# Frozen parts


@pytest.fixture
def frozen_run(tmp_path):
  frozen = {"tokenizer": {"kernel": np.arange(64, dtype=np.float32)}}
  write_model(tmp_path / "run", make_state(0), frozen)
  return tmp_path / "run"


@pytest.mark.parametrize("position", [0.1, 0.5, 1.0])
def test_one_flipped_bit_in_frozen_parts_is_found(frozen_run, position):
  file = frozen_run / "frozen" / "weights.safetensors"
  data = bytearray(file.read_bytes())
  data[round(position * (len(data) - 1))] ^= 1
  file.write_bytes(data)
  target = {"frozen": {"tokenizer": {"kernel": jax.ShapeDtypeStruct((64,), jnp.float32)}}}
  with pytest.raises(UserError, match=r"frozen/weights\.safetensors is damaged \(its checksum differs"):
    storage.load_variables(frozen_run, target)


def test_frozen_parts_are_checked_when_a_run_continues(trained, tmp_path):
  shutil.copytree(trained / "mage" / "frozen", tmp_path / "frozen")
  shape = maskgen.load(trained / "mage").variables["frozen"]
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shape)
  assert_same_bits(storage.read_frozen(epath.Path(tmp_path), target), shape)
  file = tmp_path / "frozen" / "weights.safetensors"
  file.write_bytes(file.read_bytes()[:-1] + b"\x01")
  with pytest.raises(UserError, match="damaged"):
    storage.read_frozen(epath.Path(tmp_path), target)


def test_frozen_parts_are_those_of_the_tokenizer_that_was_trained(trained):
  tokenizer, mage = maskgen.load(trained / "tokenizer"), maskgen.load(trained / "mage")
  assert_same_bits(mage.variables["frozen"]["tokenizer"], tokenizer.variables["params"]["generator"])


# Where a run starts


@pytest.fixture
def places(tmp_path):
  """`start` with its own workdir, another one and fresh parameters, all with different values."""
  own, other, fresh = (make_state(seed, step) for seed, step in ((1, 5), (2, 8), (3, 0)))
  save(tmp_path / "own", own)
  save(tmp_path / "other", other)
  storage.write_frozen(epath.Path(tmp_path / "own"), {"part": np.float32([1])})
  storage.write_frozen(epath.Path(tmp_path / "other"), {"part": np.float32([2])})

  def start(workdir, *, resume, init_from=None):
    workdir.mkdir(exist_ok=True)
    return start_lib.start(
      epath.Path(workdir),
      open_checkpoints(workdir),
      resume=resume,
      init_from=init_from,
      targets={
        "state": targets(own),
        "frozen": {"part": jax.ShapeDtypeStruct((1,), jnp.float32)},
      },
      init=lambda: (fresh, {"part": jnp.float32([3])}),
    )

  return tmp_path, start, (own, other, fresh)


def test_a_run_of_its_own_comes_before_all(places):
  root, start, (own, _, _) = places
  state, frozen, origin = start(root / "own", resume=str(root / "other"), init_from="/nowhere")
  assert_same_bits(state, own)
  assert frozen["part"] == 1 and origin == f"step 5 of {root / 'own'}"


def test_resume_comes_before_other_parameters(places):
  root, start, (_, other, _) = places
  state, frozen, origin = start(root / "new", resume=str(root / "other"), init_from="/nowhere")
  assert_same_bits(state, other)
  assert frozen["part"] == 2 and "other" in origin
  assert (root / "new" / "frozen" / "manifest.json").exists()  # self-contained from now on


def test_fresh_parameters_come_last(places):
  root, start, (_, _, fresh) = places
  state, frozen, origin = start(root / "new", resume=None)
  assert_same_bits(state, fresh)
  assert frozen["part"] == 3 and "fresh" in origin
  assert (root / "new" / "frozen" / "manifest.json").exists()


def test_the_log_says_whose_parameters_a_run_starts_from(places):
  root, start, (_, _, fresh) = places
  state, _, origin = start(root / "new", resume=None, init_from="weights/mage")  # `init` reads them
  assert_same_bits(state, fresh)
  assert origin == "the parameters of weights/mage"


def test_resume_leaves_the_other_run_alone(places):
  root, start, _ = places
  # It may be running, and be in the middle of a save.
  half = root / "other" / "checkpoints" / "9.orbax-checkpoint-tmp"
  half.mkdir()
  start(root / "new", resume=str(root / "other"))
  assert half.exists()


def test_resume_needs_checkpoints(places):
  root, start, _ = places
  with pytest.raises(UserError, match=r"nowhere holds no checkpoint yet"):
    start(root / "new", resume=str(root / "nowhere"))


# Folders that are no model


def test_folders_that_are_not_models_are_rejected(trained, tmp_path):
  (tmp_path / "file").write_text("x")
  (tmp_path / "empty").mkdir()
  (tmp_path / "damaged").mkdir()
  (tmp_path / "damaged" / "config.json").write_text('{"objective"')
  (tmp_path / "network").mkdir()
  (tmp_path / "network" / "config.json").write_text("{}")
  (tmp_path / "untrained").mkdir()
  shutil.copy(trained / "tokenizer" / "config.json", tmp_path / "untrained")
  for path, message in (
    (tmp_path / "missing", "does not exist: give the workdir of a run, or an export"),
    (tmp_path / "file", "is not a model"),
    (tmp_path / "empty", r"is not a model \(it has no config\.json\)"),
    (tmp_path / "damaged", r"damaged/config\.json is damaged"),
    (tmp_path / "network", "without an objective"),
    (tmp_path / "untrained", "no checkpoint yet: train it first"),
    (trained, r"holds several stages: give .*/tokenizer or .*/mage"),
  ):
    with pytest.raises(UserError, match=message):
      maskgen.load(path)


def test_an_incomplete_checkpoint_does_not_count(trained, tmp_path):
  shutil.copy(trained / "tokenizer" / "config.json", tmp_path)
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(UserError, match="no checkpoint yet"):
    maskgen.load(tmp_path)
  (tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
  with pytest.raises(UserError, match="no complete checkpoint yet"):
    maskgen.load(tmp_path)


# Exports


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_an_export_gives_the_same_model(stage, trained, tmp_path, capsys):
  export.main([f"--model={trained / stage}", f"--out={tmp_path / 'export'}"])
  assert f"to {tmp_path / 'export'}" in capsys.readouterr().out
  a, b = maskgen.load(trained / stage), maskgen.load(tmp_path / "export")
  assert_same_bits(a.variables, b.variables)
  assert a.config["objective"] == b.config["objective"]
  assert sorted(p.name for p in (tmp_path / "export").iterdir()) == [
    "config.json",
    "manifest.json",
    "weights.safetensors",
  ]


def test_an_export_answers_like_the_run_it_came_from(trained, tmp_path):
  export.main([f"--model={trained / 'mage'}", f"--out={tmp_path / 'export'}"])
  images = np.random.default_rng(0).integers(0, 256, (3, *tiny.SIZE, 3), np.uint8)
  hole = np.zeros(tiny.SIZE, bool)
  hole[4:9, 4:9] = True
  answers = []
  for path in (trained / "mage", tmp_path / "export"):
    model = maskgen.load(path)
    tokens = model.encode(images)
    answers.append(
      dict(
        tokens=tokens,
        decode=model.decode(tokens),
        reconstruct=model.reconstruct(images),
        features=model.features(images),
        logits=model.logits(tokens, tokens % 2 == 0),
        generate=model.generate(seed=1, batch=3),
        inpaint=model.inpaint(images, hole, seed=2),
      )
    )
  assert_same_bits(*answers)


def test_an_export_needs_no_run_beside_it(trained, tmp_path):
  shutil.copytree(trained / "mage", tmp_path / "run")
  export.main([f"--model={tmp_path / 'run'}", f"--out={tmp_path / 'export'}"])
  shutil.rmtree(tmp_path / "run")
  assert maskgen.load(tmp_path / "export").generate(batch=2).shape == (2, *tiny.SIZE, 3)
  config = json.loads((tmp_path / "export" / "config.json").read_text())
  assert set(config) == {"objective", "version", "data"}
  assert set(config["data"]) == {"eval_preprocess"}
  arrays = safetensors.numpy.load_file(tmp_path / "export" / "weights.safetensors")
  assert {name.split("/")[0] for name in arrays} == {"params", "frozen"}


def test_an_export_overwrites_nothing(trained, tmp_path):
  (tmp_path / "kept.txt").write_text("x")
  with pytest.raises(UserError, match=r"is not (an )?empty"):
    export.main([f"--model={trained / 'tokenizer'}", f"--out={tmp_path}"])
  assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


def test_one_flipped_bit_in_an_export_is_found_and_an_old_export_is_read_with_a_warning(
  trained, tmp_path, caplog
):
  folder = tmp_path / "export"
  export.main([f"--model={trained / 'tokenizer'}", f"--out={folder}"])
  variables = maskgen.load(folder).variables
  assert not caplog.records
  file = folder / "weights.safetensors"
  data = bytearray(file.read_bytes())
  data[-5] ^= 1
  file.write_bytes(data)
  with pytest.raises(
    UserError, match=r"weights.safetensors is damaged \(its checksum differs .*: restore .*"
  ):
    maskgen.load(folder)
  data[-5] ^= 1
  file.write_bytes(data)
  (folder / "manifest.json").unlink()
  assert_same_bits(maskgen.load(folder).variables, variables)
  (record,) = caplog.records
  assert "export has no manifest.json: its weights are used unchecked" in record.getMessage()


@pytest.mark.parametrize("keep", [0, 100])
def test_a_damaged_export_says_so(keep, trained, tmp_path):
  export.main([f"--model={trained / 'tokenizer'}", f"--out={tmp_path / 'export'}"])
  file = tmp_path / "export" / "weights.safetensors"
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(UserError, match=r"weights\.safetensors is damaged"):
    maskgen.load(tmp_path / "export")
