"""The setup on machines without accelerators."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny

from maskgen.models.transformer import Transformer

# One process imports what is needed, and has a copy of itself choose in each case: the choice lasts.
CORES = """
import json, os, sys
import jax
from maskgen import main, objectives
from maskgen.training import cpu
def stage(batch_size, accumulation=1, **mesh):
  sections = dict(data={}, objective={}, optimizer={}, mesh=mesh)
  return dict(batch_size=batch_size, accumulation=accumulation, total_steps=1, **sections)
def vit_b(batch_size):
  return main.choose_stage("configs/mage_base.py", {"batch_size": str(batch_size)})[1]
for cores, stages, flags, before in json.loads(sys.argv[1]):
  if not os.fork():
    os.environ["XLA_FLAGS"] = flags
    os.cpu_count = lambda: cores
    exec(before)
    cpu.use_cores(eval(f"[{stages}]"))
    patience = os.environ["XLA_FLAGS"].count("collective_call_terminate_timeout_seconds=3600")
    print(jax.device_count(), patience, flush=True)
    os._exit(0)
  os.wait()
"""
CASES = (
  (2, "stage(64), stage(8)", "", "", 2),
  (64, "stage(64)", "", "", 4),
  (4, "stage(12), stage(18)", "", "", 3),
  (4, "stage(64), stage(8, accumulation=4)", "", "", 2),
  (4, "stage(64), stage(64, data=1)", "", "", 1),
  (4, "vit_b(512)", "", "", 4),
  (4, "stage(64), vit_b(32)", "", "", 1),
  (4, "stage(64)", "--xla_force_host_platform_device_count=3", "", 3),
  (4, "stage(64)", "", "jax.devices()", 1),
  (4, "stage(64)", "", "cpu.use_devices(3)", 3),
)


@pytest.mark.parametrize(
  ("env", "cases"), [({}, CASES), ({"JAX_NUM_CPU_DEVICES": "3"}, ((4, "stage(64)", "", "", 3),))]
)
def test_cores_are_devices_where_every_stage_can_use_them(env, cases):
  process = tiny.python("-c", CORES, json.dumps([case[:-1] for case in cases]), env={"XLA_FLAGS": ""} | env)
  out, err = process.communicate()
  assert out.splitlines() == [f"{devices} 1" for *_, devices in cases], err


PAGES = """
import glob, os, sys
from maskgen.training import cpu
{before}
cpu.use_large_pages()
print(os.getpid(), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
@pytest.mark.parametrize(
  ("env", "before", "tunables"),
  [
    ({}, "", "glibc.malloc.hugetlb=1"),
    ({"GLIBC_TUNABLES": ""}, "", ""),
    ({}, "glob.glob = lambda pattern: [pattern]", None),
  ],
)
def test_large_pages_restart_the_same_program(env, before, tunables, monkeypatch):
  monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
  process = tiny.python("-c", PAGES.format(before=before), "--a=b c", "", env=env)
  out, err = process.communicate()
  assert out == f"{process.pid} {['--a=b c', '']} {tunables}\n", err


@pytest.mark.parametrize(("remat", "loops"), [("none", 0), ("full", 1)])
def test_scanned_blocks_are_a_loop_only_where_that_saves_memory(remat, loops):
  model, x = Transformer(depth=3, heads=1, scan=True, remat=remat), jnp.ones((1, 2, 4))
  params = model.init(jax.random.key(0), x, train=False)
  program = jax.jit(model.apply, static_argnames="train").lower(params, x, train=False)
  assert program.as_text().count("stablehlo.while") == loops
