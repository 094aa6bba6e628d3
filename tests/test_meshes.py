"""The same numbers on every mesh, over several processes, and with all ways to run the network."""

import pathlib

import jax
import numpy as np
import pytest
import test_mage_c
import tiny

from maskgen import sharding, tree
from maskgen.benchmarks.dataless import random_state
from maskgen.training.experiment import Experiment

STEPS = 5
MESHES = ((1, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2))
# Widths that no rule would shard by default are sharded here: networks are tiny.
RULES = {
  "mage": (
    ("^frozen/", ()),
    ("/(query|key|value|up)/kernel$", ("fsdp", "tensor")),
    ("/(query|key|value|up)/bias$", ("tensor",)),
    ("/(out|down)/kernel$", ("tensor", "fsdp")),
    ("(embedding|position)$", (None, "fsdp")),
  ),
  "tokenizer": (
    ("discriminator/(dense|logit)/", ()),
    ("conv_in/kernel$", (None, None, None, "fsdp")),
    ("(conv_0|conv_1)/kernel$", (None, None, None, ("fsdp", "tensor"))),
    ("codebook$", (None, "fsdp")),
  ),
}


def experiment(stage, mesh=(-1, 1, 1), rules=True, over_data=False, **overrides):
  config = tiny.stage(stage, **overrides)
  config["mesh"] = dict(zip(sharding.AXES, mesh, strict=True), optimizer_over_data=over_data)
  config["sharding"] = RULES[stage] if rules else ()
  if stage == "mage":
    config["pretrained"] = {"tokenizer": "random"}
  devices = jax.devices()[: abs(int(np.prod(mesh)))] if -1 not in mesh else None
  return Experiment(config, devices)


def losses(built):
  """The first losses of every group, always from the same parameters and data."""
  state, frozen = random_state(built)
  found = []
  batches = built.train_batches(0)
  for _ in range(STEPS):
    state, metrics = built.update(state, frozen, next(batches))
    found.append([float(metrics[f"loss/{group}"]) for group in sorted(state.params)])
  batches.close()
  return np.array(found), tree.flatten(jax.device_get(state.params)) if jax.process_count() == 1 else {}


@pytest.fixture(scope="module")
def alone():
  """The losses on one device."""
  return {stage: losses(experiment(stage, (1, 1, 1))) for stage in tiny.STAGES}


@pytest.mark.parametrize("mesh", MESHES[1:])
@pytest.mark.parametrize("stage", tiny.STAGES)
def test_every_mesh_gives_the_same_losses(stage, mesh, alone):
  built = experiment(stage, mesh)
  found, params = losses(built)
  np.testing.assert_allclose(found, alone[stage][0], rtol=1e-5, atol=1e-6)
  for name, value in params.items():
    np.testing.assert_allclose(value, alone[stage][1][name], atol=1e-4, err_msg=name)
  leaves = jax.tree.leaves(built.targets["state"].params)
  assert any(leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in leaves) == (mesh != (8, 1, 1))


WAYS = {
  "remat of products": dict(objective__remat="dots"),
  "scan": dict(objective__scan="True"),
  "scan with remat": dict(objective__scan="True", objective__remat="full"),
  "fused attention": dict(objective__scan="True", objective__remat="dots", objective__attention="pallas"),
}


DEEP = dict(objective__depth="2", objective__decoder_depth="1")


@pytest.fixture(scope="module")
def deep(alone):
  found = losses(experiment("mage", (1, 1, 1), **DEEP))[0]
  assert not np.allclose(found, alone["mage"][0], atol=1e-4)  # depth matters, dropout is on
  return found


@pytest.mark.parametrize("way", WAYS)
def test_how_the_blocks_are_run_changes_no_number(way, deep):
  found, _ = losses(experiment("mage", (2, 2, 2), **DEEP, **WAYS[way]))
  np.testing.assert_allclose(found, deep, rtol=1e-5)


def test_remat_of_a_tokenizer_changes_no_number(alone):
  found, _ = losses(experiment("tokenizer", (2, 2, 2), objective__remat="full"))
  np.testing.assert_allclose(found, alone["tokenizer"][0], rtol=1e-5)


def test_optimizer_state_over_data_changes_no_number(alone, monkeypatch):
  monkeypatch.setattr(sharding, "SMALL", 2**6)
  built = experiment("mage", (2, 2, 2), over_data=True)
  found, _ = losses(built)
  np.testing.assert_allclose(found, alone["mage"][0], rtol=1e-5)
  state = built.targets["state"]
  assert not any(
    "data" in jax.tree.leaves(tuple(leaf.sharding.spec)) for leaf in jax.tree.leaves(state.params)
  )
  split = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.size >= 2**6]
  assert all(leaf.sharding.num_devices == 8 and not leaf.sharding.is_fully_replicated for leaf in split)
  assert all("data" in jax.tree.leaves(tuple(leaf.sharding.spec)) for leaf in split)


def test_accumulation_changes_no_number():
  """Without dropout, whose masks are drawn per micro-batch."""
  plain = losses(experiment("mage", (1, 1, 1), objective__dropout="0.0"))[0]
  found, _ = losses(experiment("mage", (2, 2, 1), objective__dropout="0.0", accumulation="2"))
  np.testing.assert_allclose(found, plain, rtol=1e-5)


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_bfloat16_stays_close_and_keeps_parameters_and_losses_in_float32(stage, alone):
  key = "objective__dtype" if stage == "mage" else "objective__tokenizer__dtype"
  config = {key: "bfloat16"}
  built = experiment(stage, (2, 2, 2), **config)
  assert {leaf.dtype for leaf in jax.tree.leaves(built.targets["state"].params)} == {np.dtype(np.float32)}
  found, _ = losses(built)
  np.testing.assert_allclose(found, alone[stage][0], rtol=0.02)
  metrics = jax.eval_shape(built.update, *(built.targets[k] for k in ("state", "frozen")), built.data.spec)[1]
  assert {leaf.dtype for name, leaf in metrics.items() if name.startswith("loss/")} == {np.dtype(np.float32)}


def test_memory_of_the_state_falls_as_one_over_fsdp():
  """Measured by the size of the compiled program's arguments."""
  size = dict(objective__width="256", objective__decoder_width="256")
  sizes = {}
  for fsdp in (1, 8):
    built = experiment("mage", (1, fsdp, 1), **size)
    frozen = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(built.targets["frozen"]))
    sizes[fsdp] = built.compile().memory_analysis().argument_size_in_bytes - frozen
  for fsdp, found in sizes.items():
    np.testing.assert_allclose(found, sizes[1] / fsdp, rtol=0.1)


# Statistics of evaluations

EVALS = dict(evals__generation__type="generation", evals__generation__every_steps="1")


def statistics(built):
  """Of the features of the real pictures: the mean, and the diagonal and row sums of the covariance."""
  gaussian = built.evaluators["generation"][1]._real.pooled_moments
  return np.concatenate([gaussian.mean, gaussian.covariance.diagonal(), gaussian.covariance.sum(axis=0)])


@pytest.fixture(scope="module")
def statistics_alone():
  return statistics(experiment("mage", (1, 1, 1), **EVALS))


@pytest.mark.parametrize("devices", [2, 8])
def test_statistics_do_not_depend_on_the_number_of_devices(devices, statistics_alone):
  found = statistics(experiment("mage", (devices, 1, 1), **EVALS))
  np.testing.assert_allclose(found, statistics_alone, rtol=1e-6, atol=1e-6 * np.abs(statistics_alone).max())


# Processes


def of_processes():
  """The losses of each stage, the statistics, and the gradients of an objective of the global batch."""
  mage, tokenizer = experiment("mage", (2, 2, 2), **EVALS), experiment("tokenizer", (2, 4, 1))
  found = {"statistics": statistics(mage), "mage": losses(mage)[0], "tokenizer": losses(tokenizer)[0]}
  gradients = test_mage_c.loss_and_gradients(test_mage_c.experiment((8, 1, 1)))
  return found | {f"mage_c/{name}": value for name, value in gradients.items()}


SCRIPT = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
sys.path.insert(0, sys.argv[3])
import numpy as np
import test_meshes
np.savez(sys.argv[4], **test_meshes.of_processes())
"""


def test_two_processes_give_the_same_numbers(alone, statistics_alone, tmp_path):
  address = f"127.0.0.1:{tiny.free_port()}"
  folder, env = str(pathlib.Path(__file__).parent), {"XLA_FLAGS": tiny.XLA_FLAGS}
  files = [str(tmp_path / f"{index}.npz") for index in range(2)]
  processes = [
    tiny.python("-c", SCRIPT, address, str(index), folder, file, env=env) for index, file in enumerate(files)
  ]
  gradients = test_mage_c.loss_and_gradients(test_mage_c.experiment((1, 1, 1)))
  for process, file in zip(processes, files, strict=True):
    _, err = process.communicate()
    assert process.returncode == 0, err[-2000:]
    with np.load(file) as archive:
      found = dict(archive)
    for stage in tiny.STAGES:
      np.testing.assert_allclose(found.pop(stage), alone[stage][0], rtol=1e-5, atol=1e-6)
    scale = np.abs(statistics_alone).max()
    np.testing.assert_allclose(found.pop("statistics"), statistics_alone, rtol=1e-6, atol=1e-6 * scale)
    test_mage_c.assert_close({name.removeprefix("mage_c/"): x for name, x in found.items()}, gradients)
