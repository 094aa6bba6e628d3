"""Multi-process runs: connecting the processes, and agreement between them."""

import glob
import hashlib
import os
import re
import socket
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from maskgen.errors import TransientError, UserError

# How long to wait for the name of the coordinator, which may have just been started.
RESOLVE_SECONDS = 30.0
# A process of which the others have heard nothing for so long counts as dead, and JAX ends them.
HEARTBEAT_SECONDS = 100


def start(coordinator: str | None, process_count: int | None, process_index: int | None) -> None:
  """Connects this process to the others of its run; call this before JAX initialises its devices.

  Without arguments JAX detects Cloud TPU, GKE, Slurm and Open MPI from the environment. A single process
  needs no connection.

  Args:
    coordinator: `host:port` of process 0.
    process_count: the number of processes.
    process_index: the index of this process.

  Raises:
    UserError: if the arguments are incomplete or invalid.
    TransientError: if the other processes cannot be reached.
  """
  given = (coordinator, process_count, process_index)
  if given == (None, None, None):
    if jax.distributed.is_initialized() or not _is_multi_process():
      return
  elif None in given:
    raise UserError(
      "--coordinator, --process_count and --process_index are used together: give all three or none"
    )
  elif not (process_count or 0) > (process_index or 0) >= 0:
    raise UserError(f"--process_index={process_index}: give a number from 0 to --process_count - 1")
  if coordinator is not None:
    _resolve(coordinator)
  try:
    jax.distributed.initialize(*given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
  except ValueError as error:
    raise UserError(
      f"this process cannot find the others ({error}): give --coordinator, --process_count and "
      "--process_index"
    ) from None
  except RuntimeError as error:
    raise TransientError(
      f"the processes of this run could not connect ({error}): check that all were started, and that "
      "process 0 is reachable"
    ) from None


def _resolve(coordinator: str) -> None:
  """Waits until the name of the coordinator can be resolved; JAX aborts the process if it cannot be.

  Raises:
    UserError: if it is not `host:port`.
    TransientError: if the name cannot be resolved.
  """
  match = re.fullmatch(r"(\[[^\[\]]+\]|[^:\[\]]+):(\d{1,5})", coordinator)
  if match is None or not 0 < int(match[2]) < 2**16:
    raise UserError(f"--coordinator={coordinator}: give host:port of process 0, such as 10.0.0.1:8476")
  host, deadline = match[1].strip("[]"), time.monotonic() + RESOLVE_SECONDS
  while True:
    try:
      socket.getaddrinfo(host, int(match[2]))
      return
    except (OSError, UnicodeError) as error:
      if time.monotonic() >= deadline:
        raise TransientError(
          f"--coordinator={coordinator}: the host cannot be resolved ({error}): check its name, and that "
          "process 0 was started"
        ) from None
    time.sleep(1.0)


def _is_multi_process() -> bool:
  """Whether this is one of several processes according to the environment, or a TPU host."""
  if {"TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"} & os.environ.keys():  # GKE
    return True
  if "TPU_SKIP_MDS_QUERY" not in os.environ and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")):
    return True
  pairs = (("SLURM_PROCID", "SLURM_NTASKS"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
  return any(rank in os.environ and int(os.environ.get(count, "1")) > 1 for rank, count in pairs)


def wait(name: str) -> None:
  """Waits until all processes have reached the barrier with this name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"maskgen: {name}")


def any_of(flag: bool) -> bool:
  """Whether a flag is set in any process. A collective call."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def all_equal(text: str) -> bool:
  """Whether a text is the same in all processes. A collective call."""
  if jax.process_count() == 1:
    return True
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
  everyone = multihost_utils.process_allgather(digest)
  return bool((everyone == everyone[0]).all())
