"""The preflight's report must match the compiled step."""

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import re
import types

import jax
import pytest
import tiny

from maskgen import tree
from maskgen.benchmarks.dataless import build
from maskgen.costs import chips
from maskgen.errors import UserError
from maskgen.preflight import estimate as estimate_lib
from maskgen.preflight import remedies, table, topology
from maskgen.preflight.estimate import estimate
from maskgen.tools import preflight

CONTRACT = {
  *("devices", "fits", "hbm_bytes_per_device", "hbm_limit_bytes", "flops_per_step", "collectives"),
}


def stage(name="mage", **overrides):
  config = tiny.stage(name, **overrides)
  return config | ({"pretrained": {"tokenizer": "nowhere"}} if name == "mage" else {})


@pytest.fixture(scope="module")
def report():
  return estimate(stage(), jax.devices())


def test_a_data_parallel_step_sums_its_gradients_once(report):
  parameters = build(stage()).targets["state"].params
  size = 4 * tree.count(parameters)
  assert report["state_bytes_per_device"]["parameters"] == size
  assert set(report["collectives"]) == {"all-reduce"}
  # and a few metrics
  assert size <= report["collectives"]["all-reduce"]["bytes"] <= 1.02 * size
  assert report["collective_bytes_lower_bound"] == 2 * size


def test_the_report_has_its_keys_and_fits(report):
  assert report.keys() >= CONTRACT
  assert report["devices"] == 8 and report["fits"]
  assert 0 < report["hbm_bytes_per_device"] < report["hbm_limit_bytes"]
  assert report["flops_per_image"] * 8 == report["flops_per_step"]


def test_cached_tokens_take_less_arithmetic(report):
  tokens = estimate(stage(), jax.devices(), "tokens")
  assert tokens["flops_per_step"] < report["flops_per_step"]


def test_how_a_step_is_run_changes_no_model_flops(report):
  """XLA counts the body of accumulation's loop once, and also counts recomputation."""
  parts = estimate(stage(batch_size="16", accumulation="2", objective__remat="full"), jax.devices())
  assert parts["flops_per_image"] == report["flops_per_image"]
  assert parts["traffic_bytes_per_device"] > 1.5 * report["traffic_bytes_per_device"]


# Remedies


def test_remedies_are_tried_in_order():
  report = {
    "mesh": {"data": 4, "fsdp": 2, "tensor": 1},
    "batch_size": 32,
    "hbm_bytes_per_device": 120,
    "hbm_limit_bytes": 100,
    "state_bytes_per_device": {"parameters": 10, "optimizer": 20, "averages": 0},
  }
  shown = [remedies.show(change) for change in remedies.candidates(stage(), report)]
  fsdp = "--config.mesh.fsdp=8 --config.mesh.data=1"
  full = "--config.objective.remat=full"
  alone = ["--config.objective.remat=dots", full, f"{full} --config.accumulation=2"]
  assert shown == [
    fsdp,
    *alone,
    f"{full} --config.accumulation=4",
    *(f"{fsdp} {s}" for s in alone),
    shown[-1],
  ]
  # The state's part is too small to be to blame.
  report["state_bytes_per_device"]["optimizer"] = 10
  assert remedies.show(next(remedies.candidates(stage(), report))) == alone[0]
  two_slices = " ".join(map(remedies.show, remedies.candidates(stage(), report, slices=2)))
  assert "--config.mesh.fsdp=4 --config.mesh.data=2" in two_slices
  # A tokenizer has one kind of remat, and what it has is not offered.
  assert "remat=dots" not in " ".join(map(remedies.show, remedies.candidates(stage("tokenizer"), report)))
  used = remedies.candidates(stage(objective__remat="full"), report)
  assert remedies.show(next(used)) == "--config.accumulation=2"


def test_remat_of_nested_networks_is_proposed():
  report = {
    "mesh": {"data": 8, "fsdp": 1, "tensor": 1},
    "batch_size": 8,
    "hbm_bytes_per_device": 120,
    "hbm_limit_bytes": 100,
    "state_bytes_per_device": dict.fromkeys(("parameters", "optimizer", "averages"), 0),
  }
  config = {"objective": {"name": "diffusion", "unet": {"remat": "dots"}}}
  first, second = remedies.candidates(config, report)
  # One that has "dots" already gets more with the last change alone.
  assert remedies.show(first) == "--config.objective.text_encoder.remat=dots"
  assert remedies.apply(config, second)["objective"] == {
    "name": "diffusion",
    "text_encoder": {"remat": "full"},
    "unet": {"remat": "full"},
  }
  decoder = {"name": "diffusers", "family": "sd15"}
  config = {"objective": {"name": "vilex", "encoder": {"name": "vit"}, "decoder": decoder}}
  assert [*map(remedies.show, remedies.candidates(config, report))] == [
    f"--config.objective.decoder.remat={how} --config.objective.encoder.remat={how}"
    for how in ("dots", "full")
  ]


@pytest.mark.slow
def test_the_first_remedy_that_fits_is_found_by_compiling(monkeypatch, tmp_path, capsys):
  arguments = [f"--config={tiny.FILE}", "--stage=mage", "--config.mage.batch_size=128"]
  needs = [
    estimate(stage(batch_size="128", accumulation=str(count)), jax.devices())["hbm_bytes_per_device"]
    for count in (1, 2)
  ]
  assert needs[1] < needs[0]
  monkeypatch.setattr(estimate_lib, "_limit", lambda devices, chip: sum(needs) / 2)
  preflight.main([*arguments, f"--json={tmp_path / 'report.json'}", "--config.mage.objective.remat=full"])
  report = json.loads((tmp_path / "report.json").read_text())
  assert not report["fits"] and report["with_remedy"]["fits"]
  assert report["remedy"] == "--config.accumulation=2"
  assert "does not fit; it fits with --config.accumulation=2" in capsys.readouterr().out
  monkeypatch.setattr(estimate_lib, "_limit", lambda devices, chip: 1.0)
  preflight.main([*arguments, f"--json={tmp_path / 'report.json'}", "--config.mage.batch_size=8"])
  assert json.loads((tmp_path / "report.json").read_text())["remedy"] is None
  assert "use more or larger devices" in capsys.readouterr().out


def test_a_gpu_is_described_by_its_memory(report, monkeypatch):
  monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
  assert topology.memory("gpu:24GiB") == 18 * 2**30
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
  assert topology.memory("gpu:10GiB") == 9 * 2**30
  assert topology.memory("cpu:8") is None and topology.memory("gpu:0GiB") is None
  names = {"config": "c", "topology": "gpu:24GiB", "slices": 1}
  for estimated in (False, True):
    shown = table.show(names | report | {"activations_are_estimated": estimated})
    assert ("activations, an estimate " in shown) == estimated


def test_a_gpu_offers_what_jax_takes_of_its_memory():
  kind = "NVIDIA H200"

  def limit(stats, platform="gpu", kind=kind):
    device = types.SimpleNamespace(platform=platform, device_kind=kind, memory_stats=lambda: stats)
    return estimate_lib._limit([device], chips.chip_of(device))

  assert limit({"bytes_limit": 105e9}) == 105e9
  assert limit(None) == 141e9
  assert limit({}, kind="another GPU") == math.inf
  assert limit(None, "tpu", "TPU v4") == 30.75 * 2**30


# The command


def test_virtual_cpus(tmp_path):
  """In a separate process, since devices are chosen once."""
  arguments = (f"--config={tiny.FILE}", "--stage=tokenizer", "--topology=cpu:4")
  file = tmp_path / "report.json"
  env = {"XLA_FLAGS": tiny.XLA_FLAGS, "JAX_PLATFORMS": ""}
  process = tiny.python("-m", "maskgen.tools.preflight", *arguments, f"--json={file}", env=env)
  out, err = process.communicate()
  assert process.returncode == 0, err
  report = json.loads(file.read_text())
  assert report["devices"] == 4 and report["mesh"]["data"] == 4
  assert out.rstrip().endswith("; fits")


@pytest.mark.parametrize("slices", [1, 2])
def test_tpus_that_are_not_attached(tmp_path, slices):
  pytest.importorskip("libtpu", reason="needs maskgen[tpu]")
  arguments = (f"--config={tiny.FILE}", "--stage=mage", "--topology=v5e:2x2", f"--slices={slices}")
  file = tmp_path / "report.json"
  process = tiny.python("-m", "maskgen.tools.preflight", *arguments, f"--json={file}")
  out, err = process.communicate()
  assert process.returncode == 0, err
  report = json.loads(file.read_text())
  assert report.keys() >= CONTRACT | {"estimated_step_seconds"}
  # The compiler counts more than a bound does, and its estimate does not contain communication.
  assert report["expected_step_seconds"] > report["estimated_step_seconds"]
  assert report["expected_seconds"]["kernels"] > 0  # attention
  assert report["devices"] == 4 * slices and report["device_kind"] == "TPU v5 lite" and report["fits"]
  assert set(report["bounds_seconds"]) >= {"compute", "memory", "interconnect"}
  assert ("network" in report["bounds_seconds"]) == (slices > 1)
  assert "FLOP utilisation, at most" in out and "images per second, expect" in out


@pytest.mark.parametrize(
  "name,slices,message",
  [
    ("v5e16x16", 1, r"--topology=v5e16x16: give a TPU slice such as v5e:16x16"),
    ("v5e:0x0", 1, r"--topology=v5e:0x0: give a TPU slice such as v5e:16x16"),
    ("v5p:4x4x0", 1, r"--topology=v5p:4x4x0: give a TPU slice"),
    ("v5e:99999x99999", 1, r"--topology=v5e:99999x99999: give a TPU slice"),
    ("cpu:0", 1, r"--topology=cpu:0: give the number of CPU devices"),
    ("cpu:2", 2, r"--slices=2: only TPU slices can be combined"),
    ("gpu:x", 1, r"--topology=gpu:x: give a TPU slice .* or gpu:24GiB"),
    ("gpu:24GiB", 2, r"--slices=2: only TPU slices can be combined"),
  ],
)
def test_wrong_topologies_are_refused(name, slices, message):
  with pytest.raises(UserError, match=message):
    topology.devices(name, slices)


def test_tpus_need_their_compiler(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"needs libtpu, install it with: pip install 'maskgen\[tpu\]'"):
    topology.devices("v5e:2x2")


@pytest.mark.parametrize(
  ("needed", "found", "fits"),
  [
    ("libtpu==0.0.42.*; extra == 'tpu'", "0.0.42", True),
    ("libtpu==0.0.42.*; extra == 'tpu'", "0.0.42.1", True),
    ("libtpu==0.0.42.*; extra == 'tpu'", "0.0.420", False),
    ("libtpu==0.0.42", "0.0.420", False),
    ("libtpu>=0.0.42", "0.0.50", True),
  ],
)
def test_tpus_need_the_compiler_of_this_jax(needed, found, fits, monkeypatch):
  monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy", needed])
  monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
  message = rf"libtpu {re.escape(found)} is installed, but JAX \S+ needs 0\.0\.42: install it with pip"
  with contextlib.nullcontext() if fits else pytest.raises(UserError, match=message):
    topology.check_libtpu()


@pytest.mark.parametrize(
  "arguments,message",
  [
    (["--config.mage.batch_size=12"], r"batch_size=12 is not divisible by 8 .*use a multiple of 8"),
    (["--config.mage.mesh.tensor=16"], r"config.mesh asks for"),
    (["--json=report.txt"], r"--json=report.txt: give the name of a .json file"),
    (["--slices=0"], r"--slices=0: give at least 1"),
    (["--stage=tokenizer", "--source=tokens"], r"is not trained on codes"),
  ],
)
def test_wrong_input_is_refused(arguments, message):
  with pytest.raises(UserError, match=message):
    preflight.main([f"--config={tiny.FILE}", *arguments])


def test_the_table_names_what_fills_the_memory(report):
  shown = table.show({"config": "c", "topology": "cpu:8", "slices": 1} | report)
  for part in ("parameters", "optimizer", "activations", "all-reduce", "per image", "fits"):
    assert part in shown
