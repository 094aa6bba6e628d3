"""Fast training on a machine without accelerators: its cores and its memory."""

import contextlib
import glob
import importlib.metadata
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from maskgen import config as config_lib

_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")


def use_cores(stages: Iterable[Mapping[str, Any]]) -> None:
  """Makes each core a device, if every stage can use them; call it before anything asks JAX for devices.

  Several devices use cores better than the threads of one. Each holds a copy of the state, so there are at
  most four. Multi-process runs are unchanged, as is a number of devices given by `XLA_FLAGS` or
  `JAX_NUM_CPU_DEVICES`. Accelerators are unaffected.

  Args:
    stages: plain configs, each of one stage.

  Raises:
    UserError: if one of them is wrong.
  """
  import jax

  given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
  if given or jax.config.values["jax_num_cpu_devices"] != -1 or jax.distributed.is_initialized():
    return
  counts = set(range(1, min(os.cpu_count() or 1, 4) + 1))
  for stage in stages:
    cfg = config_lib.build_dataclass(config_lib.RunConfig, stage, "config")
    divides = cfg.mesh == config_lib.Mesh()
    counts &= {n for n in counts if divides and cfg.batch_size % (cfg.accumulation * n) == 0}
  with contextlib.suppress(RuntimeError):  # a notebook may have asked for devices before
    jax.config.update("jax_num_cpu_devices", max(counts, default=1))


def missing_accelerator(platform: str) -> str:
  """Says what to do if this machine has an accelerator that JAX does not use; else "".

  Args:
    platform: of JAX's devices, such as "cpu".
  """
  found = [path for pattern in _ACCELERATORS for path in glob.glob(pattern)]
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
  if any(map(glob.glob, _ACCELERATORS)):
    return
  os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
  os.execv(sys.executable, sys.orig_argv)
