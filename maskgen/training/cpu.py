"""What makes training fast on a machine without accelerators: its cores and its memory."""

import contextlib
import glob
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from maskgen import config as config_lib

_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")


def use_cores(stages: Iterable[Mapping[str, Any]]) -> None:
  """Makes each core a device, where every stage can make use of them; before anything asks JAX for devices.

  Devices keep cores busier than the threads within one do. As each holds a copy of the state, there are four
  at most. A run of several processes stays as it is, and so does the number of devices if `XLA_FLAGS` or
  `JAX_NUM_CPU_DEVICES` give it. Accelerators do not care.

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


def use_large_pages() -> None:
  """Starts this program anew, as the same process, with large pages for malloc; before anything else.

  XLA asks for hundreds of megabytes at each step, and with glibc the system clears them again each time, page
  by page. glibc reads `GLIBC_TUNABLES` when a program starts and not later. Where that is set already, or
  where there is an accelerator, nothing is done. Other C libraries ignore it.
  """
  if "GLIBC_TUNABLES" in os.environ or not sys.platform.startswith("linux"):
    return
  if any(map(glob.glob, _ACCELERATORS)):
    return
  os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
  os.execv(sys.executable, sys.orig_argv)
