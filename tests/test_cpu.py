"""The setup on machines without accelerators."""

import sys

import jax
import jax.numpy as jnp
import pytest
import tiny

from maskgen.models.transformer import Transformer

CORES = """
import os, jax
os.cpu_count = lambda: {cores}
from maskgen.training import cpu
def stage(batch_size, accumulation=1, **mesh):
  sections = dict(data={{}}, objective={{}}, optimizer={{}}, mesh=mesh)
  return dict(batch_size=batch_size, accumulation=accumulation, total_steps=1, **sections)
def vit_b(batch_size):
  from maskgen import main
  return main.choose_stage("configs/mage_base.py", {{"batch_size": str(batch_size)}})[1]
{before}
cpu.use_cores([{stages}])
print(jax.device_count(), os.environ["XLA_FLAGS"].count("collective_call_terminate_timeout_seconds=3600"))
"""


@pytest.mark.parametrize(
  ("cores", "stages", "env", "before", "devices"),
  [
    (2, "stage(64), stage(8)", {}, "", 2),
    (64, "stage(64)", {}, "", 4),
    (4, "stage(12), stage(18)", {}, "", 3),
    (4, "stage(64), stage(8, accumulation=4)", {}, "", 2),
    (4, "stage(64), stage(64, data=1)", {}, "", 1),
    (4, "vit_b(512)", {}, "", 4),
    (4, "stage(64), vit_b(32)", {}, "", 1),
    (4, "stage(64)", {"JAX_NUM_CPU_DEVICES": "3"}, "", 3),
    (4, "stage(64)", {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, "", 3),
    (4, "stage(64)", {}, "jax.devices()", 1),
    (4, "stage(64)", {}, "cpu.use_devices(3)", 3),
  ],
)
def test_cores_are_devices_where_every_stage_can_use_them(cores, stages, env, before, devices):
  script = CORES.format(cores=cores, stages=stages, before=before)
  process = tiny.python("-c", script, env={"XLA_FLAGS": ""} | env)
  out, err = process.communicate()
  assert out.split() == [str(devices), "1"], err


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
