"""The processes of a run: how they find each other, and what they must agree on."""

import glob
import hashlib
import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from maskgen.errors import TransientError, UserError


def start(coordinator: str | None, process_count: int | None, process_index: int | None) -> None:
  """Connects this process with the others of its run; before anything else asks JAX for devices.

  Without arguments the surroundings are asked: Cloud TPU, GKE, Slurm and Open MPI tell their processes of
  each other, and JAX understands them. A process that is alone stays so.

  Args:
    coordinator: `host:port` of process 0.
    process_count: how many processes there are.
    process_index: which one this is.

  Raises:
    UserError: if the arguments are incomplete or wrong.
    TransientError: if the others cannot be reached.
  """
  given = (coordinator, process_count, process_index)
  if given == (None, None, None):
    if jax.distributed.is_initialized() or not _has_company():
      return
  elif None in given:
    raise UserError(
      "--coordinator, --process_count and --process_index belong together: give all three or none"
    )
  elif not (process_count or 0) > (process_index or 0) >= 0:
    raise UserError(f"--process_index={process_index}: give a number from 0 to --process_count - 1")
  try:
    jax.distributed.initialize(*given)
  except ValueError as error:
    raise UserError(
      f"this process does not know the others ({error}): give --coordinator and its companions"
    ) from None
  except RuntimeError as error:
    raise TransientError(
      f"the processes of this run did not find each other ({error}): check that all were started, and that "
      "process 0 can be reached"
    ) from None


def _has_company() -> bool:
  """Whether the surroundings say that this is one process of several, or a TPU host, which knows itself."""
  if {"TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"} & os.environ.keys():  # GKE
    return True
  if "TPU_SKIP_MDS_QUERY" not in os.environ and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")):
    return True
  pairs = (("SLURM_PROCID", "SLURM_NTASKS"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
  return any(rank in os.environ and int(os.environ.get(count, "1")) > 1 for rank, count in pairs)


def wait(name: str) -> None:
  """Waits until all processes have come to the place of this name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"maskgen: {name}")


def any_of(flag: bool) -> bool:
  """Whether a flag is set in any process; all call this together."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def all_equal(text: str) -> bool:
  """Whether a text is the same in all processes; all call this together."""
  if jax.process_count() == 1:
    return True
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
  everyone = multihost_utils.process_allgather(digest)
  return bool((everyone == everyone[0]).all())
