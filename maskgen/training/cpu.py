"""Fast training on a machine without accelerators: its cores and its memory."""

import contextlib
import ctypes
import dataclasses
import functools
import glob
import importlib.metadata
import math
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from maskgen import config as config_lib
from maskgen.errors import UserError

# With more, updating them on each device costs more than the device gains.
_PARAMETERS_PER_EXAMPLE = 2_000_000
# XLA ends a process in which one device waits 40 s for another, as on a busy machine or a laptop that slept.
_PATIENCE = "xla_cpu_collective_call_terminate_timeout_seconds"
_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")


def use_cores(stages: Iterable[Mapping[str, Any]]) -> None:
  """Makes each core a device, if every stage gains from it; call it before anything asks JAX for devices.

  Several devices use cores better than the threads of one, but each holds a copy of the state and updates all
  parameters: there are at most four, and one where parameters are many and examples few. Multi-process runs
  are unchanged, as are machines with accelerators, and a number of devices given by `XLA_FLAGS` or
  `JAX_NUM_CPU_DEVICES`.

  Args:
    stages: plain configs, each of one stage.

  Raises:
    UserError: if one of them is wrong.
  """
  _wait_for_devices()
  if not _is_free():
    return
  counts = set(range(1, min(os.cpu_count() or 1, 4) + 1))
  for stage in stages:
    cfg = config_lib.build_dataclass(config_lib.RunConfig, stage, "config")
    divides = dataclasses.replace(cfg.mesh, optimizer_over_data=False) == config_lib.Mesh()
    counts &= {n for n in counts if divides and cfg.batch_size % (cfg.accumulation * n) == 0}
    if len(counts) > 1 and _parameters(cfg.objective) > _PARAMETERS_PER_EXAMPLE * cfg.batch_size:
      counts = {1}
  _set_devices(max(counts, default=1))


def use_devices(count: int) -> None:
  """Makes a number of CPU devices, where `use_cores` would choose one; call it as early."""
  _wait_for_devices()
  if _is_free():
    _set_devices(count)


def _wait_for_devices() -> None:
  """Gives the CPU devices of one process an hour to wait for each other, unless `XLA_FLAGS` says how long.

  With several processes those of one that has lost another should end soon.
  """
  import jax

  given = os.environ.get("XLA_FLAGS", "")
  if _PATIENCE not in given and not _accelerators() and not jax.distributed.is_initialized():
    os.environ["XLA_FLAGS"] = f"{given} --{_PATIENCE}=3600".strip()


def _is_free() -> bool:
  """Whether the number of CPU devices is for maskgen to choose."""
  import jax

  given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
  if given or jax.config.values["jax_num_cpu_devices"] != -1 or jax.distributed.is_initialized():
    return False
  return not _accelerators() or os.environ.get("JAX_PLATFORMS") == "cpu"


def _set_devices(count: int) -> None:
  import jax

  with contextlib.suppress(RuntimeError):  # a notebook may have asked for devices before
    jax.config.update("jax_num_cpu_devices", count)


def _parameters(section: Mapping[str, Any]) -> int:
  """The number of parameters that an objective trains, from their shapes; 0 if its section is wrong."""
  import jax
  import jax.numpy as jnp

  from maskgen import objectives, sharding

  def init(objective: objectives.Objective) -> Any:
    shapes = objective.pretrained_shapes()
    pretrained = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return objective.init(jax.random.key(0), pretrained)["params"]

  try:
    objective = objectives.build(section)
    params = jax.eval_shape(sharding.on_mesh(functools.partial(init, objective), sharding.SHAPES_ONLY))
  except UserError:  # the experiment will say in which stage
    return 0
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _accelerators() -> list[str]:
  """The device files of this machine's accelerators."""
  return [path for pattern in _ACCELERATORS for path in glob.glob(pattern)]


def missing_accelerator(platform: str) -> str:
  """Says what to do if this machine has an accelerator that JAX does not use; else "".

  Args:
    platform: of JAX's devices, such as "cpu".
  """
  found = _accelerators()
  if platform != "cpu" or not found or os.environ.get("JAX_PLATFORMS") == "cpu":
    return ""
  makers = {"nvidia": "cuda12", "kfd": "rocm7-local"}
  extra = next((extra for name, extra in makers.items() if name in found[0]), "tpu")
  plugin = f"jax[{extra}]=={importlib.metadata.version('jax')}"
  return (
    f"this machine has {found[0]}, but JAX runs on the CPU: install the plug-in of JAX's own version with "
    f"pip install '{plugin}', or set JAX_PLATFORMS=cpu if the CPU is meant"
  )


def use_large_pages() -> None:
  """Restarts this program, in the same process, with large pages for malloc; call it first.

  XLA allocates hundreds of megabytes in each step, and with glibc the kernel clears them each time, page by
  page. glibc reads `GLIBC_TUNABLES` only when a program starts. Does nothing if the variable is already
  set, or if there is an accelerator. Other C libraries ignore it.
  """
  if "GLIBC_TUNABLES" in os.environ or not sys.platform.startswith("linux"):
    return
  if _accelerators():
    return
  os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
  os.execv(sys.executable, sys.orig_argv)


def release_memory() -> None:
  """Gives back to the system what malloc holds and nothing uses, most of it left by compilations.

  Takes about 0.05 s for a heap of 1 GB. Does nothing without glibc, or if there is an accelerator.
  """
  if sys.platform.startswith("linux") and not _accelerators():
    with contextlib.suppress(AttributeError):
      ctypes.CDLL(None).malloc_trim(0)
